"""The PyTorch row losses of the chunk loop against the definition: losses,
gradients in place, S."""

import pytest
import torch

from palu_kernels import reference
from palu_kernels import torch_backend as eager
from palu_kernels.check.__main__ import Case, rows_of

KINDS = ("normal", "ties", "level", "masked", "large", "empty")
CAP = 4.0


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(eager, "TILE_ENTRIES", 2 * 257)  # two rows a tile, three rows: two tiles


def truth(loss, x, cap):
    z = x.detach().double().clone().requires_grad_()
    rows = loss(z if cap is None else cap * torch.tanh(z / cap))
    (grad,) = torch.autograd.grad(rows.sum(), z)
    return rows.detach(), grad


def agree(found, right, dtype, what):
    found, right = found.double(), right.double()
    assert torch.equal(found.isfinite(), right.isfinite()), what
    live = right.isfinite()
    bound = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
    error = torch.where(live, found - right, 0).norm()
    assert error <= bound[dtype] * torch.where(live, right, 0).norm() + 1e-7, what


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cap", [None, CAP])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients(kind, cap, dtype):
    case = Case("kl", dtype=dtype, columns=257, k=50, kind=kind)
    logits, ref, labels, _ = rows_of(case, torch.device("cpu"))
    if kind == "large":  # of order 1e4: what is under test is the formula, not float32
        logits, ref = logits / 500, ref / 500
    if cap is not None:  # a NaN or a masked entry under a cap is no case that a head can make
        logits, ref = (torch.nan_to_num(t, nan=0.0, neginf=-9.0) for t in (logits, ref))
    logits, ref = logits.to(dtype), ref.to(dtype)

    def capped(t):
        return t if cap is None else cap * torch.tanh(t / cap)

    s = reference.topk_indices(ref, case.k)
    runs = {
        direction: (
            lambda x, d=direction: eager.kl(x, ref, d, cap, cap, x),
            lambda z, d=direction: reference.kl_loss(z, capped(ref.double()), direction=d),
        )
        for direction in ("reverse", "forward")
    }
    runs["cross_entropy"] = (
        lambda x: eager.cross_entropy(x, labels, -100, cap, x),
        lambda z: reference.cross_entropy_loss(z, labels),
    )
    spoiled = torch.where(ref.isnan().any(-1, keepdim=True), torch.nan, 1.0)
    for objective, center in (
        ("flatten", "global_mean"),
        ("flatten", "local_mean"),
        ("flatten", 0.5),
        ("entropy", "global_mean"),
    ):
        options = {"top_k": case.k, "objective": objective, "center": center}
        runs[f"{objective} {center}"] = (
            lambda x, o=options: eager.local_entropy(
                x, ref, None, o["top_k"], o["objective"], o["center"], cap, x
            ),
            lambda z, o=options: reference.local_entropy_loss(z * spoiled, indices=s, **o),
        )
    for name, (ours, loss) in runs.items():
        right, right_grad = truth(loss, logits, cap)
        chunk = logits.clone()
        agree(ours(chunk), right, torch.float64 if dtype == torch.float64 else torch.float32, name)
        agree(chunk, right_grad, dtype, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 2, 7, 256, 257, 300])
def test_topk_is_exact(dtype, k):
    generator = torch.Generator().manual_seed(k)
    scores = torch.randn(7, 257, generator=generator).mul(3).round().to(dtype)  # ties everywhere
    scores[1] = 2.0
    scores[2, ::3] = float("-inf")
    scores[3, 5] = float("nan")
    scores[4] = torch.where(torch.arange(257) % 2 == 0, 0.0, -0.0)
    scores[5] = torch.arange(257) / 100
    found = eager.topk_indices(scores, k)
    assert found.dtype == torch.int32
    assert torch.equal(found, reference.topk_indices(scores, k))


def test_without_gradient_the_chunk_stays():
    x, r = torch.randn(3, 9), torch.randn(3, 9)
    kept = x.clone()
    eager.kl(x, r, "reverse")
    eager.cross_entropy(x, torch.tensor([1, -100, 2]), -100)
    eager.local_entropy(x, r, None, 3, "flatten", "global_mean")
    assert torch.equal(x, kept)

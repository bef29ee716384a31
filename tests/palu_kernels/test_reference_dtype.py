"""A reference of another float dtype than the logits: the narrower rows are widened, exactly."""

import itertools

import pytest
import torch

from palu import PALULoss
from palu_kernels import (
    LMHead,
    kl_loss,
    linear_kl_loss,
    linear_local_entropy_loss,
    local_entropy_loss,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PAIRS = [p for p in itertools.product(DTYPES, DTYPES) if p[0] != p[1]]
LABELS = torch.tensor([[-100, 4, -200, 7, -200, 5], [-100, -200, 3, 2, -200, -200]])


def rows(dtype, seed, *shape):
    """Many ties in every dtype, which a narrower one would make more of."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (made * 4).round().div(4).add(made / 2**12).to(dtype)


LOSSES = {
    "kl": lambda z, r, b: kl_loss(z, r, backend=b),
    "forward kl": lambda z, r, b: kl_loss(z, r, direction="forward", reduction="none", backend=b),
    "flatten": lambda z, r, b: local_entropy_loss(z, r, top_k=5, reduction="none", backend=b),
    "entropy": lambda z, r, b: local_entropy_loss(z, r, top_k=5, objective="entropy", backend=b),
    "PALULoss": lambda z, r, b: PALULoss(top_k=5, backend=b)(z, LABELS, r).loss,
    "PALULoss, nll": lambda z, r, b: (
        PALULoss(top_k=5, preserve="nll", backend=b)(z, LABELS, r).loss
    ),
}


def loss_and_gradient(loss, z, *args):
    z = z.clone().requires_grad_()
    found = loss(z, *args)
    return found.detach(), torch.autograd.grad(found.sum(), z)[0]


QUICK = ("kl", "flatten")  # what is widened is the same for all
KERNELS = [
    pytest.param(name, "triton", marks=[] if name in QUICK else pytest.mark.slow) for name in LOSSES
]


@pytest.mark.parametrize(("name", "backend"), [*((name, "torch") for name in LOSSES), *KERNELS])
def test_on_logits(name, backend):
    half = (torch.float32, torch.bfloat16)
    length = 2 if backend == "triton" and name in QUICK else 6
    for own, other in PAIRS if backend == "torch" else (half, half[::-1]):
        z, r = rows(own, 0, 2, length, 23), rows(other, 1, 2, length, 23)
        wide = torch.promote_types(own, other)
        found, grad = loss_and_gradient(LOSSES[name], z, r, backend)
        right, right_grad = loss_and_gradient(LOSSES[name], z.to(wide), r.to(wide), backend)
        work = torch.float64 if own == torch.float64 else torch.float32
        assert found.dtype == work and grad.dtype == own
        # sums over rows of a batch are float32 unless the logits are float64
        torch.testing.assert_close(found, right.to(work), rtol=1e-6, atol=0)
        tolerance = 0 if wide != torch.float64 else 1e-6
        torch.testing.assert_close(grad, right_grad.to(own), rtol=tolerance, atol=0)


def forms(hidden, head, ref_hidden, ref_head):
    frozen = ref_hidden.flatten(0, 1), ref_head
    flat = hidden.flatten(0, 1)
    loss = PALULoss(top_k=5)
    return {
        "kl": linear_kl_loss(flat, head, *frozen),
        "dense": linear_local_entropy_loss(flat, head, *frozen, top_k=5, implementation="dense"),
        "sparse": linear_local_entropy_loss(
            flat, head, *frozen, top_k=5, implementation="sparse", reduction="none"
        ),
        "PALULoss": loss.from_hidden(hidden, head, LABELS, ref_hidden, ref_head).loss,
    }


@pytest.mark.parametrize("name", ["kl", "dense", "sparse", "PALULoss"])
@pytest.mark.parametrize("one_node", [False, True])
def test_on_hidden_rows(name, one_node, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: one_node)
    for own, other in PAIRS:
        leaves = [rows(own, 2, 2, 6, 9), rows(own, 3, 23, 9)]
        frozen = [rows(other, 4, 2, 6, 9), rows(other, 5, 23, 9)]
        wide = torch.promote_types(own, other)
        made = []
        for dtype in (None, wide):
            h, w, r, u = (t.to(dtype or t.dtype) for t in leaves + frozen)
            h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
            loss = forms(h, LMHead(w), r, LMHead(u))[name]
            made.append([loss.detach(), *torch.autograd.grad(loss.sum(), (h, w))])
        work = torch.float64 if own == torch.float64 else torch.float32
        assert made[0][0].dtype == work
        assert made[0][1].dtype == made[0][2].dtype == own
        for found, right in zip(*made, strict=True):
            tolerance = 4 * torch.finfo(found.dtype).eps
            torch.testing.assert_close(found, right.to(found.dtype), rtol=tolerance, atol=1e-6)


def test_compiled_and_under_autocast():
    loss = PALULoss(top_k=5)
    z, r = rows(torch.float32, 0, 2, 6, 23), rows(torch.bfloat16, 1, 2, 6, 23)
    compiled = torch.compile(
        lambda z, r: loss(z, LABELS, r).loss + kl_loss(z, r) + local_entropy_loss(z, r, top_k=5),
        fullgraph=True,
        backend="aot_eager",
    )
    for own, other in ((z, r), (z.bfloat16(), r.float())):
        with torch.autocast("cpu", torch.bfloat16):
            found = loss_and_gradient(compiled, own, other)
        right = loss_and_gradient(
            lambda z, r: (
                loss(z, LABELS, r).loss + kl_loss(z, r) + local_entropy_loss(z, r, top_k=5)
            ),
            own,
            other,
        )
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-7)
    hidden, weight = rows(torch.float32, 2, 2, 6, 9), rows(torch.float32, 3, 23, 9)
    frozen = rows(torch.bfloat16, 4, 2, 6, 9), LMHead(rows(torch.bfloat16, 5, 23, 9))
    with torch.autocast("cpu", torch.bfloat16):  # products in autocast's dtype, as F.linear's
        found = loss.from_hidden(hidden, LMHead(weight), LABELS, *frozen).loss
    narrow = LMHead(weight.bfloat16())
    assert torch.equal(found, loss.from_hidden(hidden.bfloat16(), narrow, LABELS, *frozen).loss)

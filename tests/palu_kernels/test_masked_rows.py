"""Rows that are masked as a whole, or hold a NaN: losses and gradients agree with the definition
and its autograd."""

import pytest
import torch

from palu import PALULoss
from palu_kernels import (
    LMHead,
    cross_entropy_loss,
    kl_loss,
    linear_cross_entropy_loss,
    linear_kl_loss,
    linear_local_entropy_loss,
    local_entropy_loss,
    reference,
)

V, K = 23, 5
MASKED, NAN = float("-inf"), float("nan")
FORGET = [
    {"objective": "flatten", "center": "global_mean"},
    {"objective": "flatten", "center": "local_mean"},
    {"objective": "flatten", "center": 0.5},
    {"objective": "entropy"},
]


def rows():
    """Current and reference, float64: 0 masked in the reference, 1 in the current, 2 in both, 3 S
    in the current, 4 half in both, 5 NaN in the reference, 6 plain; one masked and the other with a
    NaN (7, 8) or +inf (9)."""
    generator = torch.Generator().manual_seed(0)
    z, r = (torch.randn(10, V, generator=generator).double() for _ in range(2))
    r[0], z[1], z[2], r[2] = MASKED, MASKED, MASKED, MASKED
    z[3, reference.topk_indices(r[3:4], K).long()[0]] = MASKED
    z[4, ::2] = r[4, ::2] = MASKED
    r[5, 7] = NAN
    z[7], r[7, 3], z[8, 3], r[8] = MASKED, NAN, NAN, MASKED
    z[9], r[9, 3] = MASKED, -MASKED
    return z, r


def agree(found, right):
    assert torch.equal(found.isfinite(), right.isfinite())
    assert torch.equal(found.isnan(), right.isnan()) or found.dim() == 2
    both = right.isfinite()
    torch.testing.assert_close(found[both].double(), right[both], rtol=1e-5, atol=1e-6)


def pair(loss, z, r, wanted=None):
    z = z.clone().requires_grad_()
    losses = loss(z, r)
    return losses.detach(), torch.autograd.grad(losses.sum(), z)[0]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_on_logits(backend, dtype):
    if backend == "triton" and dtype == torch.float64:
        return
    z, r = (t.float().double() for t in rows())
    options = {"reduction": "none", "backend": backend}
    for direction in ("forward", "reverse"):
        right = pair(lambda z, r, d=direction: reference.kl_loss(z, r, direction=d), z, r)
        found = pair(
            lambda z, r, d=direction: kl_loss(z, r, direction=d, **options),
            z.to(dtype),
            r.to(dtype),
        )
        agree(found[0], right[0])
        own = right[0].isfinite()
        agree(found[1][own], right[1][own])
        for grad in (found[1], right[1]):
            assert not grad[~own].isfinite().all(-1).any()
        none = [0, 2] if direction == "forward" else [1, 2]
        assert found[0][none].eq(0).all() and found[1][none].eq(0).all()
        for losses, grad in (right, found):
            assert losses[[5, 7, 8, 9]].isnan().all() and grad[[5, 7, 8, 9]].isnan().all()
    for forget in FORGET:
        for chooser in ((r,), ()):
            right = pair(
                lambda z, _, f=forget, c=chooser: reference.local_entropy_loss(z, *c, top_k=K, **f),
                z,
                r,
            )
            own = [t.to(dtype) for t in chooser]
            found = pair(
                lambda z, _, f=forget, c=own: local_entropy_loss(z, *c, top_k=K, **f, **options),
                z.to(dtype),
                r,
            )
            agree(found[0], right[0])
            agree(found[1], right[1])
    labels = torch.arange(len(z))
    labels[2] = -100
    right = pair(lambda z, _: reference.cross_entropy_loss(z, labels), z, r)
    right[1][2] = 0  # ignored: autograd makes NaN of 0 times the masked row's softmax
    found = pair(lambda z, _: cross_entropy_loss(z, labels, **options), z.to(dtype), r)
    agree(found[0], right[0])
    agree(found[1], right[1])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("row", [2, 4, 6])
def test_a_row_alone(row, direction, backend, monkeypatch):
    """PyTorch takes a tile by the definition where one of its rows is not finite."""
    monkeypatch.setattr("palu_kernels.cpu.loops_for", lambda *_: None)
    z, r = (t[row : row + 1].float() for t in rows())
    right = pair(lambda z, r: reference.kl_loss(z, r, direction=direction), z.double(), r.double())
    options = {"direction": direction, "reduction": "none", "backend": backend}
    found = pair(lambda z, r: kl_loss(z, r, **options), z, r)
    agree(found[0], right[0])
    agree(found[1], right[1])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("preserve", ["forward_kl", "reverse_kl", "nll"])
def test_one_batch(backend, preserve):
    """Preserve rows whose reference is masked or holds a NaN; current rows are plain."""
    z, r = (t.float() for t in rows())
    z = torch.randn(z.shape, generator=torch.Generator().manual_seed(3))
    loss = PALULoss(top_k=K, preserve=preserve, backend=backend)
    roles = torch.full((7,), 2, dtype=torch.int8)
    for row, expected in ((0, 0.0), (5, NAN)):
        kept = [row, 6]
        if preserve == "reverse_kl" and row == 0:
            continue  # +inf, as the definition says
        found, grad = pair(lambda z, r: loss.from_rows(z, roles[:2], r).loss, z[kept], r[kept])
        alone, right = pair(lambda z, r: loss.from_rows(z, roles[:1], r).loss, z[6:7], r[6:7])
        torch.testing.assert_close(found, (alone + expected) / 2, equal_nan=True)
        torch.testing.assert_close(grad[1], right[0] / 2)
        assert grad[0].eq(0).all() if expected == 0 else grad[0].isnan().all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("masked", ["reference", "current", "both"])
def test_on_hidden_rows(masked, backend):
    """A bias of -inf masks every row of its head."""
    generator = torch.Generator().manual_seed(1)
    hidden, ref_hidden = (torch.randn(2, 8, generator=generator) for _ in range(2))
    weight, ref_weight = (torch.randn(V, 8, generator=generator) for _ in range(2))
    bias = torch.full((V,), MASKED) if masked != "reference" else torch.zeros(V)
    ref_bias = torch.full((V,), MASKED) if masked != "current" else torch.zeros(V)
    options = {"reduction": "none", "backend": backend}

    def losses(hidden, weight, definition):
        work = hidden.dtype
        head = LMHead(weight, bias.to(work))
        ref_head = LMHead(ref_weight.to(work), ref_bias.to(work))
        frozen = ref_hidden.to(work), ref_head
        z, r = head.logits(hidden), ref_head.logits(ref_hidden.to(work))
        for direction in ("forward", "reverse"):
            if definition:
                yield reference.kl_loss(z, r, direction=direction)
            else:
                yield linear_kl_loss(hidden, head, *frozen, direction=direction, **options)
        for forget in FORGET:
            for road in ("dense", "sparse"):
                yield (
                    reference.local_entropy_loss(z, r, top_k=K, **forget)
                    if definition
                    else linear_local_entropy_loss(
                        hidden, head, *frozen, top_k=K, implementation=road, **forget, **options
                    )
                )

    made = []
    for dtype, definition in ((torch.float64, True), (torch.float32, False)):
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        made.append(
            [
                (rows.detach(), *torch.autograd.grad(rows.sum(), leaves, retain_graph=True))
                for rows in losses(*leaves, definition)
            ]
        )
    for right, found in zip(*made, strict=True):
        agree(found[0], right[0])
        if right[0].isfinite().all():
            for a, b in zip(found[1:], right[1:], strict=True):
                agree(a, b)
        else:
            assert not found[1].isfinite().any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_ignored_row_of_nan_under_a_cap(backend):
    """As a row of padding may be: it has no gradient, whatever it holds."""
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(n, 8, generator=generator) for n in (3, V))
    hidden[1] = NAN
    hidden.requires_grad_()
    labels = torch.tensor([4, -100, 2])
    loss = linear_cross_entropy_loss(hidden, LMHead(weight, softcap=3.0), labels, backend=backend)
    (grad,) = torch.autograd.grad(loss, hidden)
    assert grad[1].eq(0).all() and grad[[0, 2]].isfinite().all() and grad[0].any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_infinity_beside_a_masked_entry_off_s(backend):
    """Their sum is NaN, but no entry is: only a mean of the row meets them."""
    z = torch.randn(2, V, generator=torch.Generator().manual_seed(4))
    z[0, :2] = torch.tensor([-MASKED, MASKED])
    options = {"top_k": K, "indices": torch.arange(5, 5 + K).expand(2, K)}
    for forget in FORGET[1:]:
        right = pair(
            lambda z, _, f=forget: reference.local_entropy_loss(z, **options, **f), z.double(), z
        )
        found = pair(
            lambda z, _, f=forget: local_entropy_loss(
                z, **options, **f, reduction="none", backend=backend
            ),
            z,
            z,
        )
        assert right[0].isfinite().all()
        agree(found[0], right[0])
        agree(found[1], right[1])

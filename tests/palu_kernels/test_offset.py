"""Rows far from 0: the mean of flatten is told in two numbers, so that no digit of the deviations
is lost (softmax is shifted by its maximum already)."""

import pytest
import torch

from palu_kernels import LMHead, linear_local_entropy_loss, local_entropy_loss, reference
from palu_kernels.linear import sparse

V, K = 3001, 50


def error(found, right):
    return ((found.double() - right).norm() / right.norm()).item()


@pytest.mark.parametrize("backend", ["torch", "triton", "definition"])
@pytest.mark.parametrize("center", ["global_mean", "local_mean", "entropy"])
def test_an_offset_changes_nothing(center, backend):
    generator = torch.Generator().manual_seed(0)
    s = torch.randint(0, V - K, (2, 1), generator=generator) + torch.arange(K)
    options = {"top_k": K, "indices": s}
    options |= {"objective": center} if center == "entropy" else {"center": center}
    for offset in (0.0, 1e4, -1e6):
        rows = torch.randn(2, V, generator=generator) * 3 + offset
        made = []
        for z in (rows.double().requires_grad_(), rows.clone().requires_grad_()):
            if backend == "definition" or z.dtype == torch.float64:
                losses = reference.local_entropy_loss(z, **options)
            else:
                losses = local_entropy_loss(z, **options, reduction="none", backend=backend)
            made.append((losses.detach(), torch.autograd.grad(losses.sum(), z)[0]))
        allowed = 5e-7
        if (center, backend) == ("local_mean", "triton"):
            # Its mean is merged in one float32 number, as well as a number of that size is known.
            allowed = max(allowed, 2**-23 * abs(offset) / 3)
        assert error(made[1][0], made[0][0]) < allowed
        assert error(made[1][1], made[0][1]) < allowed


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_number_that_stands_for_a_mask_spoils_no_digit(backend):
    """-1e9 among the first entries: the mean is far off, and so it is computed."""
    rows = torch.randn(2, V, generator=torch.Generator().manual_seed(0))
    rows[:, 3] = -1e9
    s = torch.arange(10, 10 + K).expand(2, K)
    for center in ("global_mean", "local_mean"):
        options = {"top_k": K, "indices": s, "center": center}
        right = reference.local_entropy_loss(rows.double(), **options)
        found = local_entropy_loss(rows, **options, reduction="none", backend=backend)
        assert error(found, right) < 5e-6


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("mask", [-1e4, -1e9, torch.finfo(torch.float32).min / 4])
def test_masks_in_all_of_the_first_lanes_spoil_no_digit_of_s(mask, backend):
    """More of them than any kernel looks at to find a number near the mean."""
    rows = torch.randn(2, V, generator=torch.Generator().manual_seed(0))
    rows[:, :300] = mask
    z, truth = rows.clone().requires_grad_(), rows.double().requires_grad_()
    s = torch.arange(400, 400 + K).expand(2, K)
    options = {"top_k": K, "indices": s, "center": "local_mean"}
    right = reference.local_entropy_loss(truth, **options)
    found = local_entropy_loss(z, **options, reduction="none", backend=backend)
    assert error(found.detach(), right.detach()) < 5e-7
    grads = [torch.autograd.grad(x.sum(), y)[0] for x, y in ((found, z), (right, truth))]
    assert error(*grads) < 5e-7


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("road", ["dense", "sparse"])
@pytest.mark.parametrize("where", ["bias", "weight"])
def test_on_hidden_rows_no_worse_than_the_logits_are(where, road, backend):
    """A logit of 1e4 is known to 5e-4: the loss of plain PyTorch is off by as much."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(3, 64, generator=generator) + 1,
        torch.randn(V, 64, generator=generator) / 8,
    )
    bias = torch.randn(V, generator=generator)
    if where == "bias":
        bias += 1e4
    else:
        weight += 1e4 / 64
    s = torch.arange(3, 3 + 20).expand(3, 20)
    options = {"top_k": 20, "indices": s}

    def results(loss, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]
        losses = loss(*leaves)
        return [losses.detach(), *torch.autograd.grad(losses.sum(), leaves)]

    def plain(h, w, b):
        return reference.local_entropy_loss(reference.head_logits(h, w, b), **options)

    def ours(h, w, b):
        given = {"implementation": road, "backend": backend, "reduction": "none"}
        return linear_local_entropy_loss(h, LMHead(w, b), **options, **given)

    truth = results(plain, torch.float64)
    allowed = [error(a, b) for a, b in zip(results(plain, torch.float32), truth, strict=True)]
    for found, right, bound in zip(results(ours, torch.float32), truth, allowed, strict=True):
        assert error(found, right) < max(2 * bound, 1e4 * 2**-23)  # how far apart such numbers are


def test_masked_rows_of_a_head_have_no_part_in_the_mean_of_its_rows():
    """Nor in the number near it: they may be as large as they like."""
    weight = torch.randn(600, 16, generator=torch.Generator().manual_seed(0))
    bias = torch.zeros(600)
    weight[:300], bias[:300] = 1e6, float("-inf")
    mean, _ = sparse.mean_row(weight, bias)
    assert error(mean, weight[300:].double().mean(0)) < 5e-7

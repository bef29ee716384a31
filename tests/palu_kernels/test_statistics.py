"""Softmax statistics that are kept by a thread, then merged over threads, splits and rows: entries
whose order, size or absence could spoil them."""

import math

import pytest
import torch

from palu_kernels import cross_entropy_loss, kl_loss, local_entropy_loss, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INF = math.inf
# rows of several blocks and two splits, not a multiple of either
ROWS = {torch.float32: 6145, torch.bfloat16: 12289}


def rows(dtype):
    """Current and reference rows by name."""
    generator = torch.Generator().manual_seed(0)
    columns, lowest = ROWS[dtype], torch.finfo(dtype).min
    half, last = columns // 2, columns - 1
    one = 3 * torch.randn(columns, generator=generator)
    other = one + 0.5 * torch.randn(columns, generator=generator)

    def change(row, at, value):
        changed = row.clone()
        changed[at] = value
        return changed

    def both(at, value):
        return change(one, at, value), change(other, at, value)

    first_half, second_half = slice(half), slice(half, None)
    found = {
        "plain": (one, other),
        "far from each other": (one + 1000, other - 1000),
        "wide": (100 * one, 30 * other),
        "halves far from each other": (
            change(one, second_half, one[second_half] + 300),
            change(other, first_half, other[first_half] + 300),
        ),
        "every second masked": both(slice(None, None, 2), -INF),
        "a half masked": both(first_half, -INF),
        "the other half masked": both(second_half, -INF),
        "a half of the current masked": (change(one, first_half, -INF), other),
        "all but the last masked": both(slice(last), -INF),
        "all of the current masked": (torch.full_like(one, -INF), other),
        "all masked": (torch.full_like(one, -INF),) * 2,
        "the reference lacks a likely entry": (one, change(other, 7, -INF)),
        "the reference lacks one whose share underflows": (
            change(one, last, -200.0),
            change(other, last, -INF),
        ),
        "a finite mask in a half": both(first_half, lowest),
        "a finite mask in the current's half": (change(one, first_half, lowest), other),
        "a finite mask, and masked entries": tuple(
            change(change(row, first_half, lowest), second_half, -INF) for row in both(last, 0.0)
        ),
        "NaN in the current": (change(one, 5, math.nan), other),
        "NaN in the reference": (one, change(other, last, math.nan)),
        "inf in the current": (change(one, 5, INF), other),
        "inf in the reference": (one, change(other, last, INF)),
    }
    pairs = zip(*found.values(), strict=True)
    return (list(found), *(torch.stack(half).to(DEVICE, dtype) for half in pairs))


def worse(names, found, right, losses):
    """The rows in which `found` is not `right`."""
    tolerance = 1e-5 if losses else 1e-2  # of a gradient of 16 bits, by its norm
    bad = []
    for name, a, b in zip(names, found.double(), right, strict=True):
        same = torch.equal(a.isnan(), b.isnan()) if losses else True
        same &= torch.equal(a.isfinite(), b.isfinite())
        finite = b.isfinite().all()
        if not same or (finite and (a - b).norm() > tolerance * b.norm() + 1e-6):
            bad.append(name)
    return bad


@pytest.mark.parametrize(
    ("dtype", "direction"),
    [
        (torch.float32, "reverse"),
        (torch.float32, "forward"),
        (torch.bfloat16, "reverse"),
        # a dtype is what entries are loaded as: the directions differ after it
        pytest.param(torch.bfloat16, "forward", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_kl(dtype, direction):
    names, z, r = rows(dtype)
    if direction == "forward":  # whose reference comes first, and is the one that may be masked
        z, r = r, z
    z.requires_grad_()
    loss = kl_loss(z, r, direction=direction, reduction="none", backend="triton")
    grad = torch.autograd.grad(loss.sum(), z)[0]
    exact, ones = (z.detach().double(), r.double()), torch.ones(len(names), device=DEVICE)
    right = reference.kl_loss(*exact, direction=direction)
    assert not worse(names, loss.detach(), right, losses=True)
    right = reference.kl_gradient(*exact, ones.double(), direction=direction)
    assert not worse(names, grad, right, losses=False)


@pytest.mark.parametrize("dtype", ROWS, ids=str)
def test_cross_entropy(dtype):
    names, z, _ = rows(dtype)
    labels = torch.arange(len(names), device=DEVICE) * 700 % ROWS[dtype]
    labels[2] = -100
    z.requires_grad_()
    loss = cross_entropy_loss(z, labels, reduction="none", backend="triton")
    grad = torch.autograd.grad(loss.sum(), z)[0]
    exact, ones = z.detach().double(), torch.ones(len(names), device=DEVICE)
    assert not worse(names, loss.detach(), reference.cross_entropy_loss(exact, labels), losses=True)
    right = reference.cross_entropy_gradient(exact, labels, ones.double())
    assert not worse(names, grad, right, losses=False)


def test_flatten_about_the_mean():
    """Whose mean is made of splits, each of which counts from a number of its own."""
    names, z, _ = rows(torch.float32)
    kept = [i for i, name in enumerate(names) if "finite mask" not in name]  # float32 has no square
    names, z = [names[i] for i in kept], z[kept].requires_grad_()
    kind = {"top_k": 5, "objective": "flatten", "center": "global_mean"}
    loss = local_entropy_loss(z, **kind, reduction="none", backend="triton")
    grad = torch.autograd.grad(loss.sum(), z)[0]
    exact, ones = z.detach().double(), torch.ones(len(names), device=DEVICE)
    right = reference.local_entropy_loss(exact, **kind)
    assert not worse(names, loss.detach(), right, losses=True)
    right = reference.local_entropy_gradient(exact, None, ones.double(), indices=None, **kind)
    assert not worse(names, grad, right, losses=False)

"""The definition against formulas written out by hand, and its gradients against autograd."""

import math

import pytest
import torch

from palu_kernels import reference

NEG = float("-inf")
LOCAL = [
    ("flatten", "global_mean"),
    ("flatten", "local_mean"),
    ("flatten", 0.3),
    ("entropy", "global_mean"),
]


def doubles(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_topk_takes_the_lowest_index_of_equals():
    scores = torch.tensor([[1.0, 3.0, 3.0, -0.0, 0.0, 3.0, NEG]])
    assert reference.topk_indices(scores, 2).tolist() == [[1, 2]]
    assert reference.topk_indices(scores, 4).tolist() == [[0, 1, 2, 5]]
    assert reference.topk_indices(scores, 5).tolist() == [[0, 1, 2, 3, 5]]
    assert reference.topk_indices(scores, 99).tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    assert reference.topk_indices(scores, 1).dtype == torch.int32


def test_flatten_by_hand():
    z = torch.tensor([[4.0, 1.0, -2.0, 0.0, 3.0]], dtype=torch.float64)
    r = torch.tensor([[9.0, 0.0, 0.0, 0.0, 8.0]], dtype=torch.float64)  # S = {0, 4}
    loss = reference.local_entropy_loss(z, r, top_k=2, center="global_mean")
    assert loss.item() == pytest.approx(((4 - 1.2) ** 2 + (3 - 1.2) ** 2) / 2)
    loss = reference.local_entropy_loss(z, r, top_k=2, center="local_mean")
    assert loss.item() == pytest.approx(0.25)
    loss = reference.local_entropy_loss(z, r, top_k=2, center=1.0)
    assert loss.item() == pytest.approx((9 + 4) / 2)
    by_current = reference.local_entropy_loss(z, top_k=3, center=0.0)  # S = {0, 1, 4}
    assert by_current.item() == pytest.approx((16 + 1 + 9) / 3)


def test_entropy_by_hand():
    z = torch.tensor([[math.log(3.0), 7.0, 0.0, -5.0]], dtype=torch.float64)
    loss = reference.local_entropy_loss(
        z, top_k=2, indices=torch.tensor([[0, 2]]), objective="entropy"
    )
    h = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert loss.item() == pytest.approx(math.log(2) - h)
    level = torch.full((1, 9), 2.5, dtype=torch.float64)
    assert reference.local_entropy_loss(level, top_k=5, objective="entropy").abs().item() < 1e-15


def test_kl_by_hand():
    z = torch.tensor([[math.log(0.5), math.log(0.3), math.log(0.2)]], dtype=torch.float64) + 5
    r = torch.tensor([[math.log(0.1), math.log(0.6), math.log(0.3)]], dtype=torch.float64) - 2
    p, q = [0.5, 0.3, 0.2], [0.1, 0.6, 0.3]
    reverse = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    forward = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    assert reference.kl_loss(z, r, direction="reverse").item() == pytest.approx(reverse)
    assert reference.kl_loss(z, r, direction="forward").item() == pytest.approx(forward)


@pytest.mark.parametrize(("objective", "center"), LOCAL)
def test_masked_entries_take_no_part(objective, center):
    """A masked vocabulary gives what the vocabulary without those entries gives."""
    z, r = doubles(3, 20), doubles(3, 20, seed=1)
    hidden = [2, 5, 11]
    kept = [j for j in range(20) if j not in hidden]
    masked_z, masked_r = z.clone(), r.clone()
    masked_z[:, hidden] = masked_r[:, hidden] = NEG
    for k in (4, 17, 20):
        kw = {"top_k": k, "objective": objective, "center": center}
        loss = reference.local_entropy_loss(masked_z, masked_r, **kw)
        torch.testing.assert_close(loss, reference.local_entropy_loss(z[:, kept], r[:, kept], **kw))


def test_kl_with_masks():
    z, r = doubles(4, 6), doubles(4, 6, seed=1)
    z[0, 1] = NEG  # only the current row lacks it
    r[1, 1] = NEG  # only the reference lacks it
    z[2, 1] = r[2, 1] = NEG
    reverse = reference.kl_loss(z, r, direction="reverse")
    forward = reference.kl_loss(z, r, direction="forward")
    assert reverse.isfinite().tolist() == [True, False, True, True]
    assert forward.isfinite().tolist() == [False, True, True, True]
    assert reverse[1] == forward[0] == torch.inf
    kept = [0, 2, 3, 4, 5]
    torch.testing.assert_close(reverse[2:3], reference.kl_loss(z[2:3][:, kept], r[2:3][:, kept]))
    far = torch.tensor([[0.0, -1e4]], dtype=torch.float64)
    gone = torch.tensor([[0.0, NEG]], dtype=torch.float64)
    assert reference.kl_loss(far, gone).item() == torch.inf  # although its probability underflows


def test_a_row_without_any_entry_gives_zero():
    empty = torch.full((1, 5), NEG, dtype=torch.float64, requires_grad=True)
    for objective, center in LOCAL:
        loss = reference.local_entropy_loss(empty, top_k=3, objective=objective, center=center)
        (grad,) = torch.autograd.grad(loss.sum(), empty)
        assert loss.item() == 0 and not grad.any()
    for direction in ("reverse", "forward"):
        assert reference.kl_loss(empty, empty.detach(), direction=direction).item() == 0


@pytest.mark.parametrize(("objective", "center"), LOCAL)
@pytest.mark.parametrize("select", ["reference", "indices", "current"])
def test_gradcheck_of_the_forget_losses(objective, center, select):
    z, r = doubles(2, 9).requires_grad_(), doubles(2, 9, seed=1)
    with torch.no_grad():
        z[0, 3] = NEG
        z[1, 4] = 1.7
    indices = torch.tensor([[1, 3, 6, 8], [0, 2, 4, 5]])
    given = {"reference": {"ref_logits": r}, "indices": {"indices": indices}, "current": {}}
    kw = {"top_k": 4, "objective": objective, "center": center, **given[select]}
    finite = z.detach().isfinite()

    def loss(x):
        return reference.local_entropy_loss(torch.where(finite, x, NEG), **kw)

    x = torch.where(finite, z.detach(), 0).requires_grad_()
    assert torch.autograd.gradcheck(loss, x)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_gradcheck_of_kl(direction):
    z, r = doubles(2, 7).requires_grad_(), doubles(2, 7, seed=1)
    assert torch.autograd.gradcheck(lambda x: reference.kl_loss(x, r, direction=direction), z)


def test_gradcheck_of_cross_entropy():
    z, labels = doubles(3, 7).requires_grad_(), torch.tensor([2, -100, 6])
    assert torch.autograd.gradcheck(lambda x: reference.cross_entropy_loss(x, labels), z)


@pytest.mark.parametrize(("objective", "center"), LOCAL)
@pytest.mark.parametrize("select", ["reference", "indices", "current"])
def test_gradient_formula_of_the_forget_losses(objective, center, select):
    z, r, weights = doubles(4, 30), doubles(4, 30, seed=1), doubles(4, seed=2)
    z[0, ::4] = r[0, ::4] = NEG
    z[1, 3] = torch.nan
    r[2, 3] = torch.nan
    indices = torch.stack([torch.randperm(30)[:6] for _ in range(4)])
    given = {
        "reference": {"ref_logits": r, "indices": None},
        "indices": {"ref_logits": None, "indices": indices},
        "current": {"ref_logits": None, "indices": None},
    }[select]
    kw = {"top_k": 6, "objective": objective, "center": center, **given}
    x = z.clone().requires_grad_()
    (auto,) = torch.autograd.grad(reference.local_entropy_loss(x, **kw), x, weights)
    ours = reference.local_entropy_gradient(z, kw.pop("ref_logits"), weights, **kw)
    torch.testing.assert_close(ours, auto, equal_nan=True)
    assert ours[1].isnan().all() and ours[3].isfinite().all()


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_gradient_formula_of_kl(direction):
    z, r, weights = doubles(5, 30), doubles(5, 30, seed=1), doubles(5, seed=2)
    z[0, ::4] = r[0, ::4] = NEG
    z[1, 3] = torch.nan
    x = z.clone().requires_grad_()
    (auto,) = torch.autograd.grad(reference.kl_loss(x, r, direction=direction), x, weights)
    ours = reference.kl_gradient(z, r, weights, direction=direction)
    torch.testing.assert_close(ours, auto, equal_nan=True)
    r[4, 0] = NEG
    z[3, 0] = NEG
    infinite = 4 if direction == "reverse" else 3
    assert not reference.kl_gradient(z, r, weights, direction=direction)[infinite].isfinite().any()


def test_gradient_formula_of_cross_entropy():
    z, weights, labels = doubles(4, 30), doubles(4, seed=2), torch.tensor([3, -100, 0, 29])
    z[0, 5] = NEG
    x = z.clone().requires_grad_()
    (auto,) = torch.autograd.grad(reference.cross_entropy_loss(x, labels), x, weights)
    torch.testing.assert_close(reference.cross_entropy_gradient(z, labels, weights), auto)


def test_global_mean_gradient_sums_to_zero():
    grad = reference.local_entropy_gradient(
        doubles(2, 50),
        None,
        torch.ones(2, dtype=torch.float64),
        top_k=5,
        indices=None,
        objective="flatten",
        center="global_mean",
    )
    assert grad.sum(-1).abs().max() < 1e-12
    assert (grad != 0).all()

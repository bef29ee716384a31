"""Every message names the argument, what it was and what it must be."""

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
    topk_indices,
)
from palu_kernels.row_loss import CrossEntropy, LocalEntropy, Operands

Z = torch.randn(4, 10)
INDICES = torch.arange(3).expand(4, 3)
LABELS = torch.arange(4)

CASES = [
    (lambda: topk_indices(Z, 0), ValueError, "k is 0; it must be at least 1"),
    (lambda: topk_indices(Z, 2.0), TypeError, r"k is 2.0 \(float\); it must be an int"),
    (lambda: topk_indices(Z, True), TypeError, "k is True"),
    (lambda: topk_indices(Z.long(), 2), TypeError, "scores has dtype torch.int64; it must be"),
    (lambda: topk_indices([1.0], 2), TypeError, "scores is a list; it must be a torch.Tensor"),
    (lambda: topk_indices(Z[0], 2), ValueError, r"scores has shape \[10\]; it must be \[N, V\]"),
    (lambda: topk_indices(Z[:, :0], 2), ValueError, "V, must be at least 1"),
    (lambda: topk_indices(Z, 2, backend="cuda"), ValueError, "backend is 'cuda'; it must be"),
    (lambda: local_entropy_loss(Z, top_k=-1), ValueError, "top_k is -1; it must be at least 1"),
    (lambda: local_entropy_loss(Z.int(), top_k=1), TypeError, "logits has dtype torch.int32"),
    (
        lambda: local_entropy_loss(Z, Z[:, :5], top_k=1),
        ValueError,
        r"ref_logits has shape \[4, 5\]; it must have the shape of logits, \[4, 10\]",
    ),
    (
        lambda: local_entropy_loss(Z, Z.clone().requires_grad_(), top_k=1),
        ValueError,
        "ref_logits requires grad; it must be frozen",
    ),
    (
        lambda: local_entropy_loss(Z, Z, top_k=3, indices=INDICES),
        ValueError,
        "ref_logits and indices are both given",
    ),
    (
        lambda: local_entropy_loss(Z, top_k=4, indices=INDICES),
        ValueError,
        "top_k is 4 and indices holds 3 a row; of V = 10 it must hold 4",
    ),
    (
        lambda: local_entropy_loss(Z, top_k=50, indices=INDICES.repeat(1, 20)[:, :50]),
        ValueError,
        "top_k is 50 and indices holds 50 a row; of V = 10 it must hold 10",
    ),
    (
        lambda: local_entropy_loss(Z, top_k=3, indices=INDICES[:2]),
        ValueError,
        r"indices has shape \[2, 3\]; it must be \[4, 3\]",
    ),
    (
        lambda: local_entropy_loss(Z, top_k=3, indices=INDICES.float()),
        TypeError,
        "indices has dtype torch.float32; it must be int64 or int32",
    ),
    (
        lambda: local_entropy_loss(Z, top_k=3, indices=INDICES + 8),
        ValueError,
        r"indices holds 10; an index must be in 0\.\.9",
    ),
    (
        lambda: local_entropy_loss(Z, top_k=3, indices=INDICES - 1),
        ValueError,
        r"indices holds -1; an index must be in 0\.\.9",
    ),
    (
        lambda: local_entropy_loss(Z, top_k=3, indices=INDICES * 0),
        ValueError,
        "the same index twice",
    ),
    (
        lambda: local_entropy_loss(Z, top_k=3, objective="level"),
        ValueError,
        "objective is 'level'; it must be one of 'flatten', 'entropy'",
    ),
    (
        lambda: local_entropy_loss(Z, top_k=3, center="median"),
        ValueError,
        "center is 'median'; it must be 'global_mean', 'local_mean' or a number",
    ),
    (lambda: local_entropy_loss(Z, top_k=3, center=None), TypeError, "center is None"),
    (
        lambda: local_entropy_loss(Z, top_k=3, center=float("nan")),
        ValueError,
        "center is nan; it must be a finite number",
    ),
    (
        lambda: local_entropy_loss(Z, top_k=3, reduction="average"),
        ValueError,
        "reduction is 'average'; it must be one of 'mean', 'sum', 'none'",
    ),
    (lambda: kl_loss(Z, Z, direction="both"), ValueError, "direction is 'both'"),
    (lambda: kl_loss(Z, None), TypeError, "ref_logits is a NoneType"),
    (lambda: kl_loss(Z, Z.clone().requires_grad_()), ValueError, "ref_logits requires grad"),
    (lambda: cross_entropy_loss(Z, LABELS.float()), TypeError, "labels has dtype torch.float32"),
    (
        lambda: cross_entropy_loss(Z, LABELS[:3]),
        ValueError,
        r"labels has shape \[3\]; it must be \[4\]",
    ),
    (
        lambda: cross_entropy_loss(Z, LABELS + 7),
        ValueError,
        r"labels holds 10; a label must be -100 \(ignore_index\) or in 0\.\.9",
    ),
    (lambda: cross_entropy_loss(Z, LABELS - 200), ValueError, "labels holds -200"),
    (lambda: cross_entropy_loss(Z, LABELS, ignore_index=None), TypeError, "ignore_index is None"),
]


@pytest.mark.parametrize(("call", "kind", "message"), CASES, ids=[c[2] for c in CASES])
def test_message(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_all_of_the_vocabulary_as_indices():
    everything = torch.arange(10).expand(4, 10)
    loss = local_entropy_loss(Z, top_k=50, indices=everything)
    torch.testing.assert_close(loss, local_entropy_loss(Z, top_k=10, indices=everything))


W, LABELS3, Z3 = torch.randn(20, 10), torch.full((1, 4), -200), Z[None]
NOT_DENSE = {
    "of layout torch.sparse_coo": Z.to_sparse(),
    "of layout torch.sparse_csr": Z.to_sparse_csr(),
    "nested": torch.nested.nested_tensor([Z, Z[:2]]),
    "nested;": torch.nested.nested_tensor([Z, Z[:2]], layout=torch.jagged),
    "a MaskedTensor": torch.masked.masked_tensor(Z, Z > 0),
}
NO_FLOATS = (Z + 0j, torch.quantize_per_tensor(Z, 0.1, 0, torch.qint8), Z > 0)
TAKEN_BY = {
    "scores": lambda t: topk_indices(t, 3),
    "logits": lambda t: local_entropy_loss(t, top_k=3),
    "ref_logits": lambda t: kl_loss(Z, t),
    "hidden": lambda t: linear_cross_entropy_loss(t, LMHead(W), LABELS),
    "ref_hidden": lambda t: linear_kl_loss(Z, LMHead(W), t),
    "weight": LMHead,
}
TAKEN_BY_OTHERS = {
    "bias": lambda t: LMHead(W, t),
    "labels": lambda t: cross_entropy_loss(Z, t),
    "indices": lambda t: local_entropy_loss(Z, indices=t, top_k=3),
    "row_roles": lambda t: PALULoss(top_k=3).from_rows(Z, t, Z),
    "ref_indices": lambda t: PALULoss(top_k=3).from_hidden(
        Z3, LMHead(W), LABELS3, Z3, ref_indices=t
    ),
    "num_forget": lambda t: PALULoss(top_k=3)(Z3, LABELS3, Z3, num_forget=t),
}


@pytest.mark.parametrize("argument", TAKEN_BY | TAKEN_BY_OTHERS)
def test_tensors_that_are_not_dense_are_named(argument):
    take = (TAKEN_BY | TAKEN_BY_OTHERS)[argument]
    for kind, tensor in NOT_DENSE.items():
        with pytest.raises(
            TypeError, match=f"^{argument} is {kind.strip(';')}; it must be a dense"
        ):
            take(tensor)
    for tensor in NO_FLOATS if argument in TAKEN_BY else ():
        with pytest.raises(TypeError, match=f"^{argument} has dtype {tensor.dtype}; it must be"):
            take(tensor)


IN_TRANSFORMS = {
    "local_entropy_loss": lambda t: local_entropy_loss(t, top_k=3),
    "kl_loss": lambda t: kl_loss(Z, t),
    "cross_entropy_loss": lambda t: cross_entropy_loss(t, LABELS),
    "a linear loss": lambda t: linear_cross_entropy_loss(t, LMHead(W), LABELS),
    "a linear loss, head": lambda t: linear_cross_entropy_loss(Z, LMHead(t), LABELS),
    "a linear loss, S": lambda t: linear_local_entropy_loss(
        Z, LMHead(W), indices=(0 * t[:, :3]).long() + INDICES, top_k=3
    ),
    "PALULoss": lambda t: PALULoss(top_k=3)(t[None], LABELS3, Z3).loss,
    "PALULoss, hidden": lambda t: (
        PALULoss(top_k=3).from_hidden(t[None], LMHead(W), LABELS3, Z3).loss
    ),
    "kl_loss, constants": lambda t: t.sum() * kl_loss(Z, Z),
}
TRANSFORMS = {
    "grad": lambda f: torch.func.grad(f)(Z),
    "vmap": lambda f: torch.func.vmap(f)(torch.stack([Z, Z])),
    "jvp": lambda f: torch.func.jvp(f, (Z,), (Z,)),
    "jacrev": lambda f: torch.func.jacrev(f)(Z),
    "jacfwd": lambda f: torch.func.jacfwd(f)(Z),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", IN_TRANSFORMS)
def test_transforms_of_torch_func_are_refused(name, transform):
    said = rf"^palu_kernels: {name.split(',')[0]} does not support (vmap|torch.func)"
    with pytest.raises(RuntimeError, match=said):
        TRANSFORMS[transform](IN_TRANSFORMS[name])


def test_topk_indices_in_transforms():
    batches = torch.randn(3, 2, 4, 10)
    right = topk_indices(batches.flatten(0, 2), 3).view(3, 2, 4, 3)
    assert torch.equal(torch.vmap(lambda t: topk_indices(t, 3))(batches), right)
    assert torch.equal(torch.vmap(lambda t: topk_indices(t, 3), 2, 2)(batches), right)
    assert torch.vmap(lambda t: topk_indices(t, 3))(batches[0, :, :0]).shape == (2, 0, 3)
    chosen = torch.zeros_like(Z).scatter(-1, topk_indices(Z, 3).long(), 1.0)

    def top(z):
        return z.gather(-1, topk_indices(z, 3).long()).sum()

    assert torch.equal(torch.func.grad(top)(Z), chosen)
    assert torch.equal(torch.func.jacrev(top)(Z), chosen)
    torch.testing.assert_close(torch.func.jvp(top, (Z,), (Z,))[1], (chosen * Z).sum())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_meta_tensors_give_shapes(reduction, monkeypatch):
    monkeypatch.setenv("PALU_CHECK", "1")

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def head():
        return LMHead(weight)

    hidden, weight = meta(4, 10).requires_grad_(), meta(20, 10).requires_grad_()
    frozen, labels = (meta(4, 10), LMHead(meta(20, 10))), meta(4, dtype=torch.long)
    s = meta(4, 3, dtype=torch.int32)
    options = {"reduction": reduction}
    for loss in (
        linear_kl_loss(hidden, head(), *frozen, **options),
        linear_cross_entropy_loss(hidden, head(), labels, **options),
        linear_local_entropy_loss(hidden, head(), *frozen, top_k=3, **options),
        linear_local_entropy_loss(hidden, head(), indices=s, top_k=3, **options),
        kl_loss(hidden, frozen[0], **options),
        local_entropy_loss(hidden, frozen[0], top_k=3, **options),
        local_entropy_loss(hidden, indices=s, top_k=3, **options),
        cross_entropy_loss(hidden, labels, **options),
        PALULoss(top_k=3)(hidden[None], labels[None], frozen[0][None]).loss,
        PALULoss(top_k=3)
        .from_hidden(hidden[None], head(), labels[None], frozen[0][None], frozen[1])
        .loss,
    ):
        assert loss.is_meta and loss.shape in ((), (4,))
        grads = torch.autograd.grad(loss.sum(), (hidden, weight), allow_unused=True)
        assert grads[0].shape == hidden.shape and grads[0].is_meta
    assert topk_indices(hidden, 3).shape == (4, 3)


def test_integers_that_nobody_checked_spoil_their_row_alone():
    """As on an accelerator, where values are not checked: the gradient is NaN where the loss is."""
    forget = [("flatten", "global_mean"), ("flatten", "local_mean"), ("flatten", "number")]
    labels, indices = torch.tensor([-200, 1, 10, -100]), INDICES.clone()
    indices[0, 1], indices[2, 0] = -1, 99
    cases = [(CrossEntropy(-100), labels)]
    for objective, center in [*forget, ("entropy", "global_mean")]:
        cases.append((LocalEntropy(3, objective, center, 0.5, "indices"), indices))
    for loss, data in cases:
        grad = Z.clone()
        losses = loss.fused(Operands(grad, None, data, "triton"), True)
        assert losses.isnan().tolist() == [True, False, True, False], loss
        assert grad[[0, 2]].isnan().all() and grad[[1, 3]].isfinite().all(), loss

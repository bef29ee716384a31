"""Every message names the argument, what it was and what it must be."""

import pytest
import torch

from palu_kernels import cross_entropy_loss, kl_loss, local_entropy_loss, topk_indices

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
        lambda: local_entropy_loss(Z, Z.double(), top_k=1),
        TypeError,
        "ref_logits has dtype torch.float64; it must have the dtype of logits, torch.float32",
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
        "top_k is 4 and indices holds 3 a row",
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

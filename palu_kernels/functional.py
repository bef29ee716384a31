"""The public operators on logits: they check their arguments, pick the backend and call one
custom op each (`logits_op.py`)."""

from __future__ import annotations

import torch
from torch import Tensor

from palu_kernels import logits_op, sharded_logits
from palu_kernels import validation as arguments
from palu_kernels.backend import Backend, accum_dtype, resolve
from palu_kernels.distributed import dtensor
from palu_kernels.row_loss import KL, CrossEntropy, LocalEntropy, RowLoss, encode
from palu_kernels.sharded_logits import takes_dtensors
from palu_kernels.validation import Center, Direction, Objective, Reduction


@takes_dtensors
def topk_indices(scores: Tensor, k: int, *, backend: Backend = "auto") -> Tensor:
    """Exact indices of the k largest entries of every row.

    Args:
        scores: `[N, V]` or `[B, T, V]`, float32, bfloat16, float16 or float64, any row stride.
        k: at least 1; more than V means V.
        backend: `auto`, `triton` or `torch`.

    Returns:
        int32 `[..., min(k, V)]`, ascending along a row. Ties go to the lowest index; -0.0
        equals +0.0; NaN ranks above +inf.

    Raises:
        TypeError, ValueError: an argument is not as above, or the backend that was asked for
        cannot serve.
    """
    arguments.scores("scores", scores)
    arguments.positive_int("k", k)
    backend = resolve(backend, scores.device, scores.dtype)
    topk = logits_op.topk if dtensor(scores) is None else sharded_logits.topk
    return topk(scores.detach(), k, backend)


@takes_dtensors
def local_entropy_loss(
    logits: Tensor,
    ref_logits: Tensor | None = None,
    *,
    top_k: int,
    indices: Tensor | None = None,
    objective: Objective = "flatten",
    center: Center | float = "global_mean",
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """PALU's forget loss: level the entries of S, the k entries that the chooser ranks highest
    (arXiv 2601.03190).

    `flatten`: `(1/k) * sum_{i in S} (z_i - c)^2`; `entropy`: `log k - H(softmax(z_S))`.

    Args:
        logits: the current model's rows, `[N, V]` or `[B, T, V]`, float32, bfloat16, float16
            (or float64, PyTorch only), any row stride.
        ref_logits: the frozen reference's rows, same shape; its k largest entries are S (ties:
            lowest index first). Of another of these dtypes, the narrower rows are widened.
        top_k: k, at least 1; more than V means V.
        indices: S itself, int32 or int64 `[..., min(k, V)]`, unique and in range along a row,
            any order. At most one of `ref_logits` and `indices` is given; with neither,
            `logits` choose S (no gradient through the choice).
        objective: `flatten` or `entropy`.
        center: for `flatten`, c: `global_mean` (mean of the row, gradient through it),
            `local_mean` (mean over S, likewise) or a number.
        reduction: `mean` over rows (0 without rows), `sum` or `none`.
        backend: `auto`, `triton` or `torch`.

    Returns:
        float32 (float64 for float64 logits): 0-dim, or `[N]` / `[B, T]` with `none`.
        Entries of -inf take no part (k is then the number that do); a NaN in a row spoils that
        row alone.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    arguments.scores("logits", logits)
    arguments.no_transforms(
        "local_entropy_loss", logits=logits, ref_logits=ref_logits, indices=indices
    )
    arguments.positive_int("top_k", top_k)
    arguments.choice("objective", objective, arguments.OBJECTIVES)
    arguments.choice("reduction", reduction, arguments.REDUCTIONS)
    kind, number = arguments.center(center)
    if ref_logits is not None and indices is not None:
        raise ValueError("ref_logits and indices are both given; at most one of them may choose S")
    if ref_logits is not None:
        arguments.reference("ref_logits", ref_logits, logits)
    if indices is not None:
        arguments.indices(indices, top_k, logits, logits.shape[-1])
    source = "reference" if ref_logits is not None else "current" if indices is None else "indices"
    loss = LocalEntropy(top_k, objective, kind, number, source)
    return _loss(loss, logits, ref_logits, indices, reduction, backend)


@takes_dtensors
def kl_loss(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    direction: Direction = "reverse",
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """Kullback-Leibler divergence between the current rows and frozen reference rows, over the
    whole vocabulary.

    Args:
        logits: `[N, V]` or `[B, T, V]`, float32, bfloat16, float16 (or float64, PyTorch
            only), any row stride.
        ref_logits: same shape, any of these dtypes (the narrower rows are widened), no gradient.
        direction: `reverse` is KL(p_current || p_reference), `forward` is KL(p_reference ||
            p_current).
        reduction: `mean` over rows (0 without rows), `sum` or `none`.
        backend: `auto`, `triton` or `torch`.

    Returns:
        float32 (float64 for float64 logits): 0-dim, or `[N]` / `[B, T]` with `none`. A row
        is +inf where the second distribution lacks an entry (-inf) that the first one has; its
        gradient is then not finite. A finite mask near the dtype's minimum, in the second row
        alone, saturates: such a row is +inf or a number near 1e38, as the backend computes it.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    arguments.scores("logits", logits)
    arguments.no_transforms("kl_loss", logits=logits, ref_logits=ref_logits)
    arguments.choice("direction", direction, arguments.DIRECTIONS)
    arguments.choice("reduction", reduction, arguments.REDUCTIONS)
    arguments.reference("ref_logits", ref_logits, logits)
    return _loss(KL(direction), logits, ref_logits, None, reduction, backend)


@takes_dtensors
def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """Cross-entropy against class indices, as `torch.nn.functional.cross_entropy`; rows are not
    shifted.

    Args:
        logits: `[N, V]` or `[B, T, V]`, float32, bfloat16, float16 (or float64, PyTorch
            only), any row stride.
        labels: int64 or int32 `[N]` or `[B, T]`: 0..V-1 or `ignore_index`.
        ignore_index: rows with this label give 0 and no gradient.
        reduction: `mean` over the rows that are not ignored (0 without any, where PyTorch gives
            NaN), `sum` or `none`.
        backend: `auto`, `triton` or `torch`.

    Returns:
        float32 (float64 for float64 logits): 0-dim, or the shape of `labels` with `none`.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    arguments.scores("logits", logits)
    arguments.no_transforms("cross_entropy_loss", logits=logits, labels=labels)
    arguments.choice("reduction", reduction, arguments.REDUCTIONS)
    arguments.integers("labels", labels, list(logits.shape[:-1]), logits)
    arguments.an_int("ignore_index", ignore_index)
    return _loss(CrossEntropy(ignore_index), logits, None, labels, reduction, backend)


def _loss(
    loss: RowLoss,
    logits: Tensor,
    ref_logits: Tensor | None,
    data: Tensor | None,
    reduction: Reduction,
    backend: str,
) -> Tensor:
    """Call the op, in the wider of the two dtypes: S stays exact, and the gradient goes back into
    the dtype of the logits."""
    wide = logits
    if ref_logits is not None:
        dtype = torch.promote_types(logits.dtype, ref_logits.dtype)
        wide, ref_logits = logits.to(dtype), ref_logits.to(dtype)
    backend = resolve(backend, wide.device, wide.dtype)
    if dtensor(logits) is None:
        out = logits_op.logits_loss(wide, ref_logits, data, encode([loss]), reduction, backend)[0]
    else:
        out = sharded_logits.loss(wide, ref_logits, data, loss, reduction, backend)
    return out.to(accum_dtype(logits.dtype))

"""Public losses on hidden rows and an output head: no tensor of all their logits exists, but for
few rows and a head that trains that of their gradient."""

from __future__ import annotations

import math

from torch import Tensor

from palu_kernels import validation as arguments
from palu_kernels.backend import Backend, accum_dtype
from palu_kernels.linear.chunked import CHUNK_BYTES
from palu_kernels.linear.cost_model import IMPLEMENTATIONS, Implementation
from palu_kernels.linear.head import LMHead, check_hidden, prepare, product_dtype, together
from palu_kernels.linear.op import call, settle
from palu_kernels.row_loss import KL, CrossEntropy, LocalEntropy, RowLoss
from palu_kernels.validation import Center, Direction, Objective, Reduction


@together
def linear_local_entropy_loss(
    hidden: Tensor,
    head: LMHead,
    ref_hidden: Tensor | None = None,
    ref_head: LMHead | None = None,
    *,
    top_k: int,
    indices: Tensor | None = None,
    objective: Objective = "flatten",
    center: Center | float = "global_mean",
    reduction: Reduction = "mean",
    implementation: Implementation = "auto",
    chunk_bytes: int = CHUNK_BYTES,
    backend: Backend = "auto",
) -> Tensor:
    """`local_entropy_loss(head.logits(hidden), ref_head.logits(ref_hidden), ...)` without the
    logits.

    Args:
        hidden: `[N, D]` or `[B, T, D]`, what enters the output head, of the head's dtype (under
            autocast any).
        head: bias, logit scale and softcap are part of the loss; gradients reach its weight and
            bias if they require them.
        ref_hidden: the frozen reference's rows, same shape; its logits choose S. Of another dtype
            than `hidden`, all products are in the wider one (under autocast in its own).
        ref_head: the reference's frozen head, of any dtype; None takes `head`, which must not
            train then.
        top_k, indices, objective, center: as in `local_entropy_loss`.
        reduction: `mean` over rows (0 without rows), `sum` or `none`. With `none` and a head that
            trains, backward goes through the chunks once more where there are many rows: more than
            2 D in half precision, D in float32.
        implementation: `sparse` computes only the k logits of S and, for `global_mean`, the
            mean logit by the mean row of the weight; `dense` all of them; `auto` what is
            cheaper by a cost model. Only `dense` can serve `global_mean` under a softcap, and S
            chosen by the current logits.
        chunk_bytes: size of a buffer of logits; a chunk has whole tiles of 64 rows, at least one.
            With a head that trains the gradient of all logits is kept until backward where it is
            no larger than float32 sums of the weight's gradient (`linear/head_gradient.py`).
        backend: `auto`, `triton` or `torch`.

    Returns:
        float32 (float64 for float64): 0-dim, or `[N]` / `[B, T]` with `none`.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_hidden("hidden", hidden, head)
    arguments.positive_int("top_k", top_k)
    arguments.choice("objective", objective, arguments.OBJECTIVES)
    arguments.choice("implementation", implementation, IMPLEMENTATIONS)
    kind, number = arguments.center(center)
    if ref_hidden is not None and indices is not None:
        raise ValueError("ref_hidden and indices are both given; at most one of them may choose S")
    if ref_hidden is None and ref_head is not None:
        raise ValueError("ref_head is given without ref_hidden; it must come with hidden rows")
    if indices is not None:
        arguments.indices(indices, top_k, hidden, head.vocab_size, "hidden")
        indices = indices.reshape(-1, indices.shape[-1])
    select_by = "indices" if indices is not None else "reference"
    if ref_hidden is None and indices is None:
        select_by = "current"
    losses = settle(
        [LocalEntropy(top_k, objective, kind, number, select_by)],
        [math.prod(hidden.shape[:-1])],
        head.weight,
        head.vocab_size,
        head.softcap,
        train_head=head.requires_grad,
        compute=product_dtype(hidden),
        implementation=implementation,
    )
    return _single(
        losses[0], hidden, head, ref_hidden, ref_head, indices, reduction, chunk_bytes, backend
    )


@together
def linear_kl_loss(
    hidden: Tensor,
    head: LMHead,
    ref_hidden: Tensor,
    ref_head: LMHead | None = None,
    *,
    direction: Direction = "reverse",
    reduction: Reduction = "mean",
    chunk_bytes: int = CHUNK_BYTES,
    backend: Backend = "auto",
) -> Tensor:
    """`kl_loss(head.logits(hidden), ref_head.logits(ref_hidden), ...)` without the logits.

    Args:
        hidden, head, ref_hidden, ref_head, reduction, chunk_bytes, backend: as in
            `linear_local_entropy_loss`.
        direction: `reverse` is KL(p_current || p_reference), `forward` is KL(p_reference ||
            p_current).

    Returns:
        float32 (float64 for float64): 0-dim, or `[N]` / `[B, T]` with `none`.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_hidden("hidden", hidden, head)
    arguments.choice("direction", direction, arguments.DIRECTIONS)
    check_hidden("ref_hidden", ref_hidden, ref_head if ref_head is not None else head)
    return _single(
        KL(direction), hidden, head, ref_hidden, ref_head, None, reduction, chunk_bytes, backend
    )


@together
def linear_cross_entropy_loss(
    hidden: Tensor,
    head: LMHead,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    chunk_bytes: int = CHUNK_BYTES,
    backend: Backend = "auto",
) -> Tensor:
    """`cross_entropy_loss(head.logits(hidden), labels, ...)` without the logits; rows are not
    shifted.

    Args:
        hidden, head, reduction, chunk_bytes, backend: as in `linear_local_entropy_loss`.
        labels: int64 or int32 `[N]` or `[B, T]`: 0..V-1 or `ignore_index`.
        ignore_index: rows with this label give 0 and no gradient, and do not count in a mean.

    Returns:
        float32 (float64 for float64): 0-dim, or the shape of `labels` with `none`.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_hidden("hidden", hidden, head)
    arguments.integers("labels", labels, list(hidden.shape[:-1]), hidden, "hidden")
    arguments.an_int("ignore_index", ignore_index)
    labels = labels.reshape(-1)
    loss = CrossEntropy(ignore_index)
    count = (labels != ignore_index).sum()
    return _single(
        loss, hidden, head, None, None, labels, reduction, chunk_bytes, backend, count=count
    )


def _single(
    loss: RowLoss,
    hidden: Tensor,
    head: LMHead,
    ref_hidden: Tensor | None,
    ref_head: LMHead | None,
    data: Tensor | None,
    reduction: Reduction,
    chunk_bytes: int,
    backend: str,
    *,
    count: Tensor | int | None = None,
) -> Tensor:
    """One loss for all rows, reduced; `count` is what a mean divides by (the rows)."""
    arguments.choice("reduction", reduction, arguments.REDUCTIONS)
    if ref_hidden is not None and ref_hidden.shape != hidden.shape[:-1] + ref_hidden.shape[-1:]:
        raise ValueError(
            f"ref_hidden has shape {list(ref_hidden.shape)}; it must have the rows of hidden, "
            f"{list(hidden.shape)}"
        )
    compute = prepare("a linear loss", hidden, head, ref_hidden, ref_head, integers=data)
    arguments.positive_int("chunk_bytes", chunk_bytes)
    shape, rows = hidden.shape[:-1], math.prod(hidden.shape[:-1])
    work, weights = accum_dtype(hidden.dtype), None
    if reduction != "none":
        weights = hidden.new_ones(1, dtype=work)
        if reduction == "mean":
            count = rows if count is None else count
            weights /= count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
    out, _ = call(
        hidden.reshape(-1, hidden.shape[-1]),
        head,
        None,
        [rows],
        [loss],
        weights,
        None if ref_hidden is None else ref_hidden.reshape(-1, ref_hidden.shape[-1]),
        ref_head,
        [data],
        compute=compute,
        chunk_bytes=chunk_bytes,
        backend=backend,
    )
    return out.to(work).reshape(shape) if reduction == "none" else out.to(work)

"""The public operators on hidden rows and an output head: no tensor of all their logits exists
(``linear.py``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from palu_kernels import reference
from palu_kernels import validation as arguments
from palu_kernels.backend import resolve
from palu_kernels.linear import sparse
from palu_kernels.linear.head import LMHead, check_hidden
from palu_kernels.linear.op import linear
from palu_kernels.row_loss import (
    KL,
    CrossEntropy,
    LocalEntropy,
    RowLoss,
    SparseLocalEntropy,
    encode,
)

CHUNK_BYTES = 256 * 2**20


class Part(NamedTuple):
    """Consecutive rows that share one loss: how many, and the integers the loss reads (labels
    ``[rows]``, indices ``[rows, k]``)."""

    loss: RowLoss
    rows: int
    data: Tensor | None = None


def linear_local_entropy_loss(
    hidden: Tensor,
    head: LMHead,
    ref_hidden: Tensor | None = None,
    ref_head: LMHead | None = None,
    *,
    top_k: int,
    indices: Tensor | None = None,
    objective: str = "flatten",
    center: str | float = "global_mean",
    reduction: str = "mean",
    implementation: str = "auto",
    chunk_bytes: int = CHUNK_BYTES,
    backend: str = "auto",
) -> Tensor:
    """``local_entropy_loss(head.logits(hidden), ref_head.logits(ref_hidden), ...)`` without the
    logits.

    Args:
        hidden: ``[N, D]`` or ``[B, T, D]``, what enters the output head, of the head's dtype (under
            autocast any).
        head: bias, logit scale and softcap are part of the loss; gradients reach its weight and
            bias if they require them.
        ref_hidden: the frozen reference's rows, same shape; its logits choose S. Of another dtype
            than ``hidden``, all products are in the wider one (under autocast in its own).
        ref_head: the reference's frozen head, of any dtype; None takes ``head``, which must not
            train then.
        top_k, indices, objective, center: as in ``local_entropy_loss``.
        reduction: ``mean`` over rows (0 without rows), ``sum`` or ``none``. With ``none`` and a
            head that trains, backward goes through the chunks once more.
        implementation: ``sparse`` computes only the k logits of S and, for ``global_mean``, the
            mean logit by the mean row of the weight; ``dense`` all of them; ``auto`` what is
            cheaper by a cost model. Only ``dense`` can serve ``global_mean`` under a softcap, and S
            chosen by the current logits.
        chunk_bytes: size of a buffer of logits; a chunk has whole tiles of 64 rows, at least one.
        backend: ``auto``, ``triton`` or ``torch``.

    Returns:
        float32 (float64 for float64): 0-dim, or ``[N]`` / ``[B, T]`` with ``none``.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_hidden("hidden", hidden, head)
    arguments.positive_int("top_k", top_k)
    arguments.choice("objective", objective, arguments.OBJECTIVES)
    arguments.choice("implementation", implementation, sparse.IMPLEMENTATIONS)
    kind, number = arguments.center(center)
    if ref_hidden is not None and indices is not None:
        raise ValueError("ref_hidden and indices are both given; at most one of them may choose S")
    if ref_hidden is None and ref_head is not None:
        raise ValueError("ref_head is given without ref_hidden; it must come with hidden rows")
    if indices is not None:
        arguments.indices(indices, top_k, hidden, head.vocab_size, "hidden")
        indices = indices.reshape(-1, indices.shape[-1])
    chooser = "indices" if indices is not None else "reference"
    if ref_hidden is None and indices is None:
        chooser = "current"
    loss = forget_loss(
        hidden, head, top_k, objective, kind, number, chooser, implementation=implementation
    )
    return _single(
        loss, hidden, head, ref_hidden, ref_head, indices, reduction, chunk_bytes, backend
    )


def forget_loss(
    hidden: Tensor,
    head: LMHead,
    top_k: int,
    objective: str,
    center_kind: str,
    center_value: float,
    chooser: str,
    *,
    implementation: str = "auto",
) -> RowLoss:
    """The forget loss of the rows ``hidden``, dense or sparse.

    Raises:
        ValueError: sparse is asked for where only dense is right.
    """
    if chooser == "current":
        if implementation == "sparse":
            raise ValueError(
                "implementation is 'sparse' and neither ref_hidden nor indices is given; it must "
                "be 'dense' (or 'auto') where the current logits choose S"
            )
        return LocalEntropy(top_k, objective, center_kind, center_value, chooser)
    is_sparse = sparse.choose(
        implementation,
        objective,
        center_kind,
        head.softcap,
        rows=math.prod(hidden.shape[:-1]),
        k=min(top_k, head.vocab_size),
        vocab_size=head.vocab_size,
        hidden_size=head.hidden_size,
        device_type=hidden.device.type,
        dtype=_product_dtype(hidden),
        train_head=head.requires_grad,
    )
    kind = SparseLocalEntropy if is_sparse else LocalEntropy
    return kind(top_k, objective, center_kind, center_value, chooser)


def linear_kl_loss(
    hidden: Tensor,
    head: LMHead,
    ref_hidden: Tensor,
    ref_head: LMHead | None = None,
    *,
    direction: str = "reverse",
    reduction: str = "mean",
    chunk_bytes: int = CHUNK_BYTES,
    backend: str = "auto",
) -> Tensor:
    """``kl_loss(head.logits(hidden), ref_head.logits(ref_hidden), ...)`` without the logits.

    Args:
        hidden, head, ref_hidden, ref_head, reduction, chunk_bytes, backend: as in
            ``linear_local_entropy_loss``.
        direction: ``reverse`` is KL(p_current || p_reference), ``forward`` is KL(p_reference ||
            p_current).

    Returns:
        float32 (float64 for float64): 0-dim, or ``[N]`` / ``[B, T]`` with ``none``.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_hidden("hidden", hidden, head)
    arguments.choice("direction", direction, arguments.DIRECTIONS)
    check_hidden("ref_hidden", ref_hidden, ref_head if ref_head is not None else head)
    return _single(
        KL(direction), hidden, head, ref_hidden, ref_head, None, reduction, chunk_bytes, backend
    )


def linear_cross_entropy_loss(
    hidden: Tensor,
    head: LMHead,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_bytes: int = CHUNK_BYTES,
    backend: str = "auto",
) -> Tensor:
    """``cross_entropy_loss(head.logits(hidden), labels, ...)`` without the logits; rows are not
    shifted.

    Args:
        hidden, head, reduction, chunk_bytes, backend: as in ``linear_local_entropy_loss``.
        labels: int64 or int32 ``[N]`` or ``[B, T]``: 0..V-1 or ``ignore_index``.
        ignore_index: rows with this label give 0 and no gradient, and do not count in a mean.

    Returns:
        float32 (float64 for float64): 0-dim, or the shape of ``labels`` with ``none``.

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
    reduction: str,
    chunk_bytes: int,
    backend: str,
    *,
    count: Tensor | int | None = None,
) -> Tensor:
    """One loss for all rows, reduced; ``count`` is what a mean divides by (the rows)."""
    arguments.choice("reduction", reduction, arguments.REDUCTIONS)
    if ref_hidden is not None and ref_hidden.shape != hidden.shape[:-1] + ref_hidden.shape[-1:]:
        raise ValueError(
            f"ref_hidden has shape {list(ref_hidden.shape)}; it must have the rows of hidden, "
            f"{list(hidden.shape)}"
        )
    shape = hidden.shape[:-1]
    hidden = hidden.reshape(-1, hidden.shape[-1])
    rows = hidden.shape[0]
    weights = None
    if reduction != "none":
        work = reference.work_dtype(hidden.dtype)
        weights = hidden.new_ones(rows, dtype=work)
        if reduction == "mean":
            count = rows if count is None else count
            weights /= count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
    total, losses = linear_losses(
        hidden,
        head,
        [Part(loss, rows, data)],
        ref_hidden=None if ref_hidden is None else ref_hidden.reshape(-1, ref_hidden.shape[-1]),
        ref_head=ref_head,
        row_weights=weights,
        chunk_bytes=chunk_bytes,
        backend=backend,
    )
    return losses.reshape(shape) if reduction == "none" else total


def linear_losses(
    hidden: Tensor,
    head: LMHead,
    parts: Sequence[Part],
    *,
    ref_hidden: Tensor | None = None,
    ref_head: LMHead | None = None,
    row_weights: Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rows with different losses in one pass over the head, with one gradient of it.

    Args:
        hidden: ``[R, D]``, the rows of all parts one after the other.
        head: as in ``linear_local_entropy_loss``.
        parts: the loss of each stretch of rows (``row_losses.py``).
        ref_hidden: the frozen reference's rows of the parts whose loss needs them, in their order.
        ref_head: the reference's head; None takes ``head``.
        row_weights: ``[R]``, what each row's loss is worth in the sum, no gradient; float32
            (float64 for float64).

    Returns:
        (sum of ``row_weights`` times losses, losses ``[R]``), float32 (float64 for float64). With
        row weights the sum alone is differentiable, without them the losses alone are.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_hidden("hidden", hidden, head)
    no_transforms("a linear loss", hidden, head, ref_hidden, ref_head)
    for part in parts:
        arguments.no_transforms("a linear loss", integers=part.data)
    arguments.positive_int("chunk_bytes", chunk_bytes)
    if ref_hidden is not None:
        check_hidden("ref_hidden", ref_hidden, head if ref_head is None else ref_head)
        _frozen("ref_hidden", ref_hidden, hidden)
        frozen_head(head, ref_head)
    elif any(part.loss.needs_reference for part in parts):
        raise ValueError("ref_hidden is None; it must be the reference's hidden rows")
    grad = torch.is_grad_enabled()
    want = [grad and t is not None and t.requires_grad for t in (hidden, head.weight, head.bias)]
    total, losses, *_ = linear_outputs(
        hidden, head, parts, ref_hidden, ref_head, row_weights, want, chunk_bytes, backend
    )
    work = reference.work_dtype(hidden.dtype)
    return total.to(work), losses.to(work)


def linear_outputs(
    hidden: Tensor,
    head: LMHead,
    parts: Sequence[Part],
    ref_hidden: Tensor | None,
    ref_head: LMHead | None,
    row_weights: Tensor | None,
    want: list[bool],
    chunk_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All that the custom op gives: the pair of ``linear_losses``, and the gradients that ``want``
    asks for (hidden, weight, bias) as ``linear_op.linear_backward`` takes them."""
    compute = compute_dtype(hidden, head, ref_hidden, ref_head)
    served_by = resolve(backend, hidden.device, compute)
    mean: tuple[Tensor | None, Tensor | None] = (None, None)
    if any(part.loss.needs_mean for part in parts) and not torch.compiler.is_compiling():
        mean = (None, None) if hidden.is_meta else head.mean_row()
    frozen = [ref_hidden, None, None, *mean]
    if ref_head is not None:
        frozen[1:3] = ref_head.weight, ref_head.bias
    frozen += [part.data for part in parts]
    scales = [float(head.logit_scale), float(head.softcap or 0), 1.0, 0.0]
    if ref_head is not None:
        scales[2:] = float(ref_head.logit_scale), float(ref_head.softcap or 0)
    return linear(
        hidden,
        head.weight,
        head.bias,
        row_weights,
        [hidden.new_empty(0) if t is None else t.detach() for t in frozen],
        [part.rows for part in parts],
        want,
        "\n".join([encode(part.loss) for part in parts]),
        scales,
        compute,
        chunk_bytes,
        served_by,
    )


def no_transforms(
    name: str,
    hidden: Tensor,
    head: LMHead,
    ref_hidden: Tensor | None,
    ref_head: LMHead | None,
    **more: Tensor | None,
) -> None:
    heads = {
        f"{kind}.{part}": getattr(own, part)
        for kind, own in (("head", head), ("ref_head", ref_head))
        if own is not None
        for part in ("weight", "bias")
    }
    arguments.no_transforms(name, hidden=hidden, ref_hidden=ref_hidden, **heads, **more)


def _frozen(name: str, value: Tensor, hidden: Tensor) -> None:
    if value.requires_grad:
        raise ValueError(
            f"{name} requires grad; it must be frozen (no gradient reaches it): compute it under "
            "torch.no_grad() or pass .detach()"
        )
    arguments.same_device(name, value, hidden, "hidden")


def frozen_head(head: LMHead, ref_head: LMHead | None) -> None:
    if ref_head is None:
        if head.requires_grad:
            raise ValueError(
                "ref_head is None and head requires grad; it must be the reference's own head, "
                "which stays as it was while head trains (head.detach() if this one is meant)"
            )
        return
    if ref_head.requires_grad:
        raise ValueError("ref_head requires grad; it must be frozen (pass ref_head.detach())")
    if ref_head.vocab_size != head.vocab_size:
        raise ValueError(
            f"ref_head has {ref_head.vocab_size} rows of weight; it must have those of head, "
            f"{head.vocab_size}"
        )


def compute_dtype(
    hidden: Tensor, head: LMHead, ref_hidden: Tensor | None, ref_head: LMHead | None
) -> torch.dtype:
    """The dtype of the products: autocast's, as for ``F.linear``, else the widest of all four."""
    if _autocasts(hidden):
        return _product_dtype(hidden)
    if head.weight.dtype != hidden.dtype:
        raise TypeError(
            f"head.weight has dtype {head.weight.dtype}; it must have the dtype of hidden, "
            f"{hidden.dtype} (or run under torch.autocast)"
        )
    compute = hidden.dtype
    for t in (ref_hidden, None if ref_head is None else ref_head.weight):
        compute = compute if t is None else torch.promote_types(compute, t.dtype)
    return compute


def _product_dtype(hidden: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(hidden.device.type) if _autocasts(hidden) else hidden.dtype


def _autocasts(hidden: Tensor) -> bool:
    if hidden.is_meta or hidden.dtype == torch.float64:  # autocast knows no meta device
        return False
    return torch.is_autocast_enabled(hidden.device.type)

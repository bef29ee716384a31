"""The one custom op for losses on hidden rows: one node under `torch.compile`.

Gradients of the hidden rows are made in forward and scaled in backward; the head's gradient is made
in backward from the logits' where those are kept, else summed in forward (`head_gradient.py`). With
`weights` the differentiable output is the weighted sum of the losses. Without, it is the losses by
row: what each is worth is then known in backward only, where the head's gradient takes the chunks
again if the logits' was not kept.

Which rows have which loss: all rows have the one loss (`rows` is None); or `counts` says how many
rows each loss has, and `rows` `[sum(counts)]` which ones, loss by loss; or `counts` is empty and
`rows` are the roles of all rows, which are looked up in here, so that shapes do not depend on them
(`torch.compile`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palu_kernels import distributed, row_loss, validation
from palu_kernels.backend import accum_dtype, check_values, moved, resolve
from palu_kernels.distributed import agree_on_call
from palu_kernels.linear import sparse
from palu_kernels.linear.chunked import (
    CHUNK_BYTES,
    Head,
    LoopInputs,
    apart,
    buffer,
    padded,
    parts_of,
    run,
)
from palu_kernels.linear.cost_model import choose
from palu_kernels.linear.head import LMHead, prepare, together
from palu_kernels.linear.head_gradient import (
    HeadGradAccumulator,
    bias_gradient,
    is_kept,
    largest,
    scaled,
    weight_gradient,
)
from palu_kernels.logits_op import refuse_higher_order
from palu_kernels.row_loss import LocalEntropy, RowLoss


@together
def linear_role_losses(
    hidden: Tensor,
    head: LMHead,
    roles: Tensor,
    losses: Sequence[RowLoss],
    weights: Tensor,
    *,
    ref_hidden: Tensor | None = None,
    ref_head: LMHead | None = None,
    data: Sequence[Tensor | None] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return what `role_losses` does, from what enters the output head.

    Args:
        hidden: `[B, T, D]`.
        head: as in `linear_local_entropy_loss`; all losses share one pass over it, and one gradient
            of it.
        roles: `[B, T]` integers, on the device of `hidden` or on the host, where looking them up
            waits for no device.
        losses: `LocalEntropy` is computed dense or sparse, as is cheaper.
        weights: `[n]`, of the losses in the total; float32 (float64 for float64).
        ref_hidden: the frozen reference's rows of `hidden`, `[B, T, D]`; or, of the losses that
            need it alone, `[r, D]`, loss by loss.
        ref_head: the reference's head; None takes `head`, which must not train then.
        data: the integers of each loss (indices, labels), `[B, T, ...]` or by row of that loss; or
            None.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    data, integers = [None] * len(losses) if data is None else data, {}
    for i, (loss, values) in enumerate(zip(losses, data, strict=True)):
        if loss.needs_reference and ref_hidden is None:
            raise ValueError("ref_hidden is None; it must be the reference's hidden rows")
        integers[f"data[{i}]"] = values
    compute = prepare("a loss by roles", hidden, head, ref_hidden, ref_head, **integers)
    rows, counts = roles, []
    if not torch.compiler.is_compiling() and not hidden.is_meta:
        flat, vocab_size = hidden.detach().flatten(0, 1), head.vocab_size
        rows, counts, ref_hidden, data = pick(roles, losses, flat, vocab_size, ref_hidden, data)
        options = {"train_head": head.requires_grad, "compute": compute}
        losses = settle(losses, counts, head.weight, vocab_size, head.softcap, **options)
    total, sums = call(
        hidden.flatten(0, 1),
        head,
        rows,
        counts,
        losses,
        weights,
        ref_hidden,
        ref_head,
        data,
        compute=compute,
        chunk_bytes=chunk_bytes,
        backend=backend,
    )
    work = accum_dtype(hidden.dtype)
    return total.to(work), sums.to(work)


class Picked(NamedTuple):
    """Rows that have a loss, loss by loss, and what belongs to them."""

    order: Tensor  # [R], of the flat rows
    counts: list[int]
    ref_hidden: Tensor | None  # [r, D], of the losses that need the reference
    data: list[Tensor | None]


def call(
    hidden: Tensor,
    head: LMHead,
    rows: Tensor | None,
    counts: list[int],
    losses: Sequence[RowLoss],
    weights: Tensor | None,
    ref_hidden: Tensor | None,
    ref_head: LMHead | None,
    data: Sequence[Tensor | None],
    *,
    compute: torch.dtype,
    chunk_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the losses (or the losses by row), and the sum of each loss.

    Args:
        hidden: `[N, D]`.
        rows, counts: see above.
        losses: which of `LocalEntropy` are sparse is settled, unless `rows` are roles.
        weights: `[n]`, of the losses in the sum; None for the losses by row.
        ref_hidden: `[r, D]`; with roles also `[N, D]`.
        data: the integers of each loss, by row of it; with roles also by row of `hidden`.
        compute: dtype of the products.
    """
    grad = torch.is_grad_enabled()
    want = [grad and t is not None and t.requires_grad for t in (hidden, head.weight, head.bias)]
    eager = not torch.compiler.is_compiling() and not hidden.is_meta
    mean: tuple[Tensor | None, Tensor | None] = (None, None)
    cast: tuple[Tensor | None, Tensor | None] = (None, None)
    if eager:
        needs_mean, needs_whole = _needs(losses)
        mean = head.mean_row() if needs_mean else mean
        cast = head.cast(compute) if needs_whole and not any(want[1:]) else cast
    scales = [float(head.logit_scale), float(head.softcap or 0), 1.0, 0.0]
    frozen = [ref_hidden, None, None, *mean, *cast, *data]
    vocabulary = head.vocabulary
    if ref_head is not None and ref_hidden is not None:
        made = ref_head.cast(compute) if eager else (ref_head.weight, ref_head.bias)
        if vocabulary is not None and ref_head.vocabulary is None:
            made = tuple(None if t is None else vocabulary.of_rank(t) for t in made)
        frozen[1:3] = made
        scales[2:] = float(ref_head.logit_scale), float(ref_head.softcap or 0)
    # how many rows have a role is not known yet where roles are looked up inside
    known = rows is None or bool(counts)
    picked = hidden.shape[0] if rows is None else rows.shape[0]
    width = hidden.shape[1]
    keep = known and want[1] and is_kept(picked, head.most_rows, width, compute.itemsize)
    encoded = row_loss.encode(losses)
    backend = resolve(backend, hidden.device, compute)
    if vocabulary is not None:
        facts = {
            "losses": encoded,
            "rows of the losses": counts,
            "shape of hidden": list(hidden.shape),
            "gradients wanted": want,
            "reduction": "none" if weights is None else "summed",
            "reference": [None if t is None else list(t.shape) for t in (ref_hidden, frozen[0])],
            "scales": scales,
            "dtype of the products": str(compute),
            "chunk_bytes": chunk_bytes,
            "backend": backend,
        }
        agree_on_call(vocabulary, facts, hidden, hidden.device, [rows, *data])
    out, sums, *_ = linear_loss(
        hidden,
        head.weight,
        head.bias,
        rows,
        weights,
        [hidden.new_empty(0) if t is None else t.detach() for t in frozen],
        counts,
        want,
        keep,
        encoded,
        scales,
        compute,
        chunk_bytes,
        backend,
        "" if vocabulary is None else vocabulary.encode(),
    )
    return out, sums


def pick(
    roles: Tensor,
    losses: Sequence[RowLoss],
    hidden: Tensor,
    vocab_size: int,
    ref_hidden: Tensor | None,
    data: Sequence[Tensor | None],
) -> Picked:
    """Look up the rows whose role is i + 1 for loss i; roles may stay on the host.

    Raises:
        TypeError, ValueError: `ref_hidden` or `data` have other rows than the losses.
    """
    flat = roles.flatten()
    order, counts, own_data, refs = [], [], [], []
    for number, (loss, values) in enumerate(zip(losses, data, strict=True), 1):
        rows_of_loss = moved((flat == number).nonzero()[:, 0], hidden.device)
        # indices by row, [rows, k], may have the shape of roles
        by_row = 2 if isinstance(loss, LocalEntropy) else 1
        given_by_place = values is not None and values.dim() > by_row
        if given_by_place and values.shape[: roles.dim()] == roles.shape:
            values = values.flatten(0, roles.dim() - 1)[rows_of_loss]
        if values is not None and isinstance(loss, LocalEntropy):
            names = "the forget rows", "ref_indices"
            validation.indices(values, loss.top_k, hidden[: len(rows_of_loss)], vocab_size, *names)
        order.append(rows_of_loss)
        counts.append(len(rows_of_loss))
        own_data.append(values)
        if loss.needs_reference:
            refs.append(rows_of_loss)
    if not refs:
        ref_hidden = None
    elif ref_hidden is not None:
        needed = sum(map(len, refs))
        if ref_hidden.dim() == 3:
            ref_hidden = ref_hidden.flatten(0, 1).index_select(0, torch.cat(refs))
        elif len(ref_hidden) != needed:
            raise ValueError(
                f"ref_hidden has {len(ref_hidden)} rows; it must be [B, T, D], or have the "
                f"{needed} preserve rows"
            )
    return Picked(torch.cat(order), counts, ref_hidden, own_data)


def settle(
    losses: Sequence[RowLoss],
    counts: Sequence[int],
    weight: Tensor,
    vocab_size: int,
    softcap: float | None,
    *,
    train_head: bool,
    compute: torch.dtype,
    implementation: str = "auto",
) -> list[RowLoss]:
    """Make each `LocalEntropy` sparse where that is asked for or cheaper (of the whole head, where
    `weight` is a rank's part of it: all ranks go one way).

    Raises:
        ValueError: sparse is asked for where only dense is right.
    """

    settled = []
    for loss, rows in zip(losses, counts, strict=True):
        current = isinstance(loss, LocalEntropy) and loss.select_by == "current"
        if current and implementation == "sparse":
            raise ValueError(
                "implementation is 'sparse' and neither ref_hidden nor indices is given; it "
                "must be 'dense' (or 'auto') where the current logits choose S"
            )
        if isinstance(loss, LocalEntropy) and not current:
            is_sparse = choose(
                implementation,
                loss.objective,
                loss.center_kind,
                softcap,
                rows=rows,
                k=min(loss.top_k, vocab_size),
                vocab_size=vocab_size,
                hidden_size=weight.shape[1],
                device_type=weight.device.type,
                dtype=compute,
                train_head=train_head,
            )
            loss = replace(loss, sparse=True) if is_sparse else loss
        settled.append(loss)
    return settled


@torch.library.custom_op("palu_kernels::linear_loss", mutates_args=())
def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    weights: Tensor | None,
    frozen: list[Tensor],
    counts: list[int],
    want: list[bool],
    keep: bool,
    losses: str,
    scales: list[float],
    compute: torch.dtype,
    chunk_bytes: int,
    backend: str,
    vocabulary: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return `call`'s pair, then what backward needs: weights of the rows, the gradient of hidden
    rows, that of the logits where `keep`, else the sums of weight and bias.

    `frozen`: the reference's hidden rows, weight and bias, the mean over the head's rows and of its
    bias, the head in the dtype of the products, and every loss's integers; what is absent is empty.
    `losses`: encoded, a line each.
    `scales`: logit scale and softcap of the head and of the reference's, 0 for no softcap.
    `vocabulary`: of which the weight holds a part, encoded; empty where it is whole.
    """
    options = losses, scales, compute, chunk_bytes, backend, vocabulary, any(want[1:])
    given, order = _rows(hidden, weight, bias, rows, frozen, counts, *options)
    by_row = kept = sums = None
    if weights is not None:
        shares = zip(weights, given.parts, strict=True)
        by_row = torch.cat([w.expand(part.stop - part.start) for w, part in shares])
    if keep:
        kept = buffer(given.hidden, len(given.hidden), len(weight))
    elif by_row is not None and any(want[1:]):
        sums = HeadGradAccumulator(given.head, given.hidden, by_row, *want[1:])
    view = None if kept is None else kept[:, : len(weight)]
    by_loss, grad_hidden = run(given, want[0], view, sums)
    sum_by_loss = torch.stack([by_loss[part.start : part.stop].sum() for part in given.parts])
    of_head = [grad_hidden.new_empty(0) if kept is None else kept]
    of_head += [by_loss.new_empty(0) for _ in range(2)] if sums is None else sums.results()
    if by_row is None:
        return by_loss, sum_by_loss, by_loss.new_empty(0), grad_hidden, *of_head
    total = (by_row * by_loss).sum()
    if rows is not None and not counts:  # shapes may not depend on the roles
        by_row = _spread(by_row, order, len(hidden))
        grad_hidden = _spread(grad_hidden, order, len(hidden)) if want[0] else grad_hidden
    return total, sum_by_loss, by_row, grad_hidden, *of_head


def _spread(values: Tensor, order: Tensor, rows: int) -> Tensor:
    """`[R, ...]` at the rows `order`, zeros elsewhere."""
    return values.new_zeros(rows, *values.shape[1:]).index_copy_(0, order, values)


def _needs(losses: Sequence[RowLoss]) -> tuple[bool, bool]:
    """Whether they need the head's mean row, and whether products with the whole head are made, or
    may be with that of the reference."""
    mean = whole = False
    for loss in losses:
        mean = mean or loss.needs_mean
        whole = whole or not loss.sparse or loss.needs_reference
    return mean, whole


def _rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    frozen: list[Tensor],
    counts: list[int],
    losses: str,
    scales: list[float],
    compute: torch.dtype,
    chunk_bytes: int,
    backend: str,
    vocabulary: str,
    train_head: bool,
) -> tuple[LoopInputs, Tensor | None]:
    """Return what the chunk loop takes, in the dtype of the products, and the rows' order."""
    hidden, weight = hidden.detach(), weight.detach()
    bias = None if bias is None else bias.detach()
    present = [None if t.numel() == 0 else t for t in frozen]
    ref_hidden, ref_weight, ref_bias, mean_weight, mean_bias, cast_weight, cast_bias, *data = (
        present
    )
    scale, softcap, ref_scale, ref_softcap = scales
    decoded = row_loss.decode(losses)
    sharded = distributed.decode(vocabulary)
    vocab_size = len(weight) if sharded is None else sharded.size
    order = rows
    if rows is None:
        counts = [len(hidden)]
    elif not counts:
        order, counts, ref_hidden, data = pick(rows, decoded, hidden, vocab_size, ref_hidden, data)
        options = {"train_head": train_head, "compute": compute}
        decoded = settle(decoded, counts, weight, vocab_size, softcap or None, **options)
    for loss, values in zip(decoded, data, strict=True):
        if values is not None and check_values(values.device):
            loss.check_values(values, vocab_size)
    mean = None if mean_weight is None else (mean_weight, mean_bias)
    needs_mean, needs_whole = _needs(decoded)
    if mean is None and needs_mean:
        mean = sparse.mean_of_sums(sparse.sums_of_rows(weight, bias), sharded)

    head = own_head = Head(weight, bias, scale, softcap or None)
    if cast_weight is not None:
        head = replace(head, weight=cast_weight, bias=cast_bias)
    elif needs_whole:
        head = head.to(compute)
    ref_head = head
    if ref_hidden is not None:
        ref_hidden = apart(ref_hidden.to(compute))
        if ref_weight is not None:
            ref_head = Head(ref_weight, ref_bias, ref_scale, ref_softcap or None).to(compute)
    picked = hidden if order is None else hidden.index_select(0, order)
    given = LoopInputs(
        apart(picked.to(compute)),
        head,
        own_head,
        ref_head,
        parts_of(decoded, counts, data, ref_hidden),
        mean,
        chunk_bytes,
        backend,
        sharded,
    )
    return given, order


@linear_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    weights: Tensor | None,
    frozen: list[Tensor],
    counts: list[int],
    want: list[bool],
    keep: bool,
    losses: str,
    scales: list[float],
    compute: torch.dtype,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    work, weighted = accum_dtype(compute), weights is not None
    picked = rows.shape[0] if rows is not None and counts else hidden.shape[0]
    columns, width = weight.shape
    summed = weighted and not keep
    return (
        hidden.new_empty(() if weighted else picked, dtype=work),
        hidden.new_empty(losses.count("\n") + 1, dtype=work),
        weights.new_empty(picked) if weighted else hidden.new_empty(0, dtype=work),
        hidden.new_empty((picked, width) if want[0] else 0, dtype=compute),
        hidden.new_empty((picked, padded(columns)) if keep else 0, dtype=compute),
        weight.new_empty((columns, width) if want[1] and summed else 0, dtype=work),
        weight.new_empty(columns if want[2] and summed else 0, dtype=work),
    )


@torch.library.custom_op("palu_kernels::linear_loss_backward", mutates_args=())
def linear_loss_backward(
    grad: Tensor,
    by_row: Tensor,
    made: list[Tensor],
    rows: Tensor | None,
    inputs: list[Tensor],
    frozen: list[Tensor],
    counts: list[int],
    want: list[bool],
    keep: bool,
    losses: str,
    scales: list[float],
    compute: torch.dtype,
    chunk_bytes: int,
    backend: str,
    vocabulary: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias, empty where not wanted.

    `grad`: of the weighted sum (0-dim), or of the losses `[R]`. `made`: the gradients and sums that
    forward made. `inputs`: hidden, weight and bias (if there is one), so that a second derivative
    is refused, and not taken for 0.
    """
    grad_hidden, kept, grad_weight, grad_bias = made
    hidden, weight, *bias = inputs
    weights = grad if grad.dim() else grad * by_row
    if keep:
        picked = hidden if rows is None else hidden.index_select(0, rows)
        of_head = kept[:, : len(weight)], picked.to(compute), weights * scales[0]
        if want[1]:
            grad_weight = weight_gradient(*of_head, weight.dtype)
        if want[2]:
            grad_bias = bias_gradient(of_head[0], of_head[2])
    elif any(want[1:]):
        if grad.dim():
            options = losses, scales, compute, chunk_bytes, backend, vocabulary, True
            given, _ = _rows(hidden, weight, *(bias or [None]), rows, frozen, counts, *options)
            sums = HeadGradAccumulator(given.head, given.hidden, grad, *want[1:])
            run(given, False, sums=sums)
            factor = largest(grad)
            grad_weight, grad_bias = (t.mul_(factor) for t in sums.results())
        else:
            factor = grad * largest(by_row)
            grad_weight = scaled(grad_weight, factor, weight.dtype) if want[1] else grad_weight
            grad_bias = grad_bias * factor
    if want[0]:
        grad_hidden = (grad_hidden * weights[:, None]).to(hidden.dtype)  # in float32: weights are
        if rows is not None and counts:
            grad_hidden = _spread(grad_hidden, rows, len(hidden))
    grads = grad_hidden, grad_weight, grad_bias
    dtypes = hidden.dtype, weight.dtype, weight.dtype
    wanted = zip(grads, dtypes, want, strict=True)
    return tuple([t.to(dtype) if w else t.new_empty(0, dtype=dtype) for t, dtype, w in wanted])


@linear_loss_backward.register_fake
def _(
    grad: Tensor,
    by_row: Tensor,
    made: list[Tensor],
    rows: Tensor | None,
    inputs: list[Tensor],
    frozen: list[Tensor],
    counts: list[int],
    want: list[bool],
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = inputs[:2]
    return (
        hidden.new_empty(hidden.shape if want[0] else 0),
        weight.new_empty(weight.shape if want[1] else 0),
        weight.new_empty(weight.shape[0] if want[2] else 0),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, bias, rows, weights, frozen, *plain = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    want, keep = plain[1:3]
    again = weights is None and any(want[1:]) and not keep
    given = (hidden, weight) if bias is None else (hidden, weight, bias)
    # roles are looked up in forward only: its gradients are those of the batch
    order = rows if rows is not None and plain[0] else None
    ctx.inputs, ctx.frozen, ctx.plain = len(given), len(frozen), plain
    ctx.save_for_backward(*output[2:], order, *given, *(frozen if again else ()))


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    grads: list[Tensor | None] = [None, None, None]
    if grad is not None:
        by_row, *saved = ctx.saved_tensors  # once: a look unpacks them all, checkpoint allows one
        made, order, rest = saved[:4], saved[4], saved[5:]
        inputs, frozen = rest[: ctx.inputs], rest[ctx.inputs :]
        result = linear_loss_backward(grad, by_row, made, order, inputs, frozen, *ctx.plain)
        grads = [g if wanted else None for g, wanted in zip(result, ctx.plain[1], strict=True)]
    counts = None if ctx.plain[0] else []  # an empty list might hold tensors, for autograd
    return (*grads, None, None, [None] * ctx.frozen, counts, *(None,) * (len(ctx.plain) - 1))


linear_loss.register_autograd(_backward, setup_context=_setup_context)
refuse_higher_order("a linear loss", linear_loss, linear_loss_backward)

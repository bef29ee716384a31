"""The chunk loop as a ``torch.library`` custom op: one node under ``torch.compile``, its gradients
made in forward and scaled out of place in backward.

With ``row_weights`` the differentiable output is their weighted sum of the losses. Without, it is
the losses themselves: what each row is worth is then known in backward only, where the hidden rows'
saved gradients are scaled by row and the head's gradient takes the chunks again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from palu_kernels import reference
from palu_kernels import row_loss as row_losses
from palu_kernels import validation as arguments
from palu_kernels.backend import check_values
from palu_kernels.linear import sparse
from palu_kernels.linear.chunked import Head, Rows, apart, blocks, parts_of, run
from palu_kernels.op_autograd import refuse_higher_order
from palu_kernels.row_loss import CrossEntropy, SparseLocalEntropy


@torch.library.custom_op("palu_kernels::linear", mutates_args=())
def linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_weights: Tensor | None,
    frozen: list[Tensor],
    counts: list[int],
    want: list[bool],
    losses: str,
    scales: list[float],
    compute: torch.dtype,
    chunk_bytes: int,
    served_by: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``frozen``: the reference's hidden rows, weight and bias, the mean over the head's rows and
    of its bias, and every part's integers; what is absent is empty. ``want``: the gradients of
    hidden, weight and bias. ``losses``: the parts', encoded, a line each. ``scales``: logit scale
    and softcap of the head and of the reference's, 0 for no softcap."""
    options = losses, scales, compute, chunk_bytes, served_by
    rows = _rows(hidden, weight, bias, frozen, counts, *options)
    weighted = row_weights is not None
    want_hidden, want_weight, want_bias = want
    found, *grads = run(
        rows, row_weights, want_hidden, want_weight and weighted, want_bias and weighted
    )
    total = (row_weights * found).sum() if weighted else found.new_zeros(())
    return total, found, *grads


def _rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    frozen: list[Tensor],
    counts: list[int],
    losses: str,
    scales: list[float],
    compute: torch.dtype,
    chunk_bytes: int,
    served_by: str,
) -> Rows:
    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().to(compute)

    given = [None if t.numel() == 0 else t for t in frozen]
    ref_hidden, ref_weight, ref_bias, mean_weight, mean_bias, *data = given
    decoded = [row_losses.decode(line) for line in losses.split("\n")]
    for loss, own in zip(decoded, data, strict=True):
        if own is not None and check_values(own.device):
            if isinstance(loss, CrossEntropy):
                arguments.label_values(own, loss.ignore_index, weight.shape[0])
            else:
                arguments.index_values(own, weight.shape[0])
    mean = None if mean_weight is None else (mean_weight, mean_bias)
    if mean is None and any(loss.needs_mean for loss in decoded):
        mean = sparse.mean_row(weight.detach(), bias)
    scale, softcap, ref_scale, ref_softcap = scales
    own = [None if t is None else t.detach() for t in (weight, bias)]
    head = own_head = Head(*own, scale, softcap or None)
    if any(not isinstance(loss, SparseLocalEntropy) or loss.needs_reference for loss in decoded):
        head = Head(cast(weight), cast(bias), scale, softcap or None)
    ref_head = head
    if ref_weight is not None and ref_hidden is not None:
        ref_head = Head(cast(ref_weight), cast(ref_bias), ref_scale, ref_softcap or None)
    return Rows(
        apart(cast(hidden)),
        head,
        own_head,
        None if ref_hidden is None else apart(cast(ref_hidden)),
        ref_head,
        parts_of(decoded, counts, data),
        mean,
        chunk_bytes,
        served_by,
    )


@linear.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_weights: Tensor | None,
    frozen: list[Tensor],
    counts: list[int],
    want: list[bool],
    losses: str,
    scales: list[float],
    compute: torch.dtype,
    chunk_bytes: int,
    served_by: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    work = reference.work_dtype(compute)
    weighted = row_weights is not None
    want_hidden, want_weight, want_bias = want
    return (
        hidden.new_empty((), dtype=work),
        hidden.new_empty(hidden.shape[0], dtype=work),
        hidden.new_empty(hidden.shape if want_hidden else 0, dtype=compute),
        weight.new_empty(weight.shape if want_weight and weighted else 0, dtype=work),
        weight.new_empty(weight.shape[0] if want_bias and weighted else 0, dtype=work),
    )


@torch.library.custom_op("palu_kernels::linear_backward", mutates_args=())
def linear_backward(
    grad: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    row_weights: Tensor | None,
    inputs: list[Tensor],
    frozen: list[Tensor],
    counts: list[int],
    want: list[bool],
    losses: str,
    scales: list[float],
    compute: torch.dtype,
    chunk_bytes: int,
    served_by: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``grad``: of the weighted sum (0-dim), or of the losses ``[R]``. ``inputs``: hidden, weight
    and bias (if there is one), so that a second derivative is refused, and not taken for 0."""
    want_hidden, want_weight, want_bias = want
    if row_weights is not None:
        by_row = grad * row_weights
        if want_weight:
            grad_weight = _scaled(grad_weight, grad, inputs[1].dtype)
        grad_bias = grad_bias * grad
    else:
        by_row = grad
        if want_weight or want_bias:
            hidden, weight, *bias = inputs
            options = losses, scales, compute, chunk_bytes, served_by
            rows = _rows(hidden, weight, bias[0] if bias else None, frozen, counts, *options)
            _, _, grad_weight, grad_bias = run(rows, by_row, False, want_weight, want_bias)
    if want_hidden:
        grad_hidden = grad_hidden * by_row[:, None]  # in float32: by_row is
    made = (grad_hidden, grad_weight, grad_bias)
    dtypes = (inputs[0].dtype, inputs[1].dtype, inputs[1].dtype)
    return tuple(
        t.to(dtype) if wanted else t.new_empty(0, dtype=dtype)
        for t, dtype, wanted in zip(made, dtypes, want, strict=True)
    )


def _scaled(sums: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``(sums * factor).to(dtype)``, a piece at a time: as a whole it would be there in float32
    once more, and it is the largest tensor of a step."""
    out = torch.empty_like(sums, dtype=dtype)
    for block in blocks(*sums.shape):
        out[block] = sums[block] * factor
    return out


@linear_backward.register_fake
def _(
    grad: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    row_weights: Tensor | None,
    inputs: list[Tensor],
    frozen: list[Tensor],
    counts: list[int],
    want: list[bool],
    losses: str,
    scales: list[float],
    compute: torch.dtype,
    chunk_bytes: int,
    served_by: str,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = inputs[0].shape, inputs[1].shape
    shapes = (hidden, weight, weight[:1])
    dtypes = (inputs[0].dtype, inputs[1].dtype, inputs[1].dtype)
    return tuple(
        grad_hidden.new_empty(shape if wanted else 0, dtype=dtype)
        for shape, dtype, wanted in zip(shapes, dtypes, want, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, bias, row_weights, frozen, counts, want, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.weighted = row_weights is not None
    ctx.mark_non_differentiable(*(output[1:] if ctx.weighted else (output[0], *output[2:])))
    again = not ctx.weighted and (want[1] or want[2])
    own = (hidden, weight) if bias is None else (hidden, weight, bias)
    ctx.own, ctx.frozen = len(own), len(frozen)
    ctx.save_for_backward(*output[2:], row_weights, *own, *(frozen if again else ()))
    ctx.plain = (counts, want, *options)


def _backward(ctx: Any, grad_total: Tensor | None, grad_rows: Tensor | None, *_: Any) -> tuple:
    grad = grad_total if ctx.weighted else grad_rows
    grads: list[Tensor | None] = [None, None, None]
    if grad is not None:
        saved = ctx.saved_tensors  # once: a look unpacks them all, and checkpoint allows one
        made, row_weights, rest = saved[:3], saved[3], saved[4:]
        own, frozen = list(rest[: ctx.own]), list(rest[ctx.own :])
        found = linear_backward(grad, *made, row_weights, own, frozen, *ctx.plain)
        grads = [g if want else None for g, want in zip(found, ctx.plain[1], strict=True)]
    return (*grads, None, [None] * ctx.frozen, *(None,) * len(ctx.plain))


linear.register_autograd(_backward, setup_context=_setup_context)
refuse_higher_order("the linear losses", linear, linear_backward)

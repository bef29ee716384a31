"""`PALULoss.from_hidden` as one node of a compiled graph.

How many rows carry a loss is known when the graph runs and not when it is traced, so the rows are
picked inside the node. Its shapes are those of the batch: rows without a loss have a gradient of 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from palu.data.roles import FORGET, PRESERVE
from palu.hidden_terms import join
from palu_kernels import LMHead, reference
from palu_kernels.linear.functional import CHUNK_BYTES, compute_dtype, frozen_head, linear_outputs
from palu_kernels.linear.op import linear_backward
from palu_kernels.op_autograd import refuse_higher_order


def hidden_loss(
    loss: Any,
    hidden: Tensor,
    head: LMHead,
    roles: Tensor,
    ref_hidden: Tensor | None,
    ref_head: LMHead | None,
    ref_indices: Tensor | None,
    denominators: Tensor,
) -> tuple[Tensor, Tensor]:
    """-> (the loss, 0-dim and differentiable; the sums of the forget and the preserve losses,
    ``[2]``, detached).

    Args:
        loss: a `PALULoss`.
        hidden: ``[B, T, D]``.
        roles: int8 ``[B, T]``, of the row and not of its label.
        ref_hidden, ref_head, ref_indices: as `PALULoss.from_hidden` takes them.
        denominators: ``[2]``.
    """
    if ref_hidden is not None:
        frozen_head(head, ref_head)
    compute = compute_dtype(hidden, head, ref_hidden, ref_head)
    grad = torch.is_grad_enabled()
    want = [grad and t is not None and t.requires_grad for t in (hidden, head.weight, head.bias)]
    ref = [ref_hidden, ref_indices, None, None]
    scales = [float(head.logit_scale), float(head.softcap or 0), 1.0, 0.0]
    if ref_head is not None:
        ref[2:] = ref_head.weight, ref_head.bias
        scales[2:] = float(ref_head.logit_scale), float(ref_head.softcap or 0)
    kind, number = loss.center_parts()
    total, sums, *_ = from_hidden(
        hidden,
        head.weight,
        head.bias,
        roles,
        [hidden.new_empty(0) if t is None else t.detach() for t in ref],
        [t is not None for t in ref],
        denominators,
        want,
        ",".join([loss.objective, kind, str(loss.preserve), loss.select_from, loss.backend]),
        [float(loss.top_k), float(number), float(loss.forget_weight), float(loss.preserve_weight)],
        scales,
        compute,
    )
    work = reference.work_dtype(hidden.dtype)
    return total.to(work), sums.to(work)


@torch.library.custom_op("palu::from_hidden", mutates_args=())
def from_hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    roles: Tensor,
    ref: list[Tensor],
    given: list[bool],
    denominators: Tensor,
    want: list[bool],
    names: str,
    numbers: list[float],
    scales: list[float],
    compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> total, sums ``[2]``; then what backward needs: row weights ``[B * T]``, and the gradients
    of hidden rows ``[B * T, D]``, weight and bias."""
    from palu.loss import PALULoss

    objective, kind, preserve, select_from, backend = names.split(",")
    loss = PALULoss(
        top_k=int(numbers[0]),
        objective=objective,
        center=numbers[1] if kind == "number" else kind,
        preserve=None if preserve == "None" else preserve,
        forget_weight=numbers[2],
        preserve_weight=numbers[3],
        select_from=select_from,
        backend=backend,
    )
    ref_hidden, ref_indices, ref_weight, ref_bias = (
        t if there else None for t, there in zip(ref, given, strict=True)
    )
    # what the cost model asks of the head: whether it trains
    own = [t if t is None else t.detach() for t in (weight, bias)]
    own = [t if t is None else t.requires_grad_(w) for t, w in zip(own, want[1:], strict=True)]
    head = LMHead(*own, scales[0], scales[1] or None)
    ref_head = None
    if ref_weight is not None:
        ref_head = LMHead(ref_weight, ref_bias, scales[2], scales[3] or None)
    # The dtype of the products was decided where autocast could be seen: here it is on where
    # something is wider.
    products = (t for t in (hidden, weight, ref_hidden, ref_weight) if t is not None)
    cast = any(torch.promote_types(t.dtype, compute) != compute for t in products)
    with torch.autocast(hidden.device.type, dtype=compute if cast else None, enabled=cast):
        terms = loss.terms_by_role(
            hidden.detach(), head, roles, ref_hidden, ref_indices, denominators
        )
        rows, parts, ref_rows, row_weights = join(terms)
        ref_head = None if ref_rows is None else ref_head
        total, losses, grad_hidden, *grads = linear_outputs(
            rows, head, parts, ref_rows, ref_head, row_weights, want, CHUNK_BYTES, backend
        )
    sums = losses.new_zeros(2)
    for place, own in enumerate(losses.split([part.rows for part in parts])):
        sums[place] = own.sum()
    flat = roles.flatten()
    order = [(flat == role).nonzero()[:, 0] for role in (FORGET, PRESERVE)][: len(parts)]
    weights = row_weights.new_zeros(len(flat)).index_put_((torch.cat(order),), row_weights)
    if want[0]:
        full = grad_hidden.new_zeros(len(flat), hidden.shape[-1])
        grad_hidden = full.index_put_((torch.cat(order),), grad_hidden)
    return total, sums, weights, grad_hidden, *grads


@from_hidden.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, roles: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _ref, _given, _denominators, want, *_, compute = rest
    work = reference.work_dtype(compute)
    rows = roles.numel()
    return (
        hidden.new_empty((), dtype=work),
        hidden.new_empty(2, dtype=work),
        hidden.new_empty(rows, dtype=reference.work_dtype(hidden.dtype)),
        hidden.new_empty((rows, hidden.shape[-1]) if want[0] else 0, dtype=compute),
        weight.new_empty(weight.shape if want[1] else 0, dtype=work),
        weight.new_empty(weight.shape[0] if want[2] else 0, dtype=work),
    )


@torch.library.custom_op("palu::from_hidden_backward", mutates_args=())
def from_hidden_backward(
    grad: Tensor,
    row_weights: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    hidden: Tensor,
    weight: Tensor,
    want: list[bool],
    compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    made = grad_hidden, grad_weight, grad_bias
    inputs = [hidden.flatten(0, 1), weight]
    found = linear_backward(
        grad, *made, row_weights, inputs, [], [], want, "", [], compute, 0, "torch"
    )
    return found[0].reshape(hidden.shape) if want[0] else found[0], *found[1:]


@from_hidden_backward.register_fake
def _(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, want, _ = given[5:]
    return (
        hidden.new_empty(hidden.shape if want[0] else 0),
        weight.new_empty(weight.shape if want[1] else 0),
        weight.new_empty(weight.shape[0] if want[2] else 0),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:], inputs[0], inputs[1])
    ctx.ref, ctx.want, ctx.compute = len(inputs[4]), inputs[7], inputs[11]


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    grads: list[Tensor | None] = [None, None, None]
    if grad is not None:
        found = from_hidden_backward(grad, *ctx.saved_tensors, ctx.want, ctx.compute)
        grads = [g if wanted else None for g, wanted in zip(found, ctx.want, strict=True)]
    return (*grads, None, [None] * ctx.ref, *(None,) * 7)


from_hidden.register_autograd(_backward, setup_context=_setup_context)
refuse_higher_order("PALULoss.from_hidden", from_hidden, from_hidden_backward)

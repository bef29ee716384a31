"""The one custom op for losses on logits, and the one for top-k: a node each under `torch.compile`.

`row_loss.py` says what a loss is, what its forward keeps and what its backward does. Beside the
logits that is 16 bytes a row, and for the forget loss S instead of the reference's row: 4 bytes an
entry, and 8 with Triton, which keeps its gradient too (a row of bfloat16 is less from k = V / 4).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from palu_kernels import reference, row_loss
from palu_kernels.backend import accum_dtype, check_values, on_device_of
from palu_kernels.layout import empty_rows_like
from palu_kernels.row_loss import STATE, Operands


@torch.library.custom_op("palu_kernels::topk", mutates_args=())
def topk(scores: Tensor, k: int, backend: str) -> Tensor:
    # the kernels take three dimensions as they are, which may save a copy
    rows = scores if backend == "triton" else scores.reshape(-1, scores.shape[-1])
    with on_device_of(scores):
        indices = row_loss.topk_indices(rows, k, backend)
    return indices.reshape(*scores.shape[:-1], indices.shape[-1])


@topk.register_fake
def _(scores: Tensor, k: int, backend: str) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], min(k, scores.shape[-1])), dtype=torch.int32)


@topk.register_vmap
def _(info: Any, in_dims: tuple, scores: Tensor, k: int, backend: str) -> tuple[Tensor, int]:
    batches = scores.movedim(in_dims[0], 0)
    indices = topk(batches.flatten(0, -2), k, backend)
    return indices.reshape(*batches.shape[:-1], indices.shape[-1]), 0


@torch.library.custom_op("palu_kernels::logits_loss", mutates_args=())
def logits_loss(
    logits: Tensor,
    ref_logits: Tensor | None,
    data: Tensor | None,
    loss: str,
    reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the reduced loss, and for backward state `[N, 4]` and `kept` (`RowLoss.forward`)."""
    (decoded,) = row_loss.decode(loss)
    if data is not None and check_values(data.device):
        decoded.check_values(data, logits.shape[-1])
    with on_device_of(logits):
        rows, state, kept = decoded.forward(Operands(logits, ref_logits, data, backend))
    out = reference.reduce_rows(rows, reduction, decoded.count(len(rows), data))
    return out.reshape(logits.shape[:-1]) if reduction == "none" else out, state, kept


@logits_loss.register_fake
def _(
    logits: Tensor,
    ref_logits: Tensor | None,
    data: Tensor | None,
    loss: str,
    reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = logits.shape[:-1] if reduction == "none" else ()
    kept = row_loss.decode(loss)[0].kept_shape(Operands(logits, ref_logits, data, backend))
    return (
        logits.new_empty(shape, dtype=accum_dtype(logits.dtype)),
        logits.new_empty((math.prod(logits.shape[:-1]), STATE), dtype=torch.float32),
        logits.new_empty(kept, dtype=torch.int32),
    )


@torch.library.custom_op("palu_kernels::logits_loss_backward", mutates_args=())
def logits_loss_backward(
    grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor | None,
    data: Tensor | None,
    state: Tensor,
    kept: Tensor,
    loss: str,
    reduction: str,
    backend: str,
) -> Tensor:
    (decoded,), rows = row_loss.decode(loss), len(state)
    if reduction == "mean":
        grad = reference.reduce_rows(grad, reduction, decoded.count(rows, data))
    weights = grad.reshape(-1) if reduction == "none" else grad.expand(rows)
    with on_device_of(logits):
        operands = Operands(logits, ref_logits, data, backend)
        return decoded.backward(weights.contiguous(), operands, state, kept)


@logits_loss_backward.register_fake
def _(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return empty_rows_like(logits)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, ref_logits, data, *ctx.options = inputs
    loss, _, backend = ctx.options
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    saved = row_loss.decode(loss)[0].saved(Operands(logits, ref_logits, data, backend))
    ctx.save_for_backward(logits, *saved, *output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    result = None
    if grad is not None and ctx.needs_input_grad[0]:
        result = logits_loss_backward(grad, *ctx.saved_tensors, *ctx.options)
    return (result, *(None,) * 5)


def refuse_higher_order(name: str, op: Any, backward_op: Any) -> None:
    """Register errors for second derivatives and vmap, which no fused loss defines."""

    def no_second_derivative(ctx: Any, *_: Any) -> tuple:
        raise RuntimeError(
            f"palu_kernels: {name} has no second derivative (double backward is not supported)"
        )

    def no_vmap(*_: Any, **__: Any) -> tuple:
        raise RuntimeError(
            f"palu_kernels: {name} does not support vmap; pass the batch as [B, T, V]"
        )

    backward_op.register_autograd(no_second_derivative)
    op.register_vmap(no_vmap)


logits_loss.register_autograd(_backward, setup_context=_setup_context)
refuse_higher_order("a loss on logits", logits_loss, logits_loss_backward)

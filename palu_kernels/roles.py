"""Losses of a batch in which every row has its own, on logits or on hidden rows: one node, one
gradient.

On logits the rows of a loss are copied out piece by piece, and in backward a piece is overwritten
with its gradient (`row_loss.py`) and put into a gradient of zeros. So shapes do not depend on what
the roles are, nothing but its arguments is kept for backward, and there is one tensor of the
batch's size in it, whatever the number of losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from palu_kernels import distributed
from palu_kernels import row_loss as row_losses
from palu_kernels.backend import accum_dtype, moved, on_device_of, resolve
from palu_kernels.distributed import Vocabulary, agree_on_call
from palu_kernels.layout import empty_rows_like, gradient_rows_like
from palu_kernels.linear.chunked import CHUNK_BYTES, chunk_shape
from palu_kernels.linear.head import prepare, together
from palu_kernels.linear.head_gradient import is_kept
from palu_kernels.linear.op import linear_role_losses
from palu_kernels.logits_op import refuse_higher_order
from palu_kernels.row_loss import Operands, RowLoss
from palu_kernels.sharded_logits import slice_of, slice_of_reference, takes_dtensors

__all__ = [
    "CHUNK_BYTES",
    "chunk_shape",
    "is_kept",
    "linear_role_losses",
    "prepare",
    "role_losses",
    "takes_dtensors",
    "together",
]

PIECE_BYTES = 64 * 2**20  # of the rows that are copied out at a time


def role_losses(
    logits: Tensor,
    ref_logits: Tensor | None,
    roles: Tensor,
    losses: list[RowLoss],
    weights: Tensor,
    *,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return `(weights * sums).sum()`, 0-dim and differentiable, and the sum of each loss over its
    rows, `[n]`, detached; float32 (float64 for float64).

    Args:
        logits: `[..., V]`; a DTensor where the vocabulary is sharded.
        ref_logits: the frozen reference's, of any float dtype, where a loss needs it.
        roles: `[...]` integers: a row whose role is i has loss i - 1; other rows have none, and
            a gradient of 0.
        losses: without integers of their own (indices, labels).
        weights: `[n]`, of the losses in the total.
    """
    resolved = resolve(backend, logits.device, _wider(logits, ref_logits))
    encoded = row_losses.encode(losses)
    local, vocabulary = slice_of(logits)
    if vocabulary is None:
        return by_role(logits, ref_logits, roles, weights, encoded, resolved)
    ref_logits = slice_of_reference(ref_logits, vocabulary)
    facts = {"losses": encoded, "backend": resolved, "dtype": str(local.dtype)}
    facts["reference"] = None if ref_logits is None else str(ref_logits.dtype)
    agree_on_call(vocabulary, facts, None, local.device, [roles])
    return by_role(local, ref_logits, roles, weights, encoded, resolved, vocabulary.encode())


@torch.library.custom_op("palu_kernels::by_role", mutates_args=())
def by_role(
    logits: Tensor,
    ref_logits: Tensor | None,
    roles: Tensor,
    weights: Tensor,
    losses: str,
    resolved: str,
    vocabulary: str = "",
) -> tuple[Tensor, Tensor]:
    sums = logits.new_zeros(len(weights), dtype=accum_dtype(logits.dtype))
    sharded = distributed.decode(vocabulary)
    with on_device_of(logits):
        for number, loss, rows in _pieces(logits, roles, losses, sharded):
            operands = _operands(loss, logits, ref_logits, rows, resolved, sharded)
            sums[number] += loss.fused(operands, gradient=False).sum()
    return (weights * sums).sum(), sums


@by_role.register_fake
def _(
    logits: Tensor, ref_logits: Tensor | None, roles: Tensor, weights: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    work = accum_dtype(logits.dtype)
    return logits.new_empty((), dtype=work), logits.new_empty(weights.shape, dtype=work)


@torch.library.custom_op("palu_kernels::by_role_backward", mutates_args=())
def by_role_backward(
    grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor | None,
    roles: Tensor,
    weights: Tensor,
    losses: str,
    resolved: str,
    vocabulary: str = "",
) -> Tensor:
    out = gradient_rows_like(logits).zero_()
    sharded = distributed.decode(vocabulary)
    with on_device_of(logits):
        for number, loss, rows in _pieces(logits, roles, losses, sharded):
            by_row = (grad * weights[number]).expand(len(rows[0])).contiguous()
            operands = _operands(loss, logits, ref_logits, rows, resolved, sharded)
            loss.fused(operands, True, by_row)
            out[rows] = operands.logits.to(out.dtype)
    return out


@by_role_backward.register_fake
def _(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return empty_rows_like(logits)


def _pieces(
    logits: Tensor, roles: Tensor, losses: str, vocabulary: Vocabulary | None
) -> Iterator[tuple[int, RowLoss, tuple[Tensor, ...]]]:
    """Yield the number of a loss, the loss and the indices of some of its rows, until all are."""
    columns = logits.shape[-1] if vocabulary is None else vocabulary.largest
    step = max(1, PIECE_BYTES // (columns * logits.element_size()))
    for number, loss in enumerate(row_losses.decode(losses)):
        # roles may be on the host, where looking them up waits for no device
        rows = [moved(n, logits.device) for n in (roles == number + 1).nonzero(as_tuple=True)]
        for start in range(0, len(rows[0]), step):
            yield number, loss, tuple(n[start : start + step] for n in rows)


def _operands(
    loss: RowLoss,
    logits: Tensor,
    ref_logits: Tensor | None,
    rows: tuple[Tensor, ...],
    resolved: str,
    vocabulary: Vocabulary | None,
) -> Operands:
    picked, ref = logits[rows], ref_logits[rows] if loss.needs_reference else None
    if ref is not None:
        wide = _wider(picked, ref)
        picked, ref = picked.to(wide), ref.to(wide)
    return Operands(picked, ref, None, resolved, vocabulary=vocabulary)


def _wider(logits: Tensor, ref_logits: Tensor | None) -> torch.dtype:
    if ref_logits is None:
        return logits.dtype
    return torch.promote_types(logits.dtype, ref_logits.dtype)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:4])
    ctx.plain = inputs[4:]


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    result = None
    if grad is not None and ctx.needs_input_grad[0]:
        result = by_role_backward(grad, *ctx.saved_tensors, *ctx.plain)
    return (result, *(None,) * 6)


by_role.register_autograd(_backward, setup_context=_setup_context)
refuse_higher_order("PALULoss", by_role, by_role_backward)

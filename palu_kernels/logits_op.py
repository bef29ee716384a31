"""The operators as ``torch.library`` custom ops: one node each under ``torch.compile``, with a
backward op of its own.

What a forward saves beside the logits is 16 to 24 bytes a row and, for the forget loss, S instead
of the reference's row: a bit an entry from the kernels, indices from PyTorch. ``served_by`` is the
backend that ``operators.py`` picked: the kernels, or ``eager.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from palu_kernels import reference
from palu_kernels import torch_backend as eager
from palu_kernels import validation as arguments
from palu_kernels.backend import accum_dtype, check_values, on_device_of
from palu_kernels.layout import bitmap_words, empty_rows_like, gradient_rows_like
from palu_kernels.op_autograd import differentiable

STATE = 4  # float32 numbers a row that a forward leaves for its backward


def _flat(t: Tensor) -> Tensor:
    """``[B, T, ...]`` -> ``[N, ...]``."""
    return t.reshape(-1, t.shape[-1])


def _blocks(*tensors: Tensor | None) -> list[tuple[slice, list[Tensor | None]]]:
    """``[B, T, V]`` for the PyTorch backend (the kernels take three dimensions as they are): which
    rows, and views ``[rows, V]``; everything at once, or batch by batch where that takes no
    copy."""
    try:
        return [(slice(None), [None if t is None else t.view(-1, t.shape[-1]) for t in tensors])]
    except RuntimeError:
        rows = tensors[0].shape[1]
        return [
            (slice(i * rows, (i + 1) * rows), [None if t is None else t[i] for t in tensors])
            for i in range(tensors[0].shape[0])
        ]


def _empty_losses(logits: Tensor) -> Tensor:
    rows = math.prod(logits.shape[:-1])
    return logits.new_empty(rows, dtype=accum_dtype(logits.dtype))


def _reduced(rows: Tensor, reduction: str, count: Tensor | int, shape: torch.Size) -> Tensor:
    out = reference.reduce_rows(rows, reduction, count)
    return out.reshape(shape[:-1]) if reduction == "none" else out


def _row_weights(grad: Tensor, reduction: str, count: Tensor | int, rows: int) -> Tensor:
    """dL/d(row loss) for every row, contiguous ``[N]``."""
    if reduction == "none":
        return grad.reshape(-1).contiguous()
    if reduction == "mean":
        grad = grad / max(count, 1) if isinstance(count, int) else grad / count.clamp(min=1)
    return grad.expand(rows).contiguous()


def _empty_outputs(logits: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Loss and state as the fake implementations see them."""
    dtype = accum_dtype(logits.dtype)
    shape = logits.shape[:-1] if reduction == "none" else ()
    rows = math.prod(logits.shape[:-1])
    return logits.new_empty(shape, dtype=dtype), logits.new_empty(
        (rows, STATE), dtype=torch.float32
    )


def _state_of(losses: Tensor) -> Tensor:
    """What the PyTorch backend leaves behind, in the shape that the kernels do: the losses of the
    rows, and nothing."""
    state = losses.new_zeros((losses.shape[0], STATE), dtype=torch.float32)
    state[:, 0] = losses
    return state


# --- topk_indices --------------------------------------------------------------------------------


@torch.library.custom_op("palu_kernels::topk", mutates_args=())
def topk(scores: Tensor, k: int, served_by: str) -> Tensor:
    if served_by == "triton":
        from palu_kernels.triton import radix_select as kernels

        with on_device_of(scores):
            return kernels.topk_indices(scores, k)
    chosen = eager.topk_indices(_flat(scores), k)
    return chosen.reshape(*scores.shape[:-1], chosen.shape[-1]).contiguous()


@topk.register_fake
def _(scores: Tensor, k: int, served_by: str) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], min(k, scores.shape[-1])), dtype=torch.int32)


@topk.register_vmap
def _(info: Any, in_dims: tuple, scores: Tensor, k: int, served_by: str) -> tuple[Tensor, int]:
    batches = scores.movedim(in_dims[0], 0)
    found = topk(batches.flatten(0, -2), k, served_by)
    return found.reshape(*batches.shape[:-1], found.shape[-1]), 0


# --- local_entropy_loss --------------------------------------------------------------------------


@torch.library.custom_op("palu_kernels::local_entropy", mutates_args=())
def local_entropy(
    logits: Tensor,
    ref_logits: Tensor | None,
    indices: Tensor | None,
    top_k: int,
    objective: str,
    center_kind: str,
    center_value: float,
    reduction: str,
    served_by: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if indices is not None and check_values(indices.device):
        arguments.index_values(_flat(indices), logits.shape[-1])
    if served_by == "triton":
        from palu_kernels.triton import local_entropy as kernels

        with on_device_of(logits):
            rows, state, chosen = kernels.forward(
                logits, ref_logits, indices, top_k, objective, center_kind, center_value
            )
    else:
        rows = _empty_losses(logits)
        shape = _chosen_shape(logits, ref_logits, indices, top_k, served_by)
        chosen = logits.new_empty(shape, dtype=torch.int32)
        center = center_value if center_kind == "number" else center_kind
        for part, (x, r) in _blocks(logits, ref_logits):
            chooser = x if r is None else r
            if indices is None:
                s = chosen[part] = eager.topk_indices(chooser, top_k)
            else:
                s = _flat(indices)[part]
            rows[part] = eager.local_entropy(x, None, s, top_k, objective, center)
            if indices is None:  # a NaN of the reference ranks first, so it is in S
                spoiled = chooser.gather(-1, s.long()).isnan().any(-1)
                rows[part] = rows[part].masked_fill(spoiled, torch.nan)
        state = _state_of(rows)
    return _reduced(rows, reduction, rows.shape[0], logits.shape), state, chosen


def _chosen_shape(
    logits: Tensor,
    ref_logits: Tensor | None,
    indices: Tensor | None,
    top_k: int,
    served_by: str,
) -> tuple[int, int]:
    """S as the kernels keep it, a bit a lane, or (threshold key, tie cut) a row where the logits
    chose it themselves; as PyTorch does, indices, or nothing where they were given."""
    rows, columns = math.prod(logits.shape[:-1]), logits.shape[-1]
    if served_by == "torch":
        return rows, min(top_k, columns) if indices is None else 0
    by_current = ref_logits is None and indices is None
    return (2, rows) if by_current else (rows, bitmap_words(columns))


@local_entropy.register_fake
def _(
    logits: Tensor,
    ref_logits: Tensor | None,
    indices: Tensor | None,
    top_k: int,
    objective: str,
    center_kind: str,
    center_value: float,
    reduction: str,
    served_by: str,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = _chosen_shape(logits, ref_logits, indices, top_k, served_by)
    chosen = logits.new_empty(shape, dtype=torch.int32)
    return (*_empty_outputs(logits, reduction), chosen)


@torch.library.custom_op("palu_kernels::local_entropy_backward", mutates_args=())
def local_entropy_backward(
    grad: Tensor,
    logits: Tensor,
    indices: Tensor | None,
    state: Tensor,
    chosen: Tensor,
    top_k: int,
    objective: str,
    center_kind: str,
    center_value: float,
    reduction: str,
    chose_itself: bool,
    served_by: str,
) -> Tensor:
    rows = math.prod(logits.shape[:-1])
    weights = _row_weights(grad, reduction, rows, rows)
    if served_by == "triton":
        from palu_kernels.triton import local_entropy as kernels

        with on_device_of(logits):
            return kernels.backward(
                weights,
                logits,
                chose_itself,
                state,
                chosen,
                objective,
                gradient_rows_like(logits),
            )
    out = gradient_rows_like(logits)
    center = center_value if center_kind == "number" else center_kind
    s = chosen if indices is None else _flat(indices)
    # a row whose loss is NaN has a gradient of NaN, also where the NaN was the reference's
    weights = torch.where(state[:, 0].isnan(), torch.nan, weights)
    for part, (x, to) in _blocks(logits, out):
        eager.local_entropy(
            x, None, s[part], top_k, objective, center, grad=to, weights=weights[part]
        )
    return out


@local_entropy_backward.register_fake
def _(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return empty_rows_like(logits)


differentiable(
    "local_entropy_loss",
    local_entropy,
    local_entropy_backward,
    # S is known by now: backward needs no reference rows, the kernels' no indices either
    saved=lambda inputs, output: (
        inputs[0],
        inputs[2] if inputs[-1] == "torch" else None,
        *output[1:],
    ),
    arguments_of=lambda inputs: (
        *inputs[3:-1],
        inputs[1] is None and inputs[2] is None,
        inputs[-1],
    ),
)


# --- kl_loss -------------------------------------------------------------------------------------


@torch.library.custom_op("palu_kernels::kl", mutates_args=())
def kl(
    logits: Tensor, ref_logits: Tensor, direction: str, reduction: str, served_by: str
) -> tuple[Tensor, Tensor]:
    if served_by == "triton":
        from palu_kernels.triton import kl_div as kernels

        with on_device_of(logits):
            rows, state = kernels.forward(logits, ref_logits, direction)
    else:
        rows = _empty_losses(logits)
        for part, (x, r) in _blocks(logits, ref_logits):
            rows[part] = eager.kl(x, r, direction)
        state = _state_of(rows)
    return _reduced(rows, reduction, rows.shape[0], logits.shape), state


@kl.register_fake
def _(
    logits: Tensor, ref_logits: Tensor, direction: str, reduction: str, served_by: str
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(logits, reduction)


@torch.library.custom_op("palu_kernels::kl_backward", mutates_args=())
def kl_backward(
    grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    state: Tensor,
    direction: str,
    reduction: str,
    served_by: str,
) -> Tensor:
    rows = math.prod(logits.shape[:-1])
    weights = _row_weights(grad, reduction, rows, rows)
    if served_by == "triton":
        from palu_kernels.triton import kl_div as kernels

        with on_device_of(logits):
            return kernels.backward(
                weights, logits, ref_logits, state, direction, gradient_rows_like(logits)
            )
    out = gradient_rows_like(logits)
    for part, (x, r, to) in _blocks(logits, ref_logits, out):
        eager.kl(x, r, direction, grad=to, weights=weights[part])
    return out


@kl_backward.register_fake
def _(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return empty_rows_like(logits)


differentiable(
    "kl_loss",
    kl,
    kl_backward,
    saved=lambda inputs, output: (*inputs[:2], output[1]),
    arguments_of=lambda inputs: inputs[2:],
)


# --- cross_entropy_loss --------------------------------------------------------------------------


@torch.library.custom_op("palu_kernels::cross_entropy", mutates_args=())
def cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int, reduction: str, served_by: str
) -> tuple[Tensor, Tensor]:
    if check_values(labels.device):
        arguments.label_values(labels, ignore_index, logits.shape[-1])
    if served_by == "triton":
        from palu_kernels.triton import cross_entropy as kernels

        with on_device_of(logits):
            rows, state = kernels.forward(logits, labels, ignore_index)
    else:
        rows = _empty_losses(logits)
        for part, (x,) in _blocks(logits):
            rows[part] = eager.cross_entropy(x, labels.reshape(-1)[part], ignore_index)
        state = _state_of(rows)
    return _reduced(rows, reduction, (labels != ignore_index).sum(), logits.shape), state


@cross_entropy.register_fake
def _(
    logits: Tensor, labels: Tensor, ignore_index: int, reduction: str, served_by: str
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(logits, reduction)


@torch.library.custom_op("palu_kernels::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    state: Tensor,
    ignore_index: int,
    reduction: str,
    served_by: str,
) -> Tensor:
    weights = _row_weights(grad, reduction, (labels != ignore_index).sum(), labels.numel())
    if served_by == "triton":
        from palu_kernels.triton import cross_entropy as kernels

        with on_device_of(logits):
            return kernels.backward(
                weights, logits, labels, state, ignore_index, gradient_rows_like(logits)
            )
    out = gradient_rows_like(logits)
    for part, (x, to) in _blocks(logits, out):
        target = labels.reshape(-1)[part]
        eager.cross_entropy(x, target, ignore_index, grad=to, weights=weights[part])
    return out


@cross_entropy_backward.register_fake
def _(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return empty_rows_like(logits)


differentiable(
    "cross_entropy_loss",
    cross_entropy,
    cross_entropy_backward,
    saved=lambda inputs, output: (*inputs[:2], output[1]),
    arguments_of=lambda inputs: inputs[2:],
)

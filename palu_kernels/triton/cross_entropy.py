"""Cross-entropy of a row against its label: online logsumexp in one pass, the gradient in a second.

Bytes, in transfers of a row: 1 forward, 2 backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from palu_kernels.triton.kl_div import rescaled
from palu_kernels.triton.row_io import (
    Layout,
    block_of,
    load_lanes,
    programs_wanted,
    row_start,
    store_lanes,
)
from palu_kernels.triton.softcap import capped


@triton.jit
def statistics(
    z_ptr,
    partial_ptr,
    columns,
    per,
    outer,
    inner,
    slice_lanes,
    cap,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Maximum and sum of exponentials of a slice of a row."""
    row, part = tl.program_id(0), tl.program_id(1)
    z_row, first = row_start(z_ptr, row, per, outer, inner, SHIFT)
    end = first + columns
    top = float("-inf")
    total = 0.0
    for begin in range(part * slice_lanes, min((part + 1) * slice_lanes, end), BLOCK):
        lanes = begin + tl.arange(0, BLOCK)
        live = (lanes >= first) & (lanes < end)
        whole = (begin >= first) & (begin + BLOCK <= end)
        z = load_lanes(z_row, lanes, live, whole, float("-inf")).to(tl.float32)
        z, _slope = capped(z, live, cap)
        new_top = tl.maximum(top, tl.max(z, 0))
        _drop, scale = rescaled(top, new_top)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = scale * total + tl.sum(tl.exp(z - shift), 0)
        top = new_top
    out = partial_ptr + (row.to(tl.int64) * tl.num_programs(1) + part) * 2
    tl.store(out, top)
    tl.store(out + 1, total)


@triton.jit
def merge(
    z_ptr,
    labels_ptr,
    partial_ptr,
    loss_ptr,
    state_ptr,
    per,
    outer,
    inner,
    parts,
    ignore_index,
    columns,
    cap,
):
    """Slices of a row -> logsumexp(z) - z[label], and (max, log sum) for the gradient."""
    row = tl.program_id(0)
    z_row, _ = row_start(z_ptr, row, per, outer, inner, False)
    label = tl.load(labels_ptr + row)
    counted = label != ignore_index
    top = float("-inf")
    total = 0.0
    for part in range(parts):
        slot = partial_ptr + (row.to(tl.int64) * parts + part) * 2
        part_top = tl.load(slot)
        new_top = tl.maximum(top, part_top)
        _drop, scale = rescaled(top, new_top)
        _drop, part_scale = rescaled(part_top, new_top)
        total = scale * total + part_scale * tl.load(slot + 1)
        top = new_top
    log_total = tl.log(total)
    # a label outside the row is read from nowhere: on an accelerator its value is not checked
    inside = counted & (label >= 0) & (label < columns)
    target = tl.load(z_row + label, mask=inside, other=float("nan")).to(tl.float32)
    target, _slope = capped(target, inside, cap)
    target = tl.where(inside, target, float("nan"))
    loss = (top - target) + log_total
    tl.store(loss_ptr + row, tl.where(counted, loss, 0.0))
    state = state_ptr + row.to(tl.int64) * 4
    tl.store(state, top)
    tl.store(state + 1, log_total)


@triton.jit
def gradient(
    z_ptr,
    out_ptr,
    labels_ptr,
    state_ptr,
    weight_ptr,
    columns,
    per,
    z_outer,
    z_inner,
    out_outer,
    out_inner,
    slice_lanes,
    ignore_index,
    cap,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """softmax(z) - onehot(label), 0 for an ignored row. Entry by entry: ``out`` may be z itself."""
    row, part = tl.program_id(0), tl.program_id(1)
    z_row, first = row_start(z_ptr, row, per, z_outer, z_inner, SHIFT)
    out_row, _ = row_start(out_ptr, row, per, out_outer, out_inner, SHIFT)
    end = first + columns
    label = tl.load(labels_ptr + row)
    counted = label != ignore_index
    state = state_ptr + row.to(tl.int64) * 4
    top, log_total = tl.load(state), tl.load(state + 1)
    weight = tl.load(weight_ptr + row)
    target = label.to(tl.int32) + first
    for begin in range(part * slice_lanes, min((part + 1) * slice_lanes, end), BLOCK):
        lanes = begin + tl.arange(0, BLOCK)
        live = (lanes >= first) & (lanes < end)
        whole = (begin >= first) & (begin + BLOCK <= end)
        z = load_lanes(z_row, lanes, live, whole, float("-inf")).to(tl.float32)
        z, cap_slope = capped(z, live, cap)
        slope = tl.exp(z - top - log_total) - tl.where(lanes == target, 1.0, 0.0)
        slope = tl.where(counted, slope * cap_slope * weight, 0.0)
        store_lanes(out_row, lanes, live, whole, slope.to(out_ptr.dtype.element_ty))


def forward(
    logits: Tensor, labels: Tensor, ignore_index: int, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """-> row losses ``[N]`` and the state ``[N, 4]`` for ``backward``, both float32."""
    layout = Layout.of(logits)
    losses = logits.new_empty(layout.rows, dtype=torch.float32)
    state = logits.new_zeros((layout.rows, 4), dtype=torch.float32)
    if layout.rows == 0:
        return losses, state
    block, warps = block_of(layout.columns, logits.element_size())
    slices, slice_lanes = layout.slices(programs_wanted(logits.device), block)
    partial = logits.new_empty((layout.rows, slices, 2), dtype=torch.float32)
    statistics[(layout.rows, slices)](
        *layout.tensors,
        partial,
        layout.columns,
        layout.per,
        *layout.strides,
        slice_lanes,
        softcap,
        SHIFT=layout.shift,
        BLOCK=block,
        num_warps=warps,
    )
    merge[(layout.rows,)](
        *layout.tensors,
        labels.reshape(-1).contiguous(),
        partial,
        losses,
        state,
        layout.per,
        *layout.strides,
        slices,
        ignore_index,
        layout.columns,
        softcap,
        num_warps=1,
    )
    return losses, state


def backward(
    weights: Tensor,
    logits: Tensor,
    labels: Tensor,
    state: Tensor,
    ignore_index: int,
    out: Tensor,
    softcap: float | None = None,
) -> Tensor:
    """Writes d(sum of weights * rows)/d logits into ``out``, which may be ``logits`` itself."""
    layout = Layout.of(logits, out=out)
    if layout.rows == 0:
        return out
    block, warps = block_of(layout.columns, logits.element_size())
    slices, slice_lanes = layout.slices(4 * programs_wanted(logits.device), block)
    gradient[(layout.rows, slices)](
        *layout.tensors,
        labels.reshape(-1).contiguous(),
        state,
        weights,
        layout.columns,
        layout.per,
        *layout.strides,
        slice_lanes,
        ignore_index,
        softcap,
        SHIFT=layout.shift,
        BLOCK=block,
        num_warps=warps,
    )
    return out

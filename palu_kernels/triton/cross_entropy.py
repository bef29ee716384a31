"""Cross-entropy of a row against its label: online logsumexp in one pass, the gradient in a second.

Bytes, in transfers of a row: 1 forward, 2 backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from palu_kernels.triton.row_io import (
    LOWEST,
    RowLaunch,
    apply_softcap,
    by_load,
    drop,
    exp,
    load_row,
    load_row_block,
    row_start,
    store_row_block,
)


@triton.jit
def _ce_stats_kernel(
    z_ptr,
    partial_ptr,
    n_cols,
    rows_per_batch,
    stride_batch,
    stride_row,
    split_size,
    cap,
    HAS_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Maximum and sum of exponentials of a split of a row."""
    row, split = tl.program_id(0), tl.program_id(1)
    z_row, first = row_start(z_ptr, row, rows_per_batch, stride_batch, stride_row, HAS_OFFSET)
    end = first + n_cols
    bits: tl.constexpr = z_ptr.dtype.element_ty.primitive_bitwidth
    top = tl.full([BLOCK * bits // 128], LOWEST, tl.float32)
    total = tl.zeros([BLOCK * bits // 128], tl.float32)
    for begin in range(split * split_size, min((split + 1) * split_size, end), BLOCK):
        offsets = begin + tl.arange(0, BLOCK)
        mask = (offsets >= first) & (offsets < end)
        full_block = (begin >= first) & (begin + BLOCK <= end)
        z = by_load(load_row(z_row, offsets, mask, full_block, cap), bits)
        new_top = tl.maximum(top, tl.max(z, 1))
        total *= exp(drop(top, new_top))
        total += tl.sum(exp(z - new_top[:, None]), 1)
        top = new_top
    row_top = tl.max(top, 0)
    out = partial_ptr + (row.to(tl.int64) * tl.num_programs(1) + split) * 2
    tl.store(out, row_top)
    tl.store(out + 1, tl.sum(total * exp(drop(top, row_top)), 0))


@triton.jit
def _ce_combine_kernel(
    z_ptr,
    labels_ptr,
    partial_ptr,
    loss_ptr,
    state_ptr,
    rows_per_batch,
    stride_batch,
    stride_row,
    n_splits,
    ignore_index,
    n_cols,
    cap,
):
    """Splits of a row -> logsumexp(z) - z[label], and (max, log sum) for the gradient. A label that
    is no class leaves NaN for both."""
    row = tl.program_id(0)
    z_row, _ = row_start(z_ptr, row, rows_per_batch, stride_batch, stride_row, False)
    label = tl.load(labels_ptr + row)
    counted = label != ignore_index
    top = tl.full((), LOWEST, tl.float32)
    total = 0.0
    for split in range(n_splits):
        slot = partial_ptr + (row.to(tl.int64) * n_splits + split) * 2
        split_top = tl.load(slot)
        new_top = tl.maximum(top, split_top)
        total *= exp(drop(top, new_top))
        total += tl.load(slot + 1) * exp(drop(split_top, new_top))
        top = new_top
    top = tl.where(total == 0, float("-inf"), top)  # nothing but masked entries
    log_total = tl.log(total)
    # a label outside the row is read from nowhere: on an accelerator its value is not checked
    inside = counted & (label >= 0) & (label < n_cols)
    target = tl.load(z_row + label, mask=inside, other=float("nan")).to(tl.float32)
    target, _slope = apply_softcap(target, inside, cap)
    target = tl.where(inside, target, float("nan"))
    loss = (top - target) + log_total
    tl.store(loss_ptr + row, tl.where(counted, loss, 0.0))
    state = state_ptr + row.to(tl.int64) * 4
    tl.store(state, top)
    tl.store(state + 1, tl.where(counted & ~inside, float("nan"), log_total))
    tl.store(state + 2, 0.0)
    tl.store(state + 3, 0.0)


@triton.jit
def _ce_grad_kernel(
    z_ptr,
    out_ptr,
    labels_ptr,
    state_ptr,
    weight_ptr,
    n_cols,
    rows_per_batch,
    z_stride_batch,
    z_stride_row,
    o_stride_batch,
    o_stride_row,
    split_size,
    ignore_index,
    cap,
    HAS_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """softmax(z) - onehot(label), 0 for an ignored row. Entry by entry: `out` may be z itself."""
    row, split = tl.program_id(0), tl.program_id(1)
    z_row, first = row_start(z_ptr, row, rows_per_batch, z_stride_batch, z_stride_row, HAS_OFFSET)
    out_row, _ = row_start(out_ptr, row, rows_per_batch, o_stride_batch, o_stride_row, HAS_OFFSET)
    end = first + n_cols
    label = tl.load(labels_ptr + row)
    counted = label != ignore_index
    state = state_ptr + row.to(tl.int64) * 4
    top, log_total = tl.load(state), tl.load(state + 1)
    weight = tl.load(weight_ptr + row)
    target = label.to(tl.int32) + first
    for begin in range(split * split_size, min((split + 1) * split_size, end), BLOCK):
        offsets = begin + tl.arange(0, BLOCK)
        mask = (offsets >= first) & (offsets < end)
        full_block = (begin >= first) & (begin + BLOCK <= end)
        z = load_row_block(z_row, offsets, mask, full_block, float("-inf")).to(tl.float32)
        z, cap_slope = apply_softcap(z, None, cap)
        slope = exp(z - top - log_total) - tl.where(offsets == target, 1.0, 0.0)
        slope = tl.where(counted, slope * cap_slope * weight, 0.0)
        store_row_block(out_row, offsets, mask, full_block, slope.to(out_ptr.dtype.element_ty))


def forward(
    logits: Tensor, labels: Tensor, ignore_index: int, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """-> row losses `[N]` and the state `[N, 4]` for `backward`, both float32."""
    launch = RowLaunch.of(logits)
    losses = logits.new_empty(launch.rows, dtype=torch.float32)
    state = logits.new_empty((launch.rows, 4), dtype=torch.float32)
    if launch.rows == 0:
        return losses, state
    partial = _statistics(launch, softcap)
    _ce_combine_kernel[(launch.rows,)](
        *launch.tensors,
        labels.reshape(-1).contiguous(),
        partial,
        losses,
        state,
        launch.rows_per_batch,
        *launch.strides,
        launch.splits,
        ignore_index,
        launch.n_cols,
        softcap,
        num_warps=1,
    )
    return losses, state


def statistics(logits: Tensor, softcap: float | None = None) -> Tensor:
    """-> maximum and sum of exponentials of every split of the rows, float32 `[N, splits, 2]`."""
    return _statistics(RowLaunch.of(logits), softcap)


def _statistics(launch: RowLaunch, softcap: float | None) -> Tensor:
    partial = launch.tensors[0].new_empty((*launch.grid, 2), dtype=torch.float32)
    if launch.rows > 0:
        _ce_stats_kernel[launch.grid](
            *launch.tensors, partial, *launch.sizes, softcap, **launch.constants
        )
    return partial


def backward(
    weights: Tensor,
    logits: Tensor,
    labels: Tensor,
    state: Tensor,
    ignore_index: int,
    out: Tensor,
    softcap: float | None = None,
) -> Tensor:
    """Writes d(sum of weights * rows)/d logits into `out`, which may be `logits` itself."""
    launch = RowLaunch.of(logits, out=out, programs=4)
    if launch.rows > 0:
        _ce_grad_kernel[launch.grid](
            *launch.tensors,
            labels.reshape(-1).contiguous(),
            state,
            weights,
            *launch.sizes,
            ignore_index,
            softcap,
            **launch.constants,
        )
    return out

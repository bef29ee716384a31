"""KL divergence of two rows: maxima and sums of both in one pass, the gradient in a second.

Bytes, in transfers of a row: 2 forward, 3 backward.
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

# what a split of a row leaves, float32
PARTIAL_SIZE = tl.constexpr(8)
MAX_A, SUM_A, MAX_B, SUM_B = (tl.constexpr(i) for i in range(4))
DOT, LACKING = tl.constexpr(4), tl.constexpr(5)


@triton.jit
def _kl_stats_kernel(
    a_ptr,
    b_ptr,
    partial_ptr,
    n_cols,
    rows_per_batch,
    a_stride_batch,
    a_stride_row,
    b_stride_batch,
    b_stride_row,
    split_size,
    a_cap,
    b_cap,
    HAS_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """KL(a || b) over a split of a row, both softmaxes online: for each its maximum and sum, and
    sum of exp(a - max a) * ((a - max a) - (b - max b)), and whether b lacks an entry of a."""
    row, split = tl.program_id(0), tl.program_id(1)
    a_row, first = row_start(a_ptr, row, rows_per_batch, a_stride_batch, a_stride_row, HAS_OFFSET)
    b_row, _ = row_start(b_ptr, row, rows_per_batch, b_stride_batch, b_stride_row, HAS_OFFSET)
    end = first + n_cols
    bits: tl.constexpr = a_ptr.dtype.element_ty.primitive_bitwidth
    top_a = tl.full([BLOCK * bits // 128], LOWEST, tl.float32)
    top_b = top_a
    sum_a = tl.zeros([BLOCK * bits // 128], tl.float32)
    sum_b = sum_a
    dot = sum_a
    most = sum_a
    for begin in range(split * split_size, min((split + 1) * split_size, end), BLOCK):
        offsets = begin + tl.arange(0, BLOCK)
        mask = (offsets >= first) & (offsets < end)
        full_block = (begin >= first) & (begin + BLOCK <= end)
        a = by_load(load_row(a_row, offsets, mask, full_block, a_cap), bits)
        b = by_load(load_row(b_row, offsets, mask, full_block, b_cap), bits)
        new_a = tl.maximum(top_a, tl.max(a, 1))
        new_b = tl.maximum(top_b, tl.max(b, 1))
        drop_a, drop_b = drop(top_a, new_a), drop(top_b, new_b)
        a -= new_a[:, None]
        b -= new_b[:, None]
        share = exp(a)
        # 0 where a is masked; infinite where b alone is
        excess = tl.where(a - b > LOWEST, a - b, 0.0)
        sum_a *= exp(drop_a)
        dot = exp(drop_a) * dot + sum_a * (drop_a - drop_b) + tl.sum(share * excess, 1)
        sum_a += tl.sum(share, 1)
        sum_b = exp(drop_b) * sum_b + tl.sum(exp(b), 1)
        most = tl.maximum(most, tl.max(excess, 1))
        top_a = new_a
        top_b = new_b
    row_a, row_b = tl.max(top_a, 0), tl.max(top_b, 0)
    drop_a, drop_b = drop(top_a, row_a), drop(top_b, row_b)
    sum_a *= exp(drop_a)
    out = partial_ptr + (row.to(tl.int64) * tl.num_programs(1) + split) * PARTIAL_SIZE
    tl.store(out + MAX_A, row_a)
    tl.store(out + SUM_A, tl.sum(sum_a, 0))
    tl.store(out + MAX_B, row_b)
    tl.store(out + SUM_B, tl.sum(sum_b * exp(drop_b), 0))
    tl.store(out + DOT, tl.sum(exp(drop_a) * dot + sum_a * (drop_a - drop_b), 0))
    tl.store(out + LACKING, tl.where(tl.max(most, 0) == float("inf"), 1.0, 0.0))


@triton.jit
def _kl_combine_kernel(partial_ptr, loss_ptr, state_ptr, n_splits, REVERSE: tl.constexpr):
    """Splits of a row -> KL, and what its gradient needs: max and log sum of the current row, max
    of the reference row, and (reverse) the mean of the shifted logit differences under p or
    (forward) the reference's log sum. A KL that is not finite leaves NaN for the log sum."""
    row = tl.program_id(0).to(tl.int64)
    top_a = tl.full((), LOWEST, tl.float32)
    top_b = top_a
    sum_a = 0.0
    sum_b = 0.0
    dot = 0.0
    lacking = 0.0
    for split in range(n_splits):
        slot = partial_ptr + (row * n_splits + split) * PARTIAL_SIZE
        split_a, split_b = tl.load(slot + MAX_A), tl.load(slot + MAX_B)
        new_a = tl.maximum(top_a, split_a)
        new_b = tl.maximum(top_b, split_b)
        drop_a, drop_b = drop(top_a, new_a), drop(top_b, new_b)
        split_drop_a, split_drop_b = drop(split_a, new_a), drop(split_b, new_b)
        split_sum_a = exp(split_drop_a) * tl.load(slot + SUM_A)
        sum_a *= exp(drop_a)
        dot = exp(drop_a) * dot + sum_a * (drop_a - drop_b)
        dot += exp(split_drop_a) * tl.load(slot + DOT)
        dot += split_sum_a * (split_drop_a - split_drop_b)
        sum_a += split_sum_a
        sum_b = exp(drop_b) * sum_b + exp(split_drop_b) * tl.load(slot + SUM_B)
        lacking = tl.maximum(lacking, tl.load(slot + LACKING))
        top_a = new_a
        top_b = new_b
    nan_or_zero = (sum_a + sum_b) * 0.0
    mean = tl.where(sum_a == 0, 0.0, dot / sum_a)
    log_a = tl.where(sum_a == 0, 0.0, tl.log(sum_a))
    log_b = tl.where(sum_b == 0, 0.0, tl.log(sum_b))
    kl = tl.where(sum_a == 0, 0.0, mean - log_a + log_b)
    kl = tl.where(lacking > 0, float("inf"), kl) + nan_or_zero
    tl.store(loss_ptr + row, kl)
    nan_or_zero = tl.where(lacking > 0, float("nan"), nan_or_zero)
    top_a = tl.where(sum_a == 0, 0.0, top_a)
    top_b = tl.where(sum_b == 0, 0.0, top_b)
    state = state_ptr + row * 4
    if REVERSE:
        tl.store(state, top_a)
        tl.store(state + 1, log_a + nan_or_zero)
        tl.store(state + 2, top_b)
        tl.store(state + 3, mean)
    else:
        # without a reference distribution there is no gradient: exp(z - 1e30) is 0
        log_b = tl.where(sum_a == 0, 1e30, log_b)
        tl.store(state, top_b)
        tl.store(state + 1, log_b + nan_or_zero)
        tl.store(state + 2, top_a)
        tl.store(state + 3, log_a)


@triton.jit
def _kl_grad_kernel(
    z_ptr,
    r_ptr,
    out_ptr,
    state_ptr,
    weight_ptr,
    n_cols,
    rows_per_batch,
    z_stride_batch,
    z_stride_row,
    r_stride_batch,
    r_stride_row,
    o_stride_batch,
    o_stride_row,
    split_size,
    z_cap,
    r_cap,
    REVERSE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reverse p (log p - log q - KL), forward p - q. Entry by entry, so `out` may be z itself."""
    row, split = tl.program_id(0), tl.program_id(1)
    z_row, first = row_start(z_ptr, row, rows_per_batch, z_stride_batch, z_stride_row, HAS_OFFSET)
    r_row, _ = row_start(r_ptr, row, rows_per_batch, r_stride_batch, r_stride_row, HAS_OFFSET)
    out_row, _ = row_start(out_ptr, row, rows_per_batch, o_stride_batch, o_stride_row, HAS_OFFSET)
    end = first + n_cols
    state = state_ptr + row.to(tl.int64) * 4
    top_z, log_z, top_r, last = (
        tl.load(state),
        tl.load(state + 1),
        tl.load(state + 2),
        tl.load(state + 3),
    )
    nan_or_zero = log_z * 0.0
    weight = tl.load(weight_ptr + row)
    for begin in range(split * split_size, min((split + 1) * split_size, end), BLOCK):
        offsets = begin + tl.arange(0, BLOCK)
        mask = (offsets >= first) & (offsets < end)
        full_block = (begin >= first) & (begin + BLOCK <= end)
        z = load_row_block(z_row, offsets, mask, full_block, float("-inf")).to(tl.float32)
        r = load_row_block(r_row, offsets, mask, full_block, float("-inf")).to(tl.float32)
        z, cap_slope = apply_softcap(z, None, z_cap)
        r, _slope = apply_softcap(r, None, r_cap)
        z -= top_z
        r -= top_r
        p = exp(z - log_z)
        slope = p * (z - r - last) if REVERSE else p - exp(r - last)
        slope = tl.where(z == float("-inf"), nan_or_zero, slope * cap_slope * weight)
        store_row_block(out_row, offsets, mask, full_block, slope.to(out_ptr.dtype.element_ty))


def forward(
    logits: Tensor,
    ref_logits: Tensor,
    direction: str,
    softcap: float | None = None,
    ref_softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """-> row divergences `[N]` and the state `[N, 4]` for `backward`, both float32."""
    reverse = direction == "reverse"
    pair = (logits, softcap), (ref_logits, ref_softcap)
    (a, a_cap), (b, b_cap) = pair if reverse else pair[::-1]
    partial = statistics(a, b, a_cap, b_cap)
    rows, splits, _ = partial.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    state = logits.new_empty((rows, 4), dtype=torch.float32)
    if rows > 0:
        _kl_combine_kernel[(rows,)](partial, losses, state, splits, REVERSE=reverse, num_warps=1)
    return losses, state


def statistics(a: Tensor, b: Tensor, a_cap: float | None, b_cap: float | None) -> Tensor:
    """-> what every split of the rows leaves, float32 `[N, splits, PARTIAL_SIZE]`."""
    launch = RowLaunch.of(a, b)
    partial = a.new_empty((*launch.grid, PARTIAL_SIZE.value), dtype=torch.float32)
    # eight entries a thread: with sixteen of either row bfloat16 spills on sm_100
    constants = launch.constants | {"BLOCK": min(launch.block, 256 * launch.warps)}
    if launch.rows > 0:
        _kl_stats_kernel[launch.grid](
            *launch.tensors, partial, *launch.sizes, a_cap, b_cap, **constants
        )
    return partial


def backward(
    weights: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    state: Tensor,
    direction: str,
    out: Tensor,
    softcap: float | None = None,
    ref_softcap: float | None = None,
) -> Tensor:
    """Writes d(sum of weights * rows)/d logits into `out`, which may be `logits` itself."""
    launch = RowLaunch.of(logits, ref_logits, out=out, programs=4)
    if launch.rows > 0:
        _kl_grad_kernel[launch.grid](
            *launch.tensors,
            state,
            weights,
            *launch.sizes,
            softcap,
            ref_softcap,
            REVERSE=direction == "reverse",
            **launch.constants,
        )
    return out

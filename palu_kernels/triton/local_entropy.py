"""Flatten and entropy over S: one pass for the statistics of a row, one that writes its gradient.

Neither materialises S (`topk_mask.py`).

Bytes, in transfers of a row, after `select` (2 for 16-bit types, 4 for float32): statistics read
z and the reference's row and leave a bit a lane (2.06; given indices 1.06; 1 when z chooses), the
gradient reads z and the bits and writes one row (2.06). Forward plus backward with select: 6.1, and
0.3 more for the histograms where two rows are cut into splits of 8,192 lanes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from palu_kernels.layout import bitmap_words
from palu_kernels.triton.radix_keys import key_format
from palu_kernels.triton.radix_select import select, take_ties
from palu_kernels.triton.row_io import (
    RowLaunch,
    apply_softcap,
    as_integers,
    is_live,
    row_start,
    store_row_block,
    sum_four,
)
from palu_kernels.triton.topk_mask import (
    BITMAP,
    CURRENT,
    REFERENCE,
    load_block,
    scores_start,
    store_bits,
    write_bitmap,
)

GLOBAL_MEAN, LOCAL_MEAN = tl.constexpr(0), tl.constexpr(1)
CENTERS = {"global_mean": 0, "local_mean": 1, "number": 2}
NEAR_LANES = 128  # of a split, among which a number near its mean is looked for
# what a split of a row leaves, float32: of the row (mask, sum, a number near the mean) and of S
# (count; flatten: mean, squares; entropy: maximum, sum, sum times exponents)
PARTIAL_SIZE = tl.constexpr(8)
LIVE, TOTAL, COUNT, A, B, C, NEAR = (tl.constexpr(i) for i in range(7))


@triton.jit
def near_mean(z_row, begin, near_lanes, first, end, cap):
    """A number near the mean of the first lanes of a split; 0 without any."""
    offsets = begin + tl.arange(0, 128)
    mask = (offsets >= first) & (offsets < end) & (offsets < begin + near_lanes)
    z = tl.load(z_row + offsets, mask=mask, other=float("-inf")).to(tl.float32)
    z, _slope = apply_softcap(z, mask, cap)
    top = tl.max(tl.where(mask & is_live(z), z, float("-inf")), 0)
    # a large negative number stands for a mask in some models: it says nothing of the mean
    usual = mask & (z > top - 100.0)
    below = tl.sum(tl.where(usual, z - top, 0.0), 0)
    mean = top + below / tl.maximum(tl.sum(usual.to(tl.float32), 0), 1.0)
    # a whole number leaves 16-bit entries with few digits, whose sums stay nearly exact
    return tl.where(tl.abs(top) < float("inf"), tl.floor(mean + 0.5), 0.0)


@triton.jit
def _local_entropy_stats_kernel(
    z_ptr,
    scores_ptr,
    threshold_ptr,
    need_ptr,
    seen_ptr,
    chosen_ptr,
    partial_ptr,
    n_cols,
    rows_per_batch,
    z_stride_batch,
    z_stride_row,
    s_stride_batch,
    s_stride_row,
    split_size,
    words,
    cap,
    near_lanes,
    ENTROPY: tl.constexpr,
    SELECT_BY: tl.constexpr,
    IS_16BIT: tl.constexpr,
    INFINITY: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What a split of a row knows: live entries (NaN if the split holds one), their sum, k, and
    for flatten the mean of z over S and the squared deviations from it (merged block by block as
    Chan, Golub and LeVeque do, since sums of squares cancel), for entropy the online softmax of
    z over S: maximum, sum of exponentials, sum of exponentials times exponents. Sums of flatten are
    of z less the mean of the split's first `near_lanes` entries: rows far from 0 lie nearer to
    their mean than float32 can tell it.

    `chosen` receives what the gradient needs of S: the tie cut where z chooses, bits where the
    reference does, nothing where it is the bitmap itself."""
    row, split = tl.program_id(0), tl.program_id(1)
    z_row, first = row_start(z_ptr, row, rows_per_batch, z_stride_batch, z_stride_row, HAS_OFFSET)
    scores_row = scores_start(
        scores_ptr,
        z_row,
        row,
        rows_per_batch,
        s_stride_batch,
        s_stride_row,
        SELECT_BY,
        HAS_OFFSET,
    )
    end = first + n_cols
    slot = row.to(tl.int64) * tl.num_programs(1) + split
    threshold = tl.full((), 0, tl.uint32)
    need = 0
    seen = 0
    if SELECT_BY != BITMAP:
        threshold = tl.load(threshold_ptr + row).to(tl.uint32, bitcast=True)
        need = tl.load(need_ptr + row)
        seen = tl.load(seen_ptr + slot)
    searching = seen < need
    cut = tl.where(searching, end, -1)

    near = 0.0
    if not ENTROPY:
        near = near_mean(z_row, split * split_size, near_lanes, first, end, cap)
    live_count = 0.0
    total = 0.0
    count = 0.0
    a = float("-inf") if ENTROPY else 0.0
    b = 0.0
    c = 0.0
    for begin in range(split * split_size, min((split + 1) * split_size, end), BLOCK):
        offsets, _full_block, z, _slope, keys, nan, mask = load_block(
            z_row, scores_row, begin, first, end, cap, SELECT_BY, IS_16BIT, INFINITY, BLOCK
        )
        takes_part = mask & (is_live(z) | nan)
        if SELECT_BY == BITMAP:
            member = takes_part & (keys != 0)
        else:
            tie = mask & (keys == threshold)
            cut, seen = take_ties(tie, seen, need, offsets, cut)
            member = takes_part & ((keys > threshold) | (tie & (offsets <= cut)))
        if SELECT_BY == REFERENCE:
            store_bits(chosen_ptr + row.to(tl.int64) * words, member, begin, words, BLOCK)
        if not ENTROPY:
            z -= near
        here, sum_here, found, sum_found = sum_four(
            tl.where(nan & mask, float("nan"), tl.where(takes_part, 1.0, 0.0)),
            tl.where(takes_part, z, 0.0),
            tl.where(member, 1.0, 0.0),
            tl.where(member, z, 0.0),
        )
        live_count += here
        total += sum_here
        if found > 0:
            if ENTROPY:
                top = tl.maximum(a, tl.max(tl.where(member, z, float("-inf")), 0))
                exponent = tl.where(member, z - top, 0.0)
                share = tl.where(member, tl.exp(exponent), 0.0)
                drop = tl.where(a == float("-inf"), 0.0, a - top)
                scale = tl.where(a == float("-inf"), 0.0, tl.exp(drop))
                c = scale * (c + b * drop) + tl.sum(share * exponent, 0)
                b = scale * b + tl.sum(share, 0)
                a = top
            else:
                mean = sum_found / found
                deviation = tl.where(member, z - mean, 0.0)
                step = mean - a
                weight = found / (count + found)
                b += tl.sum(deviation * deviation, 0) + step * step * count * weight
                a += step * weight
            count += found

    if SELECT_BY == CURRENT:
        if searching:
            if seen >= need:
                tl.store(chosen_ptr + row, cut - first)
    out = partial_ptr + slot * PARTIAL_SIZE
    tl.store(out + LIVE, live_count)
    tl.store(out + TOTAL, total)
    tl.store(out + COUNT, count)
    tl.store(out + A, a)
    tl.store(out + B, b)
    tl.store(out + C, c)
    tl.store(out + NEAR, near)


@triton.jit
def _local_entropy_combine_kernel(
    partial_ptr,
    loss_ptr,
    state_ptr,
    n_splits,
    number,
    ENTROPY: tl.constexpr,
    CENTER: tl.constexpr,
):
    """Splits of a row -> its loss, and four numbers from which its gradient follows entry by
    entry: flatten (c less a number near it, 2/k or NaN, share of the mean, that number), entropy
    (max, log sum, H, NaN or 0)."""
    row = tl.program_id(0).to(tl.int64)
    near = 0.0
    live_count = 0.0
    total = 0.0
    count = 0.0
    a = float("-inf") if ENTROPY else 0.0
    b = 0.0
    c = 0.0
    for split in range(n_splits):
        slot = partial_ptr + (row * n_splits + split) * PARTIAL_SIZE
        split_live, split_near = tl.load(slot + LIVE), tl.load(slot + NEAR)
        near = tl.where(live_count == 0, split_near, near)
        further = split_near - near
        live_count += split_live
        total += tl.load(slot + TOTAL) + split_live * further
        found = tl.load(slot + COUNT)
        split_a, split_b, split_c = tl.load(slot + A), tl.load(slot + B), tl.load(slot + C)
        if found > 0:
            if ENTROPY:
                top = tl.maximum(a, split_a)
                drop = tl.where(a == float("-inf"), 0.0, a - top)
                scale = tl.where(a == float("-inf"), 0.0, tl.exp(drop))
                split_scale = tl.exp(split_a - top)
                c = scale * (c + b * drop) + split_scale * (split_c + split_b * (split_a - top))
                b = scale * b + split_scale * split_b
                a = top
            else:
                step = split_a + further - a
                weight = found / (count + found)
                b += split_b + step * step * count * weight
                a += step * weight
            count += found
    nan_or_zero = live_count * 0.0
    k = tl.maximum(count, 1.0)
    state = state_ptr + row * 4
    if ENTROPY:
        log_sum = tl.where(count > 0, tl.log(b), 0.0)
        negative_entropy = tl.where(count > 0, c / b, 0.0) - log_sum
        loss = tl.log(k) + negative_entropy
        tl.store(state, tl.where(count > 0, a, 0.0))
        tl.store(state + 1, log_sum)
        tl.store(state + 2, -negative_entropy)
    else:
        center = number
        offset = 0.0
        if CENTER == GLOBAL_MEAN:
            center = total / tl.maximum(live_count, 1.0)
            offset = 2.0 * (a - center) / tl.maximum(live_count, 1.0)
        elif CENTER == LOCAL_MEAN:
            center = a
        loss = b / k + tl.where(count > 0, (a - center) * (a - center), 0.0)
        tl.store(state, center)
        tl.store(state + 1, 2.0 / k + nan_or_zero)
        tl.store(state + 2, tl.where(count > 0, offset, 0.0))
    tl.store(state + 3, nan_or_zero if ENTROPY else near)
    tl.store(loss_ptr + row, loss + nan_or_zero)


@triton.jit
def _local_entropy_grad_kernel(
    z_ptr,
    scores_ptr,
    out_ptr,
    threshold_ptr,
    cut_ptr,
    state_ptr,
    weight_ptr,
    n_cols,
    rows_per_batch,
    z_stride_batch,
    z_stride_row,
    bitmap_bytes,
    o_stride_batch,
    o_stride_row,
    split_size,
    cap,
    ENTROPY: tl.constexpr,
    SELECT_BY: tl.constexpr,
    IS_16BIT: tl.constexpr,
    INFINITY: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Entry by entry, so `out` may be z itself. S is a bitmap, or z's own choice."""
    row, split = tl.program_id(0), tl.program_id(1)
    z_row, first = row_start(z_ptr, row, rows_per_batch, z_stride_batch, z_stride_row, HAS_OFFSET)
    out_row, _ = row_start(out_ptr, row, rows_per_batch, o_stride_batch, o_stride_row, HAS_OFFSET)
    scores_row = scores_start(
        scores_ptr, z_row, row, rows_per_batch, 0, bitmap_bytes, SELECT_BY, HAS_OFFSET
    )
    end = first + n_cols
    threshold = tl.full((), 0, tl.uint32)
    cut = 0
    if SELECT_BY != BITMAP:
        threshold = tl.load(threshold_ptr + row).to(tl.uint32, bitcast=True)
        cut = tl.load(cut_ptr + row) + first
    state = state_ptr + row.to(tl.int64) * 4
    s0, s1, s2, s3 = tl.load(state), tl.load(state + 1), tl.load(state + 2), tl.load(state + 3)
    nan_or_zero = s3 if ENTROPY else s1 * 0.0
    weight = tl.load(weight_ptr + row)
    for begin in range(split * split_size, min((split + 1) * split_size, end), BLOCK):
        offsets, full_block, z, cap_slope, keys, _nan, mask = load_block(
            z_row, scores_row, begin, first, end, cap, SELECT_BY, IS_16BIT, INFINITY, BLOCK
        )
        if SELECT_BY == BITMAP:
            member = keys != 0
        else:
            member = (keys > threshold) | ((keys == threshold) & (offsets <= cut))
        if ENTROPY:
            log_q = z - s0 - s1
            slope = tl.where(member, tl.exp(log_q) * (log_q + s2), 0.0)
        else:
            slope = tl.where(member, ((z - s3) - s0) * s1, 0.0) - s2
        slope = tl.where(is_live(z), slope * cap_slope * weight, 0.0) + nan_or_zero
        store_row_block(out_row, offsets, mask, full_block, slope.to(out_ptr.dtype.element_ty))


def forward(
    logits: Tensor,
    ref_logits: Tensor | None,
    indices: Tensor | None,
    top_k: int,
    objective: str,
    center_kind: str,
    center_value: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> row losses `[N]`, state `[N, 4]` (both float32), and S for `backward`, int32: a
    bitmap `[N, words]`, or (threshold key, tie cut) `[2, N]` where the logits chose."""
    launch = RowLaunch.of(logits, *(() if ref_logits is None else (as_integers(ref_logits),)))
    rows, words = launch.rows, bitmap_words(launch.n_cols)
    losses = logits.new_empty(rows, dtype=torch.float32)
    state = logits.new_empty((rows, 4), dtype=torch.float32)
    by_current = ref_logits is None and indices is None
    chosen = logits.new_zeros((2, rows) if by_current else (rows, words), dtype=torch.int32)
    if rows == 0:
        return losses, state, chosen
    scores, scores_strides = launch.tensors[-1], launch.strides[-2:]
    constants = launch.constants
    if indices is not None:
        select_by = BITMAP
        write_bitmap(indices, launch, chosen)
        scores, scores_strides = chosen.view(torch.uint8), (0, 4 * words)
        threshold = need = seen = cut = chosen
        constants["num_warps"] = max(launch.warps, 4)  # short rows with fewer spill on sm_100
    else:
        select_by = CURRENT if by_current else REFERENCE
        threshold = chosen[0] if by_current else chosen.new_zeros(rows)
        cut = chosen[1] if by_current else chosen
        # as laid out for this walk: ties are counted split by split
        selection = select(scores.view(logits.dtype), top_k, threshold)
        need, seen = selection.need, selection.seen
        # eight entries a thread where keys are made: sixteen would leave room for one program on a
        # multiprocessor
        constants["BLOCK"] = min(launch.block, 256 * launch.warps)
    partial = logits.new_empty((*launch.grid, PARTIAL_SIZE.value), dtype=torch.float32)
    entropy = objective == "entropy"
    _local_entropy_stats_kernel[launch.grid](
        launch.tensors[0],
        scores,
        threshold,
        need,
        seen,
        cut,
        partial,
        launch.n_cols,
        launch.rows_per_batch,
        *launch.strides[:2],
        *scores_strides,
        launch.split_size,
        words,
        softcap,
        # S alone counts for its own mean, which is merged block by block: numbers that stand for
        # a mask may fill the first lanes, and would take the digits of S with them.
        NEAR_LANES if center_kind == "global_mean" else 0,
        ENTROPY=entropy,
        SELECT_BY=select_by.value,
        **constants,
        **key_format(logits),
    )
    _local_entropy_combine_kernel[(rows,)](
        partial,
        losses,
        state,
        launch.splits,
        center_value,
        ENTROPY=entropy,
        CENTER=CENTERS[center_kind],
        num_warps=1,
    )
    return losses, state, chosen


def backward(
    weights: Tensor,
    logits: Tensor,
    by_current: bool,
    state: Tensor,
    chosen: Tensor,
    objective: str,
    out: Tensor,
    softcap: float | None = None,
) -> Tensor:
    """Writes d(sum of weights * rows)/d logits into `out`, which may be `logits` itself or is
    laid out like them (`empty_rows_like`)."""
    launch = RowLaunch.of(logits, out=out, programs=4)
    if launch.rows > 0:
        _local_entropy_grad_kernel[launch.grid](
            launch.tensors[0],
            launch.tensors[0] if by_current else chosen.view(torch.uint8),
            launch.tensors[1],
            chosen[0],
            chosen[1] if by_current else chosen[0],
            state,
            weights,
            launch.n_cols,
            launch.rows_per_batch,
            *launch.strides[:2],
            0 if by_current else 4 * chosen.shape[1],
            *launch.strides[2:4],
            launch.split_size,
            softcap,
            ENTROPY=objective == "entropy",
            SELECT_BY=(CURRENT if by_current else BITMAP).value,
            **launch.constants,
            **key_format(logits),
        )
    return out

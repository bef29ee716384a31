"""Radix select: the k largest entries of every row as (threshold key, number of ties to take).

A digit of the key takes two steps. `_digit_histogram_kernel` counts the digit among the entries
whose higher digits are the threshold's; `_pick_digit_kernel` finds the bin that holds the k-th
largest entry.
After the last digit the threshold is the k-th largest key itself: greater keys are in S, and of
the equal ones the first `need`. Whoever streams the row next finds where they end (the tie cut),
so no index is ever stored. The histogram is a step of its own because its counts are all that
ranks have to exchange when the vocabulary is sharded.

Bytes: one read of the row a digit, two rows for 16-bit types and four for float32; histograms are
1 KiB a split of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from palu_kernels.triton.radix_keys import digit_shifts, key_format, order_keys
from palu_kernels.triton.row_io import (
    RowLaunch,
    as_integers,
    load_row_block,
    row_start,
)

BINS = 256


@triton.jit
def _digit_histogram_kernel(
    bits_ptr,
    threshold_ptr,
    counts_ptr,
    n_cols,
    rows_per_batch,
    stride_batch,
    stride_row,
    split_size,
    DIGIT: tl.constexpr,
    FIRST: tl.constexpr,
    IS_16BIT: tl.constexpr,
    INFINITY: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts of one digit over one split of a row, among keys that share the threshold's prefix."""
    row, split = tl.program_id(0), tl.program_id(1)
    start, first = row_start(bits_ptr, row, rows_per_batch, stride_batch, stride_row, HAS_OFFSET)
    end = first + n_cols
    prefix = tl.load(threshold_ptr + row).to(tl.uint32, bitcast=True)
    counts = tl.zeros([256], tl.int32)
    for begin in range(split * split_size, min((split + 1) * split_size, end), BLOCK):
        offsets = begin + tl.arange(0, BLOCK)
        mask = (offsets >= first) & (offsets < end)
        full_block = (begin >= first) & (begin + BLOCK <= end)
        bits = load_row_block(start, offsets, mask, full_block, 0)
        key, _ = order_keys(bits, IS_16BIT, INFINITY)
        if not FIRST:
            mask &= (key >> (DIGIT + 8)) == (prefix >> (DIGIT + 8))
        digit = ((key >> DIGIT) & 255).to(tl.int32)
        counts += tl.histogram(digit, 256, mask=mask)
    out = (row.to(tl.int64) * tl.num_programs(1) + split) * 256 + tl.arange(0, 256)
    tl.store(counts_ptr + out, counts)


@triton.jit
def _pick_digit_kernel(
    counts_ptr,
    threshold_ptr,
    need_ptr,
    seen_ptr,
    n_splits,
    DIGIT: tl.constexpr,
    LAST: tl.constexpr,
):
    """The digit whose bin holds the need-th largest key; need becomes its rank inside that bin.

    After the last digit also how many ties lie in the splits before each one.
    """
    row = tl.program_id(0).to(tl.int64)
    bins = tl.arange(0, 256)
    counts = tl.zeros([256], tl.int32)
    for split in range(n_splits):
        counts += tl.load(counts_ptr + (row * n_splits + split) * 256 + bins)
    at_least = tl.cumsum(counts, 0, reverse=True)
    need = tl.load(need_ptr + row)
    digit = tl.sum((at_least >= need).to(tl.int32), 0) - 1
    need -= tl.sum(tl.where(bins == digit, at_least - counts, 0), 0)
    tl.store(need_ptr + row, need)
    tl.store(threshold_ptr + row, tl.load(threshold_ptr + row) | (digit << DIGIT))
    if LAST:
        seen = 0
        for split in range(n_splits):
            tl.store(seen_ptr + row * n_splits + split, seen)
            seen += tl.load(counts_ptr + (row * n_splits + split) * 256 + digit)


@dataclass(frozen=True)
class Selection:
    """S of every row: keys above `threshold`, and the first `need` keys equal to it."""

    threshold: Tensor  # int32 [N], the bits of a uint32 key
    need: Tensor  # int32 [N]
    seen: Tensor  # int32 [N, splits], ties in the splits before each one


def select(scores: Tensor, k: int, threshold: Tensor) -> Selection:
    """The k largest entries of every row of `scores`, `[N, V]` or `[B, T, V]`.

    `threshold`: int32 `[N]`, zeros; the keys are left in it. Splits are those of any launch over
    rows of this shape and width.
    """
    launch = RowLaunch.of(as_integers(scores))
    seen = scores.new_zeros(launch.grid, dtype=torch.int32)
    if k >= launch.n_cols:
        # the zero key is below every entry's: all of them are in S, and nothing is a tie
        return Selection(threshold, torch.zeros_like(threshold), seen)
    need = torch.full_like(threshold, k)
    counts = scores.new_empty((*launch.grid, BINS), dtype=torch.int32)
    shifts = digit_shifts(scores)
    for digit in shifts:
        _digit_histogram_kernel[launch.grid](
            *launch.tensors,
            threshold,
            counts,
            *launch.sizes,
            DIGIT=digit,
            FIRST=digit == shifts[0],
            **launch.constants,
            **key_format(scores),
        )
        _pick_digit_kernel[(launch.rows,)](
            counts, threshold, need, seen, launch.splits, DIGIT=digit, LAST=digit == 0, num_warps=2
        )
    return Selection(threshold, need, seen)


@triton.jit
def take_ties(tie, seen, need, offsets, cut):
    """-> (lane of the last tie in S, ties seen), after a block that began with `seen` ties.

    `cut` stays where it is unless the need-th tie lies in this block, which it does in one
    block of the row: only there the ties are ranked.
    """
    if seen < need:
        here = tl.sum(tie.to(tl.int32), 0)
        if seen + here >= need:
            rank = seen + tl.cumsum(tie.to(tl.int32), 0)
            cut = tl.max(tl.where(tie & (rank == need), offsets, -1), 0)
        seen += here
    return cut, seen


@triton.jit
def _write_indices_kernel(
    bits_ptr,
    threshold_ptr,
    need_ptr,
    out_ptr,
    n_cols,
    rows_per_batch,
    stride_batch,
    stride_row,
    k,
    IS_16BIT: tl.constexpr,
    INFINITY: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """S as ascending indices, int32 [N, k]: one more read of the row, a program a row."""
    row = tl.program_id(0)
    start, first = row_start(bits_ptr, row, rows_per_batch, stride_batch, stride_row, HAS_OFFSET)
    end = first + n_cols
    threshold = tl.load(threshold_ptr + row).to(tl.uint32, bitcast=True)
    need = tl.load(need_ptr + row)
    out_ptr += row.to(tl.int64) * k
    seen = 0
    written = 0
    cut = end
    for begin in range(0, end, BLOCK):
        offsets = begin + tl.arange(0, BLOCK)
        mask = (offsets >= first) & (offsets < end)
        full_block = (begin >= first) & (begin + BLOCK <= end)
        bits = load_row_block(start, offsets, mask, full_block, 0)
        key, _ = order_keys(bits, IS_16BIT, INFINITY)
        tie = mask & (key == threshold)
        cut, seen = take_ties(tie, seen, need, offsets, cut)
        member = (mask & (key > threshold)) | (tie & (offsets <= cut))
        found = tl.sum(member.to(tl.int32), 0)
        if found > 0:
            place = written + tl.cumsum(member.to(tl.int32), 0) - 1
            tl.store(out_ptr + place, offsets - first, mask=member)
        written += found


def topk_indices(scores: Tensor, k: int) -> Tensor:
    """int32 `[..., min(k, V)]`, ascending, ties to the lowest index."""
    k = min(k, scores.shape[-1])
    out = scores.new_empty((*scores.shape[:-1], k), dtype=torch.int32)
    launch = RowLaunch.of(as_integers(scores))
    if launch.rows > 0:
        chosen = select(scores, k, scores.new_zeros(launch.rows, dtype=torch.int32))
        _write_indices_kernel[(launch.rows,)](
            *launch.tensors,
            chosen.threshold,
            chosen.need,
            out,
            *launch.sizes[:-1],
            k,
            **launch.constants,
            **key_format(scores),
        )
    return out

"""Radix select: the k largest entries of every row as (threshold key, number of ties to take).

A digit of the key takes two steps. ``digit_histogram`` counts the digit among the entries whose
higher digits are the threshold's; ``pick_digit`` finds the bin that holds the k-th largest entry.
After the last digit the threshold is the k-th largest key itself: greater keys are in S, and of
the equal ones the first ``need``. Whoever streams the row next finds where they end (the tie cut),
so no index is ever stored. The histogram is a step of its own because its counts are all that
ranks have to exchange when the vocabulary is sharded.

Bytes: one read of the row a digit, two rows for 16-bit types and four for float32; histograms are
1 KiB a slice of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from palu_kernels.triton.radix_keys import digit_shifts, key_format, order_keys
from palu_kernels.triton.row_io import (
    Layout,
    as_integers,
    block_of,
    load_lanes,
    programs_wanted,
    row_start,
)

BINS = 256


@triton.jit
def digit_histogram(
    bits_ptr,
    threshold_ptr,
    counts_ptr,
    columns,
    per,
    outer,
    inner,
    slice_lanes,
    DIGIT: tl.constexpr,
    FIRST: tl.constexpr,
    HALF: tl.constexpr,
    INFINITY: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts of one digit over one slice of a row, among keys that share the threshold's prefix."""
    row, part = tl.program_id(0), tl.program_id(1)
    start, first = row_start(bits_ptr, row, per, outer, inner, SHIFT)
    end = first + columns
    prefix = tl.load(threshold_ptr + row).to(tl.uint32, bitcast=True)
    counts = tl.zeros([256], tl.int32)
    for begin in range(part * slice_lanes, min((part + 1) * slice_lanes, end), BLOCK):
        lanes = begin + tl.arange(0, BLOCK)
        live = (lanes >= first) & (lanes < end)
        whole = (begin >= first) & (begin + BLOCK <= end)
        bits = load_lanes(start, lanes, live, whole, 0)
        key, _ = order_keys(bits, HALF, INFINITY)
        if not FIRST:
            live &= (key >> (DIGIT + 8)) == (prefix >> (DIGIT + 8))
        digit = ((key >> DIGIT) & 255).to(tl.int32)
        counts += tl.histogram(digit, 256, mask=live)
    out = (row.to(tl.int64) * tl.num_programs(1) + part) * 256 + tl.arange(0, 256)
    tl.store(counts_ptr + out, counts)


@triton.jit
def pick_digit(
    counts_ptr,
    threshold_ptr,
    need_ptr,
    seen_ptr,
    parts,
    DIGIT: tl.constexpr,
    LAST: tl.constexpr,
):
    """The digit whose bin holds the need-th largest key; need becomes its rank inside that bin.

    After the last digit also how many ties lie in the slices before each one.
    """
    row = tl.program_id(0).to(tl.int64)
    bins = tl.arange(0, 256)
    counts = tl.zeros([256], tl.int32)
    for part in range(parts):
        counts += tl.load(counts_ptr + (row * parts + part) * 256 + bins)
    at_least = tl.cumsum(counts, 0, reverse=True)
    need = tl.load(need_ptr + row)
    digit = tl.sum((at_least >= need).to(tl.int32), 0) - 1
    need -= tl.sum(tl.where(bins == digit, at_least - counts, 0), 0)
    tl.store(need_ptr + row, need)
    tl.store(threshold_ptr + row, tl.load(threshold_ptr + row) | (digit << DIGIT))
    if LAST:
        seen = 0
        for part in range(parts):
            tl.store(seen_ptr + row * parts + part, seen)
            seen += tl.load(counts_ptr + (row * parts + part) * 256 + digit)


@dataclass(frozen=True)
class Selection:
    """S of every row: keys above ``threshold``, and the first ``need`` keys equal to it."""

    threshold: Tensor  # int32 [N], the bits of a uint32 key
    need: Tensor  # int32 [N]
    seen: Tensor  # int32 [N, slices], ties in the slices before each one


def select(scores: Tensor, k: int, threshold: Tensor, slices: int, slice_lanes: int) -> Selection:
    """The k largest entries of every row of ``scores``, ``[N, V]`` or ``[B, T, V]``.

    ``threshold``: int32 ``[N]``, zeros; the keys are left in it. The row is cut into ``slices``.
    """
    layout = Layout.of(as_integers(scores))
    rows, columns = layout.rows, layout.columns
    seen = scores.new_zeros((rows, slices), dtype=torch.int32)
    if k >= columns:
        # the zero key is below every entry's: all of them are in S, and nothing is a tie
        return Selection(threshold, torch.zeros_like(threshold), seen)
    need = torch.full_like(threshold, k)
    counts = scores.new_empty((rows, slices, BINS), dtype=torch.int32)
    shifts = digit_shifts(scores)
    block, warps = block_of(columns, scores.element_size())
    for digit in shifts:
        digit_histogram[(rows, slices)](
            *layout.tensors,
            threshold,
            counts,
            columns,
            layout.per,
            *layout.strides,
            slice_lanes,
            DIGIT=digit,
            FIRST=digit == shifts[0],
            SHIFT=layout.shift,
            BLOCK=block,
            num_warps=warps,
            **key_format(scores),
        )
        pick_digit[(rows,)](
            counts, threshold, need, seen, slices, DIGIT=digit, LAST=digit == 0, num_warps=2
        )
    return Selection(threshold, need, seen)


@triton.jit
def take_ties(tie, seen, need, lanes, cut):
    """-> (lane of the last tie in S, ties seen), after a block that began with ``seen`` ties.

    ``cut`` stays where it is unless the need-th tie lies in this block, which it does in one
    block of the row: only there the ties are ranked.
    """
    if seen < need:
        here = tl.sum(tie.to(tl.int32), 0)
        if seen + here >= need:
            rank = seen + tl.cumsum(tie.to(tl.int32), 0)
            cut = tl.max(tl.where(tie & (rank == need), lanes, -1), 0)
        seen += here
    return cut, seen


@triton.jit
def write_indices(
    bits_ptr,
    threshold_ptr,
    need_ptr,
    out_ptr,
    columns,
    per,
    outer,
    inner,
    k,
    HALF: tl.constexpr,
    INFINITY: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """S as ascending indices, int32 [N, k]: one more read of the row, a program a row."""
    row = tl.program_id(0)
    start, first = row_start(bits_ptr, row, per, outer, inner, SHIFT)
    end = first + columns
    threshold = tl.load(threshold_ptr + row).to(tl.uint32, bitcast=True)
    need = tl.load(need_ptr + row)
    out_ptr += row.to(tl.int64) * k
    seen = 0
    written = 0
    cut = end
    for begin in range(0, end, BLOCK):
        lanes = begin + tl.arange(0, BLOCK)
        live = (lanes >= first) & (lanes < end)
        whole = (begin >= first) & (begin + BLOCK <= end)
        bits = load_lanes(start, lanes, live, whole, 0)
        key, _ = order_keys(bits, HALF, INFINITY)
        tie = live & (key == threshold)
        cut, seen = take_ties(tie, seen, need, lanes, cut)
        member = (live & (key > threshold)) | (tie & (lanes <= cut))
        found = tl.sum(member.to(tl.int32), 0)
        if found > 0:
            place = written + tl.cumsum(member.to(tl.int32), 0) - 1
            tl.store(out_ptr + place, lanes - first, mask=member)
        written += found


def topk_indices(scores: Tensor, k: int) -> Tensor:
    """int32 ``[..., min(k, V)]``, ascending, ties to the lowest index."""
    k = min(k, scores.shape[-1])
    out = scores.new_empty((*scores.shape[:-1], k), dtype=torch.int32)
    layout = Layout.of(as_integers(scores))
    if layout.rows == 0:
        return out
    block, warps = block_of(layout.columns, scores.element_size())
    slices, slice_lanes = layout.slices(programs_wanted(scores.device), block)
    threshold = scores.new_zeros(layout.rows, dtype=torch.int32)
    chosen = select(scores, k, threshold, slices, slice_lanes)
    write_indices[(layout.rows,)](
        *layout.tensors,
        chosen.threshold,
        chosen.need,
        out,
        layout.columns,
        layout.per,
        *layout.strides,
        k,
        SHIFT=layout.shift,
        BLOCK=block,
        num_warps=warps,
        **key_format(scores),
    )
    return out

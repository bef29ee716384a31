"""The k largest entries of every row as ascending indices, ties to the lowest index.

A row is read once, which leaves the largest entry of every segment of 8 or 32 neighbouring lanes.
Of the k-th largest of these maxima it is known that k entries are as large, so S lies among the
lanes that reach it, and they lie in the few segments whose maximum does. `_pick_kernel`, a program
a row, searches the bound, lists those segments and then those lanes (about 1.1 k of them), and
searches the k-th largest key among them. A search halves an interval of integer keys (`bisect`):
no histogram, and no sort.

Short rows are their own list. Where a list has no room (many ties at the bound) or k is too large
for a bound, `_search_kernel` searches the row itself, a read of it every step: slower, and as
exact.

Bytes, in transfers of a row: 1 and the maxima (an eighth, or a 32nd for small k), written and
read again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from palu_kernels.layout import LANES
from palu_kernels.triton.order_keys import LOWEST, infinity, order_keys
from palu_kernels.triton.row_io import RowLaunch, as_integers, load_row_block, row_start

SHORT = 4096  # rows of so many entries are searched as a whole, in registers
MOST = 16384  # keys that a program holds in registers, 64 a thread
CHUNK = 512  # lanes that are listed or written together: with more some variants spill


@triton.jit
def _segment_maxima_kernel(
    scores_ptr,
    maxima_ptr,
    n_cols,
    rows_per_batch,
    stride_batch,
    stride_row,
    split_size,
    n_maxima,
    SEGMENT: tl.constexpr,
    INFINITY: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The key of the largest entry of every segment; a NaN counts as +inf, so no maximum is above
    the largest key of its segment."""
    row, split = tl.program_id(0), tl.program_id(1)
    start, first = row_start(scores_ptr, row, rows_per_batch, stride_batch, stride_row, HAS_OFFSET)
    end = first + n_cols
    maxima_ptr += row.to(tl.int64) * n_maxima
    for begin in range(split * split_size, min((split + 1) * split_size, end), BLOCK):
        offsets = begin + tl.arange(0, BLOCK)
        mask = (offsets >= first) & (offsets < end)
        full_block = (begin >= first) & (begin + BLOCK <= end)
        entries = load_row_block(start, offsets, mask, full_block, float("-inf")).to(tl.float32)
        entries = tl.where(entries != entries, float("inf"), entries)
        top = tl.max(tl.reshape(entries, [BLOCK // SEGMENT, SEGMENT]), 1)
        top = top.to(scores_ptr.dtype.element_ty)
        if INFINITY < 0x8000:
            key = order_keys(top.to(tl.int16, bitcast=True), INFINITY)
        else:
            key = order_keys(top.to(tl.int32, bitcast=True), INFINITY)
        segment = begin // SEGMENT + tl.arange(0, BLOCK // SEGMENT)
        tl.store(
            maxima_ptr + segment, key.to(maxima_ptr.dtype.element_ty), mask=segment * SEGMENT < end
        )


@triton.jit
def bisect(keys, low, high, reach, k, enough):
    """-> (low, high, keys that reach low, keys that reach high).

    `reach` keys, at least k, reach `low`, and none `high`. The interval is halved, so that k still
    reach `low` and fewer than k `high`, until no more than `enough` reach `low` or it holds one.
    """
    above = 0
    while (reach > enough) & (low + 1 < high):
        middle = (low & high) + ((low ^ high) >> 1)
        found = tl.sum((keys >= middle).to(tl.int32), 0)
        if found >= k:
            low = middle
            reach = found
        else:
            high = middle
            above = found
    return low, high, reach, above


@triton.jit
def row_keys(bits_row, lane, first, end, INFINITY: tl.constexpr):
    """Keys of the entries at these lanes; of lanes beside the row a number below every key."""
    inside = (lane >= first) & (lane < end)
    key = order_keys(tl.load(bits_row + lane, mask=inside, other=0), INFINITY)
    return tl.where(inside, key, LOWEST)


@triton.jit
def bisect_row(
    bits_row, low, high, reach, k, first, end, INFINITY: tl.constexpr, BLOCK: tl.constexpr
):
    """`bisect` of a row that is read anew every step, until exactly k keys reach `low` or `high` is
    `low + 1`; `low` is tried first, which many entries may equal, and a step quarters the rest."""
    above = 0
    while (reach > k) & (low + 1 < high):
        middle = (low & high) + ((low ^ high) >> 1)
        upper = (middle & high) + ((middle ^ high) >> 1)
        at_middle = tl.zeros([BLOCK], tl.int32)
        at_upper = tl.zeros([BLOCK], tl.int32)
        beyond = tl.zeros([BLOCK], tl.int32)
        for begin in range(0, end, BLOCK):
            place = begin + tl.arange(0, BLOCK)
            key = row_keys(bits_row, place, first, end, INFINITY)
            beyond += (key > low).to(tl.int32)
            at_middle += (key >= middle).to(tl.int32)
            at_upper += (key >= upper).to(tl.int32)
        found_beyond, found_middle, found_upper = (
            tl.sum(beyond, 0),
            tl.sum(at_middle, 0),
            tl.sum(at_upper, 0),
        )
        if found_beyond < k:
            high = low + 1
            above = found_beyond
        elif found_upper >= k:
            low = upper
            reach = found_upper
        elif found_middle >= k:
            low = middle
            high = upper
            reach = found_middle
            above = found_upper
        else:
            low += 1
            high = middle
            reach = found_beyond
            above = found_middle
    return low, high, above


@triton.jit
def write_members(
    bits_row,
    list_ptr,
    out_ptr,
    room,
    count,
    low,
    high,
    need,
    first,
    INFINITY: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The columns of keys that reach `high`, and of the first `need` of those that reach `low`:
    of a list of keys and their lanes, or of the row."""
    above = 0
    ties = 0
    for begin in range(0, count, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        if LISTED:
            key = tl.load(list_ptr + place, mask=place < count, other=LOWEST)
            lane = tl.load(list_ptr + room + place, mask=place < count, other=0)
        else:
            key = row_keys(bits_row, place, first, count, INFINITY)
            lane = place
        # both counts in one number, ties from bit 16 on: one scan in place of two
        one = tl.where(key >= high, 1, tl.where(key >= low, 1 << 16, 0))
        so_far = tl.cumsum(one, 0)
        tied = ties + (so_far >> 16)
        member = (key >= high) | ((key >= low) & (tied <= need))
        position = above + (so_far & 0xFFFF) + tl.minimum(tied, need)
        tl.store(out_ptr + position - 1, lane - first, mask=member)
        found = tl.sum(one, 0)
        above += found & 0xFFFF
        ties += found >> 16


@triton.jit
def list_segments(maxima_ptr, list_ptr, count, low, room, BLOCK: tl.constexpr):
    """-> how many maxima reach `low`; the first `room` of their segments are listed."""
    written = 0
    for begin in range(0, count, BLOCK):
        segment = begin + tl.arange(0, BLOCK)
        key = tl.load(maxima_ptr + segment, mask=segment < count, other=0).to(tl.int32)
        hit = (segment < count) & (key >= low)
        position = written + tl.cumsum(hit.to(tl.int32), 0)
        tl.store(list_ptr + position - 1, segment, mask=hit & (position <= room))
        written += tl.sum(hit.to(tl.int32), 0)
    return written


@triton.jit
def list_lanes(
    bits_row,
    segments_ptr,
    list_ptr,
    count,
    low,
    room,
    first,
    end,
    INFINITY: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """-> how many lanes of the listed segments reach `low`; of the first `room` the key is listed,
    and behind the keys the lane."""
    written = 0
    for begin in range(0, count, BLOCK // SEGMENT):
        place = begin + tl.arange(0, BLOCK // SEGMENT)
        segment = tl.load(segments_ptr + place, mask=place < count, other=0)
        lane = segment[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :]
        lane = tl.reshape(tl.where((place < count)[:, None], lane, end), [BLOCK])
        key = row_keys(bits_row, lane, first, end, INFINITY)
        hit = key >= low
        position = written + tl.cumsum(hit.to(tl.int32), 0)
        hit_in_room = hit & (position <= room)
        tl.store(list_ptr + position - 1, key, mask=hit_in_room)
        tl.store(list_ptr + room + position - 1, lane, mask=hit_in_room)
        written += tl.sum(hit.to(tl.int32), 0)
    return written


@triton.jit
def list_candidates(
    bits_row,
    maxima_ptr,
    segments_ptr,
    list_ptr,
    n_maxima,
    k,
    enough,
    room,
    first,
    end,
    INFINITY: tl.constexpr,
    SEGMENT: tl.constexpr,
    MAXIMA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """-> (a bound that k entries reach, how many do; more than `room`: too many to be listed)."""
    place = tl.arange(0, MAXIMA)
    count = tl.cdiv(end, SEGMENT)
    # a multiple of 16, so the load is wide; what is read beyond the row's own is dropped
    maxima = tl.load(maxima_ptr + place, mask=place < n_maxima, other=0).to(tl.int32)
    maxima = tl.where(place < count, maxima, LOWEST)
    least = tl.min(tl.where(maxima == LOWEST, INFINITY, maxima), 0)
    bound, _high, _reach, _above = bisect(maxima, least, tl.max(maxima, 0) + 1, count, k, enough)
    segments = list_segments(maxima_ptr, segments_ptr, count, bound, enough, 2 * BLOCK)
    listed = room + 1
    if segments <= enough:
        tl.debug_barrier()  # other threads read what one lists; it orders memory on AMD too
        listed = list_lanes(
            bits_row,
            segments_ptr,
            list_ptr,
            segments,
            bound,
            room,
            first,
            end,
            INFINITY,
            SEGMENT,
            BLOCK,
        )
        tl.debug_barrier()
    return bound, listed


@triton.jit
def _pick_kernel(
    bits_ptr,
    maxima_ptr,
    lists_ptr,
    bounds_ptr,
    out_ptr,
    n_cols,
    rows_per_batch,
    stride_batch,
    stride_row,
    n_maxima,
    enough,
    room,
    k,
    SEGMENT: tl.constexpr,
    MAXIMA: tl.constexpr,
    KEYS: tl.constexpr,
    INFINITY: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """S as ascending indices, int32 [N, k]. MAXIMA and KEYS: room in registers for the keys of
    maxima (0: there are none) and of candidates. Where these have no room, the row's `bounds`
    receives what k entries reach, for `_search_kernel`; else a number below every key."""
    row = tl.program_id(0)
    start, first = row_start(bits_ptr, row, rows_per_batch, stride_batch, stride_row, HAS_OFFSET)
    end = first + n_cols
    row = row.to(tl.int64)
    low = tl.full((), LOWEST + 1, tl.int32)
    high = tl.full((), INFINITY + 2, tl.int32)
    reach = n_cols
    listed = end
    if MAXIMA:
        lists_ptr += row * (enough + 2 * room)
        low, listed = list_candidates(
            start,
            maxima_ptr + row * n_maxima,
            lists_ptr + 2 * room,
            lists_ptr,
            n_maxima,
            k,
            enough,
            room,
            first,
            end,
            INFINITY,
            SEGMENT,
            MAXIMA,
            BLOCK,
        )
        reach = listed
        tl.store(bounds_ptr + row, tl.where(listed > room, low, LOWEST))
    if listed <= room:
        place = tl.arange(0, KEYS)
        if MAXIMA:
            keys = tl.load(lists_ptr + place, mask=place < listed, other=LOWEST)
        else:
            keys = row_keys(start, place, first, end, INFINITY)
        low, high, _reach, above = bisect(keys, low, high, reach, k, k)
        write_members(
            start,
            lists_ptr,
            out_ptr + row * k,
            room,
            listed,
            low,
            high,
            k - above,
            first,
            INFINITY,
            MAXIMA > 0,
            BLOCK,
        )


@triton.jit
def _search_kernel(
    bits_ptr,
    bounds_ptr,
    out_ptr,
    n_cols,
    rows_per_batch,
    stride_batch,
    stride_row,
    k,
    INFINITY: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """S of rows that have a bound, as `_pick_kernel`; the others are left alone."""
    row = tl.program_id(0)
    low = tl.full((), LOWEST + 1, tl.int32)
    high = tl.full((), INFINITY + 2, tl.int32)
    if bounds_ptr is not None:
        low = tl.load(bounds_ptr + row)
    if low > LOWEST:
        start, first = row_start(
            bits_ptr, row, rows_per_batch, stride_batch, stride_row, HAS_OFFSET
        )
        end = first + n_cols
        low, high, above = bisect_row(start, low, high, n_cols, k, first, end, INFINITY, BLOCK)
        out_ptr += row.to(tl.int64) * k
        write_members(
            start, bits_ptr, out_ptr, 0, end, low, high, k - above, first, INFINITY, False, BLOCK
        )


@dataclass(frozen=True)
class Plan:
    """How rows of so many columns are searched for their k largest entries."""

    segment: int  # lanes of a maximum
    maxima: int  # of a row; 0: none are taken
    enough: int  # segments that may be listed
    room: int  # candidates that may be; without maxima the row itself is the list, if it has room

    @classmethod
    def of(cls, n_cols: int, k: int) -> Plan:
        lanes = n_cols + LANES - 1
        # a long segment leaves fewer maxima to search, and more lanes to look into
        segment = 32 if 512 * k <= n_cols else 8
        while triton.cdiv(lanes, segment) > MOST:
            segment *= 2
        maxima = triton.cdiv(lanes, 16 * segment) * 16
        # k of n random segments hold 1.0 k entries that reach the bound where k is small, 1.7 k
        # where it is three quarters of n; a cluster of large entries holds more
        room = min(MOST, max(2048, triton.next_power_of_2(2 * k)))
        # lanes are listed by whole segments, so one must fit in a chunk
        fits = segment <= CHUNK and 4 * k <= 3 * maxima and 3 * k <= 2 * room
        if n_cols > SHORT and fits:
            return cls(segment, maxima, k + k // 64 + 16, room)
        return cls(segment, 0, 0, lanes if lanes <= MOST else 0)

    @property
    def maxima_held(self) -> int:
        return triton.next_power_of_2(self.maxima) if self.maxima else 0

    @property
    def keys_held(self) -> int:
        return triton.next_power_of_2(self.room)


def topk_indices(scores: Tensor, k: int) -> Tensor:
    """int32 `[..., min(k, V)]`, ascending, ties to the lowest index."""
    k = min(k, scores.shape[-1])
    out = scores.new_empty((*scores.shape[:-1], k), dtype=torch.int32)
    launch = RowLaunch.of(scores)
    if launch.rows == 0:
        return out
    plan = Plan.of(launch.n_cols, k)
    kind = {"INFINITY": infinity(scores), "HAS_OFFSET": launch.has_offset}
    bits, sizes = as_integers(launch.tensors[0]), launch.sizes[:-1]
    bounds = maxima = lists = None
    if plan.maxima:
        bounds = out.new_empty(launch.rows)
        lists = out.new_empty((launch.rows, plan.enough + 2 * plan.room))
        maxima = scores.new_empty((launch.rows, plan.maxima), dtype=bits.dtype)
        _segment_maxima_kernel[launch.grid](
            *launch.tensors,
            maxima,
            *launch.sizes,
            plan.maxima,
            SEGMENT=plan.segment,
            INFINITY=infinity(scores),
            **launch.constants,
        )
    if plan.room:
        held = max(plan.maxima_held, plan.keys_held)
        _pick_kernel[(launch.rows,)](
            bits,
            maxima,
            lists,
            bounds,
            out,
            *sizes,
            plan.maxima,
            plan.enough,
            plan.room,
            k,
            SEGMENT=plan.segment,
            MAXIMA=plan.maxima_held,
            KEYS=plan.keys_held,
            **kind,
            # a lane a thread: of programs with few threads ptxas allows 64 registers
            BLOCK=min(max(held // 16, 128), CHUNK),
            num_warps=min(8, max(1, held // 512)),
        )
    if plan.maxima or not plan.room:
        _search_kernel[(launch.rows,)](
            bits,
            bounds,
            out,
            *sizes,
            k,
            **kind,
            # of twice the block and the threads ptxas spills some variants on sm_100
            BLOCK=1024,
            num_warps=4,
        )
    return out

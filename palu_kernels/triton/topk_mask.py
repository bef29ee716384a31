"""Who is in S: the test that kernels make entry by entry while a row streams.

Where the reference's row chooses, S is the threshold and tie cut of ``select``; the pass that takes
the statistics finds the cut, and leaves a bitmap of one bit a lane, so that the gradient reads a
bit an entry and the reference's row is not needed any more. Given indices become such a bitmap
first. Where the current row chooses, threshold and cut serve both passes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from palu_kernels.triton.radix_keys import order_keys
from palu_kernels.triton.row_io import Layout, load_lanes, row_start
from palu_kernels.triton.softcap import capped

CURRENT, REFERENCE, BITMAP = 0, 1, 2  # who says what is in S


@triton.jit
def load_block(
    z_row,
    chooser_row,
    begin,
    first,
    end,
    cap,
    MEMBERS: tl.constexpr,
    HALF: tl.constexpr,
    INFINITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """-> (lanes, whether the block lies inside the row, z in float32 under the cap, the cap's
    slope there, chooser's keys (bitmap: bits), lanes with a NaN in either row, live lanes).

    Keys are of the row before the cap, which keeps the order and would only make ties."""
    lanes = begin + tl.arange(0, BLOCK)
    live = (lanes >= first) & (lanes < end)
    whole = (begin >= first) & (begin + BLOCK <= end)
    entries = load_lanes(z_row, lanes, live, whole, float("-inf"))
    z, cap_slope = capped(entries.to(tl.float32), live, cap)
    nan = z != z
    if MEMBERS == 0:
        if HALF:
            bits = entries.to(tl.int16, bitcast=True)
        else:
            bits = entries.to(tl.int32, bitcast=True)
        keys, _ = order_keys(bits, HALF, INFINITY)
    elif MEMBERS == 1:
        keys, spoiled = order_keys(load_lanes(chooser_row, lanes, live, whole, 0), HALF, INFINITY)
        nan |= spoiled
    else:
        first_lane = begin + 8 * tl.arange(0, BLOCK // 8)
        byte = tl.load(chooser_row + (first_lane >> 3), mask=first_lane < end, other=0)
        bits = byte.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]
        keys = tl.reshape(bits & 1, [BLOCK]).to(tl.uint32)
    return lanes, whole, z, cap_slope, keys, nan, live


@triton.jit
def chooser_start(
    chooser_ptr, z_row, row, per, outer, inner, MEMBERS: tl.constexpr, SHIFT: tl.constexpr
):
    if MEMBERS == 0:
        chooser_row = z_row
    elif MEMBERS == 1:
        chooser_row, _ = row_start(chooser_ptr, row, per, outer, inner, SHIFT)
    else:
        chooser_row = chooser_ptr + row.to(tl.int64) * inner  # bytes
    return chooser_row


@triton.jit
def store_bits(bitmap_row, member, begin, words, BLOCK: tl.constexpr):
    """A block of S as one bit a lane, 32 to a word."""
    bits = tl.reshape(member.to(tl.int32), [BLOCK // 32, 32]) << tl.arange(0, 32)[None, :]
    word = begin // 32 + tl.arange(0, BLOCK // 32)
    tl.store(bitmap_row + word, tl.sum(bits, 1), mask=word < words)


@triton.jit
def set_bits(
    indices_ptr,
    bitmap_ptr,
    k,
    words,
    per,
    outer,
    inner,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Indices ``[N, k]`` -> a bit a lane of the walk over z, ``[N, words]``, zeros before."""
    row = tl.program_id(0)
    # only the lane of column 0 is wanted, not the pointer
    _, first = row_start(bitmap_ptr, row, per, outer, inner, SHIFT)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < k
    row = row.to(tl.int64)
    lane = tl.load(indices_ptr + row * k + place, mask=inside, other=0).to(tl.int32) + first
    bit = tl.full([BLOCK], 1, tl.int32) << (lane & 31)
    tl.atomic_or(bitmap_ptr + row * words + (lane >> 5), bit, mask=inside, sem="relaxed")


def write_bitmap(indices: Tensor, layout: Layout, bitmap: Tensor) -> None:
    """S as indices -> ``bitmap``, int32 ``[N, words]``, zeros before."""
    indices = indices.reshape(-1, indices.shape[-1]).contiguous()
    rows, k = indices.shape
    block = min(1024, triton.next_power_of_2(k))
    set_bits[(rows, triton.cdiv(k, block))](
        indices,
        bitmap,
        k,
        bitmap.shape[1],
        layout.per,
        *layout.strides[:2],
        SHIFT=layout.shift,
        BLOCK=block,
    )

"""Top-k membership mask, evaluated per element while a row is streamed.

Where the reference's row chooses, S is the threshold and tie cut of `select`; the pass that takes
the statistics finds the cut, and leaves a bitmap of one bit a lane, so that the gradient reads a
bit an entry and the reference's row is not needed any more. Given indices become such a bitmap
first. Where the current row chooses, threshold and cut serve both passes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from palu_kernels.triton.radix_keys import order_keys
from palu_kernels.triton.row_io import (
    RowLaunch,
    apply_softcap,
    load_row_block,
    row_start,
)

# what says what is in S: the logits themselves, the reference's logits, or a bitmap
CURRENT, REFERENCE, BITMAP = (tl.constexpr(i) for i in range(3))


@triton.jit
def load_block(
    z_row,
    scores_row,
    begin,
    first,
    end,
    cap,
    SELECT_BY: tl.constexpr,
    IS_16BIT: tl.constexpr,
    INFINITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """-> (offsets, whether the block lies inside the row, z in float32 under the cap, the cap's
    slope there, the score source's keys (bitmap: bits), lanes with a NaN in either row, mask).

    Keys are of the row before the cap, which keeps the order and would only make ties."""
    offsets = begin + tl.arange(0, BLOCK)
    mask = (offsets >= first) & (offsets < end)
    full_block = (begin >= first) & (begin + BLOCK <= end)
    entries = load_row_block(z_row, offsets, mask, full_block, float("-inf"))
    z, cap_slope = apply_softcap(entries.to(tl.float32), mask, cap)
    nan = z != z
    if SELECT_BY == CURRENT:
        if IS_16BIT:
            bits = entries.to(tl.int16, bitcast=True)
        else:
            bits = entries.to(tl.int32, bitcast=True)
        keys, _ = order_keys(bits, IS_16BIT, INFINITY)
    elif SELECT_BY == REFERENCE:
        keys, has_nan = order_keys(
            load_row_block(scores_row, offsets, mask, full_block, 0), IS_16BIT, INFINITY
        )
        nan |= has_nan
    else:
        first_lane = begin + 8 * tl.arange(0, BLOCK // 8)
        byte = tl.load(scores_row + (first_lane >> 3), mask=first_lane < end, other=0)
        bits = byte.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]
        keys = tl.reshape(bits & 1, [BLOCK]).to(tl.uint32)
    return offsets, full_block, z, cap_slope, keys, nan, mask


@triton.jit
def scores_start(
    scores_ptr,
    z_row,
    row,
    rows_per_batch,
    stride_batch,
    stride_row,
    SELECT_BY: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
):
    if SELECT_BY == CURRENT:
        scores_row = z_row
    elif SELECT_BY == REFERENCE:
        scores_row, _ = row_start(
            scores_ptr, row, rows_per_batch, stride_batch, stride_row, HAS_OFFSET
        )
    else:
        scores_row = scores_ptr + row.to(tl.int64) * stride_row  # bytes
    return scores_row


@triton.jit
def store_bits(bitmap_row, member, begin, words, BLOCK: tl.constexpr):
    """A block of S as one bit a lane, 32 to a word."""
    bits = tl.reshape(member.to(tl.int32), [BLOCK // 32, 32]) << tl.arange(0, 32)[None, :]
    word = begin // 32 + tl.arange(0, BLOCK // 32)
    tl.store(bitmap_row + word, tl.sum(bits, 1), mask=word < words)


@triton.jit
def _set_bits_kernel(
    indices_ptr,
    bitmap_ptr,
    k,
    words,
    rows_per_batch,
    stride_batch,
    stride_row,
    HAS_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Indices `[N, k]` -> a bit a lane of the walk over z, `[N, words]`, zeros before."""
    row = tl.program_id(0)
    # only the lane of column 0 is wanted, not the pointer
    _, first = row_start(bitmap_ptr, row, rows_per_batch, stride_batch, stride_row, HAS_OFFSET)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < k
    row = row.to(tl.int64)
    lane = tl.load(indices_ptr + row * k + place, mask=inside, other=0).to(tl.int32) + first
    bit = tl.full([BLOCK], 1, tl.int32) << (lane & 31)
    tl.atomic_or(bitmap_ptr + row * words + (lane >> 5), bit, mask=inside, sem="relaxed")


def write_bitmap(indices: Tensor, launch: RowLaunch, bitmap: Tensor) -> None:
    """S as indices -> `bitmap`, int32 `[N, words]`, zeros before."""
    indices = indices.reshape(-1, indices.shape[-1]).contiguous()
    rows, k = indices.shape
    block = min(1024, triton.next_power_of_2(k))
    _set_bits_kernel[(rows, triton.cdiv(k, block))](
        indices,
        bitmap,
        k,
        bitmap.shape[1],
        launch.rows_per_batch,
        *launch.strides[:2],
        HAS_OFFSET=launch.has_offset,
        BLOCK=block,
    )

"""Who is in S: the test that kernels make entry by entry while a row streams.

S is either the threshold and tie cut of ``select`` on the chooser's row (the reference's or the
current one), or, where it was given as indices, a bitmap of one bit a column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from palu_kernels.triton.keys import order_keys
from palu_kernels.triton.rows import Layout, as_integers, load_lanes, row_start

CURRENT, REFERENCE, BITMAP = 0, 1, 2  # who says what is in S


@triton.jit
def load_block(
    z_row,
    chooser_row,
    begin,
    first,
    end,
    MEMBERS: tl.constexpr,
    HALF: tl.constexpr,
    INFINITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """-> (lanes, whether the block lies inside the row, z in float32, chooser's keys (bitmap:
    bits), lanes with a NaN in either row, lanes that take part)."""
    lanes = begin + tl.arange(0, BLOCK)
    live = (lanes >= first) & (lanes < end)
    whole = (begin >= first) & (begin + BLOCK <= end)
    entries = load_lanes(z_row, lanes, live, whole, float("-inf"))
    z = entries.to(tl.float32)
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
        column = lanes - first
        byte = tl.load(chooser_row + (column >> 3), mask=live, other=0).to(tl.int32)
        keys = ((byte >> (column & 7)) & 1).to(tl.uint32)
    return lanes, whole, z, keys, nan, live


@triton.jit
def chooser_start(
    chooser_ptr, z_row, row, per, outer, inner, MEMBERS: tl.constexpr, SHIFT: tl.constexpr
):
    if MEMBERS == 0:
        chooser_row = z_row
    elif MEMBERS == 1:
        chooser_row, _ = row_start(chooser_ptr, row, per, outer, inner, SHIFT)
    else:
        chooser_row = chooser_ptr + row.to(tl.int64) * inner
    return chooser_row


@triton.jit
def set_bits(indices_ptr, bitmap_ptr, k, words, BLOCK: tl.constexpr):
    """Indices ``[N, k]`` -> a bit a column, ``[N, words]`` int32 zeros before."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.load(indices_ptr + row * k + place, mask=place < k, other=0).to(tl.int32)
    bit = tl.full([BLOCK], 1, tl.int32) << (column & 31)
    tl.atomic_or(bitmap_ptr + row * words + (column >> 5), bit, mask=place < k, sem="relaxed")


def bitmap_of(indices: Tensor, columns: int) -> Tensor:
    """int32 ``[N, ceil(V / 32)]``, a bit a column; the bytes of a word are in column order."""
    indices = indices.reshape(-1, indices.shape[-1]).contiguous()
    rows, k = indices.shape
    bitmap = indices.new_zeros((rows, triton.cdiv(columns, 32)), dtype=torch.int32)
    if rows:
        block = min(1024, triton.next_power_of_2(k))
        set_bits[(rows, triton.cdiv(k, block))](indices, bitmap, k, bitmap.shape[1], BLOCK=block)
    return bitmap


@dataclass(frozen=True)
class Chooser:
    """Whose row a kernel tests membership on, beside a layout that begins with the logits."""

    members: int
    layout: Layout
    tensor: Tensor
    strides: tuple[int, int]

    @classmethod
    def of(cls, ref_logits: Tensor | None, bitmap: Tensor | None, *tensors: Tensor) -> Chooser:
        if bitmap is not None:
            layout = Layout.of(*tensors)
            return cls(BITMAP, layout, bitmap.view(torch.uint8), (0, 4 * bitmap.shape[1]))
        if ref_logits is None:
            layout = Layout.of(*tensors)
            return cls(CURRENT, layout, layout.tensors[0], (0, 0))
        layout = Layout.of(*tensors, as_integers(ref_logits))
        return cls(REFERENCE, layout, layout.tensors[-1], layout.strides[-2:])

"""Rows in memory: how a kernel walks one, and how a launcher describes it.

A row is read in blocks of lanes. It is walked from the aligned address at or below its first entry:
its column c is lane `first + c` with `first < 8`, blocks inside the row are loaded whole, and only
the block at either end is masked. A loop whose loads are all masked would be compiled to one narrow
load an entry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra import libdevice

from palu_kernels import tuned
from palu_kernels.layout import (
    ALIGNED,
    LANES,
    adjacent,
    empty_rows_like,
    row_steps,
    starts_alike,
)

INTEGERS = {2: torch.int16, 4: torch.int32}
# By bytes of an entry: (rows of up to so many lanes, lanes in a block, warps). A thread makes two
# 16-byte loads a row where the row is long enough: with four, bfloat16 takes up to 173 registers on
# sm_90 where two take 110 and one 84, and a multiprocessor holds half as many warps; with one there
# are fewer loads in flight (`benchmarks/results/block_sizes.txt`). Reasoned from the compiler's
# output: no card has been asked.
BLOCKS = {
    2: ((256, 256, 1), (512, 512, 1), (1024, 1024, 2), (2048, 2048, 4), (math.inf, 4096, 8)),
    4: ((256, 256, 1), (512, 512, 2), (1024, 1024, 4), (math.inf, 2048, 8)),
}


@triton.jit
def row_start(ptr, row, rows_per_batch, stride_batch, stride_row, HAS_OFFSET: tl.constexpr):
    """-> (pointer to lane 0, lane of column 0) of a row in `[B, rows_per_batch, V]`."""
    row = row.to(tl.int64)
    offset = (row // rows_per_batch) * stride_batch + (row % rows_per_batch) * stride_row
    if HAS_OFFSET:
        aligned = (offset // 8) * 8
        start = ptr + aligned
        first = (offset - aligned).to(tl.int32)
    else:
        start = ptr + offset
        first = 0
    return start, first


# Float32's lowest number, which 16-bit types do not have: the maximum of a row before any entry has
# been seen, so that differences to it need no special case.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def is_live(z):
    """Not masked, that is not -inf (a NaN is told apart elsewhere); compared in float32, since
    16-bit types do not have the bound."""
    return z >= LOWEST


@triton.jit
def _interpreted_exp2(x):
    return tl.exp2(x)


# NVIDIA's library flushes results below the normal numbers to 0, where `tl.exp2` spends three more
# instructions on them; the interpreter has no library.
exp2 = _interpreted_exp2 if knobs.runtime.interpret else libdevice.exp2


@triton.jit
def exp(x):
    """e^x of float32, 0 instead of a denormal number where that is faster."""
    return exp2(x * 1.4426950408889634)


@triton.jit
def load_row_block(ptr, offsets, mask, full_block, other):
    """A block of a row: one wide load if it lies inside the row, else what the mask leaves."""
    if full_block:
        block = tl.load(ptr + offsets)
    else:
        block = tl.load(ptr + offsets, mask=mask, other=other)
    return block


@triton.jit
def store_row_block(ptr, offsets, mask, full_block, block):
    if full_block:
        tl.store(ptr + offsets, block)
    else:
        tl.store(ptr + offsets, block, mask=mask)


@triton.jit
def apply_softcap(x, mask, cap):
    """-> (cap * tanh(x / cap), its derivative); -inf and 0 off the mask. `cap` None: (x,
    1).

    By exp(-2|x| / cap), so that neither overflows and the slope of a saturated entry keeps its
    digits. One division serves all entries, and one more each entry, by a number in [1, 2].
    """
    if cap is None:
        z = x
        slope = 1.0
    else:
        shrunk = exp2(tl.abs(x) * (-2.8853900817779268 / cap))
        share = 1.0 / (1.0 + shrunk)
        size = (cap - cap * shrunk) * share
        z = tl.where(x < 0, -size, size)
        slope = 4.0 * shrunk * share * share
        if mask is not None:
            z = tl.where(mask, z, float("-inf"))
            slope = tl.where(mask, slope, 0.0)
    return z, slope


@triton.jit
def load_row(ptr, offsets, mask, full_block, cap):
    """A block of a row after its softcap, float32; -inf off the mask. Only the block at a row's end
    asks the mask."""
    if full_block:
        z, _slope = apply_softcap(tl.load(ptr + offsets).to(tl.float32), None, cap)
    else:
        z = tl.load(ptr + offsets, mask=mask, other=float("-inf")).to(tl.float32)
        z, _slope = apply_softcap(z, mask, cap)
    return z


# Statistics of a row without a barrier in the loop: a block `[BLOCK]` becomes `[BLOCK / g, g]`,
# where the g entries of a line lie in one 16-byte load and so in one thread. Accumulators are
# `[BLOCK / g]`, the loop reduces axis 1 alone, and after it one reduction goes over the threads.


@triton.jit
def by_load(block, ENTRY_BITS: tl.constexpr):
    """`[BLOCK]` -> `[BLOCK / g, g]`, g entries of so many bits in a load of 16 bytes: a reduction
    of axis 1 stays within a thread."""
    g: tl.constexpr = 128 // ENTRY_BITS
    return tl.reshape(block, [block.shape[0] // g, g])


@triton.jit
def drop(top, new_top):
    """top - new_top, at least `LOWEST`: finite where nothing has been seen before, whose weight
    exp(drop) is 0."""
    return tl.maximum(top - new_top, LOWEST)


@dataclass(frozen=True)
class RowLaunch:
    """Tensors of one shape `[N, V]` or `[B, T, V]`, walked together by a program for every row and
    split of it."""

    tensors: tuple[Tensor, ...]
    strides: tuple[int, ...]  # of batch and of row, for every tensor, in elements
    rows: int
    n_cols: int
    rows_per_batch: int
    block: int
    warps: int
    splits: int
    split_size: int

    @classmethod
    def of(
        cls, first: Tensor, *others: Tensor, out: Tensor | None = None, programs: int = 1
    ) -> RowLaunch:
        """Take the rows of `first` as they are (a copy if its columns are not adjacent); those of
        the others are copied if they start otherwise.

        A row is cut into splits of two blocks at least, until there are about `programs` times as
        many programs as fill the chip. What was measured on such a card (`palu_kernels.tuned`) is
        taken instead, where a row is longer than a block.

        Raises:
            ValueError: `out`, which comes last, starts otherwise: what is written into a copy would
                be lost (`empty_rows_like` makes one that does not).
        """
        first = first if adjacent(first) else first.contiguous()
        tensors = (first, *(_laid_out(t, first) for t in others))
        if out is not None:
            if not starts_alike(out, first):
                raise ValueError(
                    f"out has strides {out.stride()}; its rows must start as those of the logits, "
                    f"whose strides are {first.stride()}"
                )
            tensors = (*tensors, out)
        shape = first.shape
        rows, n_cols = math.prod(shape[:-1]), shape[-1]
        steps = [row_steps(t) for t in tensors]
        # rows that are evenly spaced in every tensor are one dimension
        even = rows == shape[-2] or all(batch == row * shape[-2] for batch, row in steps)
        rows_per_batch = max(rows, 1) if even else shape[-2]
        strides = tuple(s for batch, row in steps for s in (0 if even else batch, row))
        block, warps = block_of(n_cols, first.element_size())
        programs *= programs_wanted(first.device)
        if n_cols > block:
            reads, writes = len(tensors) - (out is not None), int(out is not None)
            walk = tuned.Walk(reads, writes, first.element_size(), n_cols, rows)
            if (own := tuned.settings_of(first.device, walk)) is not None:
                block, warps = own.block, own.warps
                programs = own.programs * multiprocessors(first.device)
        blocks = triton.cdiv(n_cols + LANES - 1, block)
        wanted = programs // max(rows, 1)
        each = triton.cdiv(blocks, max(1, min(blocks // 2, wanted)))
        splits = triton.cdiv(blocks, each)
        return cls(
            tensors, strides, rows, n_cols, rows_per_batch, block, warps, splits, each * block
        )

    @property
    def grid(self) -> tuple[int, int]:
        return self.rows, self.splits

    @property
    def sizes(self) -> tuple[int, ...]:
        """The arguments `n_cols, rows_per_batch`, strides and `split_size` of a kernel."""
        return self.n_cols, self.rows_per_batch, *self.strides, self.split_size

    @property
    def has_offset(self) -> bool:
        return any(s % ALIGNED for s in self.strides)

    @property
    def constants(self) -> dict[str, int | bool]:
        """The constants of a kernel, and its warps."""
        return {"HAS_OFFSET": self.has_offset, "BLOCK": self.block, "num_warps": self.warps}


def _laid_out(t: Tensor, like: Tensor) -> Tensor:
    return t if starts_alike(t, like) else empty_rows_like(like).view(t.dtype).copy_(t)


def as_integers(t: Tensor) -> Tensor:
    """The same bits as integers: what a key is made of (and the interpreter reads safely)."""
    return t.view(INTEGERS[t.element_size()])


def block_of(n_cols: int, element_size: int) -> tuple[int, int]:
    """-> (lanes in a block, warps) of a row of so many columns."""
    offsets = n_cols + LANES - 1
    return next((block, warps) for most, block, warps in BLOCKS[element_size] if offsets <= most)


def programs_wanted(device: torch.device) -> int:
    """Programs that fill the chip: four a multiprocessor."""
    return 4 * multiprocessors(device)


def multiprocessors(device: torch.device) -> int:
    return _multiprocessors(device.type, device.index)


@lru_cache
def _multiprocessors(kind: str, index: int | None) -> int:
    if kind == "cuda":
        return torch.cuda.get_device_properties(index or 0).multi_processor_count
    if kind == "xpu":
        return torch.xpu.get_device_properties(index or 0).max_compute_units
    return 132  # stands in for an H100, so that what is tested on the CPU is what runs there

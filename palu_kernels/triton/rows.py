"""Rows in memory: how a kernel walks one, and how a launcher describes it.

A row is read in blocks of lanes. A wide (16-byte) load needs a start that the compiler can prove
to be aligned, and rows of an odd vocabulary start anywhere. So a row is walked from the aligned
address at or below its first entry: its column c is lane ``first + c`` with ``first < LANES``, all
full blocks are loaded whole, and only the block at either end is masked. A loop whose loads are
all masked would be compiled to one narrow load an element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES = 8  # 16 bytes of a 16-bit type; a multiple of the 4 lanes that float32 needs
INTEGERS = {2: torch.int16, 4: torch.int32}


@triton.jit
def row_start(ptr, row, per, outer, inner, SHIFT: tl.constexpr):
    """-> (pointer to lane 0, lane of column 0) of a row in ``[rows // per, per, V]``."""
    row = row.to(tl.int64)
    offset = (row // per) * outer + (row % per) * inner
    if SHIFT:
        aligned = (offset // 8) * 8
        start = ptr + aligned
        first = (offset - aligned).to(tl.int32)
    else:
        start = ptr + offset
        first = 0
    return start, first


@triton.jit
def load_lanes(ptr, lanes, live, whole, other):
    """A block of a row: one wide load if it lies inside the row, else only the live lanes."""
    if whole:
        block = tl.load(ptr + lanes)
    else:
        block = tl.load(ptr + lanes, mask=live, other=other)
    return block


@triton.jit
def store_lanes(ptr, lanes, live, whole, block):
    if whole:
        tl.store(ptr + lanes, block)
    else:
        tl.store(ptr + lanes, block, mask=live)


@dataclass(frozen=True)
class Layout:
    """Tensors of one shape ``[N, V]`` or ``[B, T, V]``, ready to be walked together."""

    tensors: tuple[Tensor, ...]
    strides: tuple[int, ...]  # outer and inner of every tensor, in elements
    rows: int
    columns: int
    per: int
    shift: bool

    @classmethod
    def of(cls, *tensors: Tensor) -> Layout:
        """Copies nothing but a tensor whose columns are not adjacent."""
        tensors = tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)
        shape = tensors[0].shape
        rows, columns = math.prod(shape[:-1]), shape[-1]
        steps = [_steps(t) for t in tensors]
        # rows that are evenly spaced in every tensor are one dimension
        even = all(outer == inner * shape[-2] for outer, inner in steps)
        per = max(rows, 1) if even else shape[-2]
        steps = [(0, inner) if even else (outer, inner) for outer, inner in steps]
        residues = {(outer % LANES, inner % LANES) for outer, inner in steps}
        # one walk serves all tensors only if their rows start alike; aligned rows need no shift
        shift = len(residues) == 1 and residues != {(0, 0)}
        strides = tuple(s for step in steps for s in step)
        return cls(tensors, strides, rows, columns, per, shift)

    def slices(self, programs: int, block: int) -> tuple[int, int]:
        """-> (number of slices of a row, lanes in a slice) for about ``programs`` programs."""
        blocks = triton.cdiv(self.columns + LANES - 1, block)
        wanted = min(blocks, max(1, programs // max(self.rows, 1)))
        each = triton.cdiv(blocks, wanted)
        return triton.cdiv(blocks, each), each * block


def _steps(t: Tensor) -> tuple[int, int]:
    if t.dim() == 3:
        return t.stride(0), t.stride(1)
    return t.stride(0) * t.shape[0], t.stride(0)


def as_integers(t: Tensor) -> Tensor:
    """The same bits as integers: what a key is made of (and the interpreter reads safely)."""
    return t.view(INTEGERS[t.element_size()])


def block_of(columns: int, element_size: int) -> tuple[int, int]:
    """-> (lanes in a block, warps): two 16-byte loads a thread where the row is long enough."""
    block = min(8192 // element_size, max(256, triton.next_power_of_2(columns + LANES - 1)))
    return block, max(1, block * element_size // 1024)


def programs_wanted(device: torch.device) -> int:
    """Programs that fill the chip: four a multiprocessor."""
    return 4 * _multiprocessors(device.type, device.index)


@lru_cache
def _multiprocessors(kind: str, index: int | None) -> int:
    if kind == "cuda":
        return torch.cuda.get_device_properties(index or 0).multi_processor_count
    if kind == "xpu":
        return torch.xpu.get_device_properties(index or 0).max_compute_units
    return 132  # stands in for an H100, so that what is tested on the CPU is what runs there

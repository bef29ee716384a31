"""Where rows start: one layout for all tensors that a kernel walks together.

A wide load needs a start on 16 bytes. A kernel walks a row from the aligned address at or below
its first entry, and it can walk several tensors in one go if their rows start alike: at the same
number of entries after an aligned address. Gradients are laid out so, and what was given otherwise
is copied into such a layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 8  # 16 bytes of a 16-bit type; a multiple of the 4 entries that float32 needs
ALIGNED = 16  # what Triton can prove of a stride: a multiple of 16


def row_steps(t: Tensor) -> tuple[int, int]:
    """Strides of the two leading dimensions of ``[B, T, V]``; ``[N, V]`` counts as one batch."""
    return (t.stride(0), t.stride(1)) if t.dim() == 3 else (0, t.stride(0))


def starts_alike(t: Tensor, like: Tensor) -> bool:
    """Whether every row of ``t`` starts as that of ``like`` does. Both have adjacent columns."""
    pairs = zip(row_steps(t), row_steps(like), strict=True)
    return t.stride(-1) == 1 and all((a - b) % LANES == 0 for a, b in pairs)


def empty_rows_like(t: Tensor) -> Tensor:
    """Uninitialised, of the shape and dtype of ``t``: contiguous, or with rows spaced a little
    wider so that they start as those of ``t`` do."""
    if t.stride(-1) != 1 or t.is_contiguous():
        return torch.empty_like(t, memory_format=torch.contiguous_format)
    outer, inner = row_steps(t)
    columns = t.shape[-1]
    inner = columns + (inner - columns) % LANES
    if t.dim() == 2:
        return t.new_empty_strided(t.shape, (inner, 1))
    block = inner * t.shape[1]
    return t.new_empty_strided(t.shape, (block + (outer - block) % LANES, inner, 1))


def bitmap_words(columns: int) -> int:
    """32-bit words for a bit a lane: a row starts up to 7 lanes after the first."""
    return (columns + LANES - 1 + 31) // 32

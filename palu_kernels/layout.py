"""Row alignment: give all operands the same row offset modulo 16 bytes, for loads 16 bytes wide.

A wide load needs a start on 16 bytes. A kernel walks a row from the aligned address at or below
its first entry, and it can walk several tensors in one go if their rows start alike: at the same
number of entries after an aligned address. Gradients are laid out so, and what was given otherwise
is copied into such a layout.
"""

from __future__ import annotations

from torch import Tensor

LANES = 8  # 16 bytes of a 16-bit type; a multiple of the 4 entries that float32 needs
ALIGNED = 16  # what Triton can prove of a stride: a multiple of 16
# PyTorch's bfloat16 products on CPUs with AMX read every row of their left side up to the next
# multiple of 32 entries, and take 0 times what they find for 0 (oneDNN issue 5717).
READ = 32


def adjacent(t: Tensor) -> bool:
    """Whether the entries of a row lie side by side."""
    return t.shape[-1] == 1 or t.stride(-1) == 1


def row_steps(t: Tensor) -> tuple[int, int]:
    """Strides of the two leading dimensions of `[B, T, V]`; `[N, V]` counts as one batch.

    0 where a dimension has one entry: its stride is never stepped, and PyTorch leaves anything
    there (a contiguous tensor's included), so it must not decide whether rows start alike.
    """
    outer, inner = (t.stride(0), t.stride(1)) if t.dim() == 3 else (0, t.stride(0))
    return outer if t.dim() == 3 and t.shape[0] > 1 else 0, inner if t.shape[-2] > 1 else 0


def starts_alike(t: Tensor, like: Tensor) -> bool:
    """Whether every row of `t` starts as that of `like` does, and can be walked."""
    pairs = zip(row_steps(t), row_steps(like), strict=True)
    return adjacent(t) and all((a - b) % LANES == 0 for a, b in pairs)


def strides_like(t: Tensor) -> tuple[int, ...]:
    """Strides of a tensor of the shape of `t` that starts alike: contiguous ones, or with rows
    spaced a little wider."""
    columns = t.shape[-1]
    if t.is_contiguous() or not adjacent(t):
        steps = (columns * max(t.shape[-2], 1), columns)
    else:
        outer, inner = row_steps(t)
        inner = columns + (inner - columns) % LANES
        block = inner * t.shape[-2]
        steps = (block + (outer - block) % LANES, inner)
    return (*steps[3 - t.dim() :], 1)


def empty_rows_like(t: Tensor) -> Tensor:
    """Uninitialised, of the shape and dtype of `t`, with rows that start as those of `t` do."""
    return t.new_empty_strided(t.shape, strides_like(t))


def gradient_rows_like(t: Tensor) -> Tensor:
    """`empty_rows_like` with zeros between the rows: a product with the gradient may read them
    (`READ`)."""
    out = empty_rows_like(t)
    if not out.is_contiguous():
        outer, inner = (0, out.stride(0)) if t.dim() == 2 else out.stride()[:2]
        batches, rows, columns = out.shape if t.dim() == 3 else (1, *out.shape)
        last = (rows - 1) * inner + columns  # of a batch: where its last row ends
        between = out.as_strided((batches, rows - 1, inner - columns), (outer, inner, 1), columns)
        between.zero_()
        if batches > 1:
            out.as_strided((batches - 1, outer - last), (outer, 1), last).zero_()
    return out

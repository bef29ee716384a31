"""Which retain rows go beside which forget batch: a pure function, so that a resumed run sees the
same ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

MEGABATCH = 50  # as in transformers' LengthGroupedSampler


def retain_rows(
    size: int,
    batch_size: int,
    *,
    seed: int,
    step: int,
    micro_step: int,
    micro_steps: int,
    rank: int = 0,
    world_size: int = 1,
    lengths: Sequence[int] | None = None,
) -> list[int]:
    """Row numbers of the retain batch for one micro-step.

    The retain set is walked through in one seeded permutation after another, so every row is seen
    equally often.
    Nothing is remembered between calls: the same arguments give the same rows.

    Args:
        size: rows in the retain set, at least 1.
        batch_size: rows wanted.
        seed: of the permutations.
        step: optimizer steps done so far.
        micro_step: which micro-batch of this step, `0 <= micro_step < micro_steps`.
        micro_steps: gradient accumulation steps of the run.
        rank, world_size: processes take turns, so they see different rows.
        lengths: tokens of every row, to put rows of like length into a batch: each stretch of
            MEGABATCH batches of a permutation is sorted by it, and its batches are shuffled.
    """
    start = (((step * micro_steps) + micro_step) * world_size + rank) * batch_size
    rows: list[int] = []
    while len(rows) < batch_size:
        round_number, offset = divmod(start + len(rows), size)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + round_number) % 2**63)
        order = torch.randperm(size, generator=generator).tolist()
        if lengths is not None:
            order = _by_length(order, lengths, batch_size, generator)
        rows += order[offset : offset + batch_size - len(rows)]
    return rows


def _by_length(
    order: list[int], lengths: Sequence[int], batch_size: int, generator: torch.Generator
) -> list[int]:
    grouped: list[int] = []
    stretch = MEGABATCH * batch_size
    for start in range(0, len(order), stretch):
        rows = sorted(order[start : start + stretch], key=lambda row: lengths[row])
        batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        turn = torch.randperm(len(batches), generator=generator).tolist()
        grouped += [row for number in turn for row in batches[number]]
    return grouped

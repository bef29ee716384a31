"""Which retain rows go beside which forget rows: a pure function, so that a resumed run sees the
same ones, and so do runs that split their steps otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import torch

MEGABATCH = 50  # as in transformers' LengthGroupedSampler


def retain_rows(
    size: int,
    places: range,
    *,
    seed: int,
    lengths: Sequence[int] | None = None,
    group: int = 1,
) -> list[int]:
    """Row numbers of the retain set at some places of an endless walk through it.

    The walk is one seeded permutation after another, so every row is seen equally often, but for
    what a short last step of a pass leaves out. Nothing is remembered between calls: the same
    arguments give the same rows.

    Args:
        size: rows in the retain set, at least 1.
        places: of the walk, from 0 on.
        seed: of the permutations.
        lengths: tokens of every row, to put rows of like length together: each stretch of MEGABATCH
            groups of a permutation is sorted by it, and its groups are shuffled.
        group: rows that should be alike: those of a step.
    """
    rows: list[int] = []
    while len(rows) < len(places):
        round_number, offset = divmod(places.start + len(rows), size)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + round_number) % 2**63)
        order = torch.randperm(size, generator=generator).tolist()
        if lengths is not None:
            order = _by_length(order, lengths, group, generator)
        rows += order[offset : offset + len(places) - len(rows)]
    return rows


def _by_length(
    order: list[int], lengths: Sequence[int], group: int, generator: torch.Generator
) -> list[int]:
    grouped: list[int] = []
    stretch = MEGABATCH * group
    for start in range(0, len(order), stretch):
        rows = sorted(order[start : start + stretch], key=lambda row: lengths[row])
        groups = [rows[i : i + group] for i in range(0, len(rows), group)]
        turn = torch.randperm(len(groups), generator=generator).tolist()
        grouped += [row for number in turn for row in groups[number]]
    return grouped

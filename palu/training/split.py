"""How a pass over a data set is dealt out to processes and micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


@dataclass(frozen=True)
class Split:
    """Deals a pass out as accelerate does: micro-batch `number` of a process takes the next `batch`
    rows, processes in turn.

    Behind the last row accelerate starts again with the first ones, so that every process has
    equally many full batches. Such repeats are no part of a step: `own` leaves them out.

    Attributes:
        rows: of the data set; None where that is not known, or another one deals.
        batch: rows of one micro-batch of one process.
        rank, processes: this process, and how many there are.
    """

    rows: int | None
    batch: int
    rank: int
    processes: int

    def own(self, number: int) -> range:
        """Places, in the pass, of the rows of micro-batch `number` of this process."""
        places = self.dealt(number)
        if self.rows is None:
            return places
        return range(places.start, max(min(places.stop, self.rows), places.start))

    def dealt(self, number: int) -> range:
        """As `own`, repeats included."""
        start = (number * self.processes + self.rank) * self.batch
        return range(start, start + self.batch)

    def first_place(self, number: int) -> int:
        """Where in the pass the micro-batches `number` of all processes begin."""
        return number * self.processes * self.batch


class LengthGroups(LengthGroupedSampler):
    """Rows of like length together, in an order that depends on seed and epoch alone: the same in
    every process and after a resume. (Transformers draws it from the global random state.)

    Args:
        group: rows of a whole step.
        lengths: tokens of every row.
        seed: of the order.
    """

    def __init__(self, group: int, lengths: list[int], seed: int) -> None:
        super().__init__(group, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called at the start of every epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()

"""Which examples make a step: how an epoch is dealt out, which retain examples go with it, and what
its means are over."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_pt_utils import LengthGroupedSampler

from palu.methods import Method
from palu.methods.micro_batch import (
    COUNTS,
    DENOMINATORS,
    RETAIN,
    ROLES,
    RowRoles,
    only_inputs,
    together,
)
from palu.models.inputs import stacked

MEGABATCH = 50  # as in transformers' LengthGroupedSampler


@dataclass(frozen=True)
class Sharding:
    """Deal a pass out as accelerate does: micro-batch `number` of a process takes the next `batch`
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


@dataclass(frozen=True)
class RetainSampler:
    """Which retain rows go with which forget rows.

    Attributes:
        dataset: the retain set.
        collator: makes a batch of a list of its rows.
        ratio: retain rows for a forget row.
        step_rows: retain rows of a whole step, over all micro-batches and processes.
        seed: of the order.
        lengths: tokens of every row, where rows of like length go together.
    """

    dataset: Any
    collator: Callable[[list], Mapping[str, Any]]
    ratio: Fraction
    step_rows: int
    seed: int
    lengths: Sequence[int] | None

    def batch(self, own: range, origin: int, step: int) -> dict[str, Any]:
        """The retain rows that go with forget rows, at least one.

        They are counted from the first row of the step: the rows of a step are the same however it
        is split.

        Args:
            own: places of the forget rows in the pass.
            origin: place of the first forget row of the step.
            step: optimizer steps done so far.
        """
        first, last = (math.ceil((place - origin) * self.ratio) for place in (own.start, own.stop))
        walked = step * self.step_rows
        places = range(walked + first, walked + max(last, first + 1))
        options = {"seed": self.seed, "lengths": self.lengths, "group": self.step_rows}
        rows = retain_rows(len(self.dataset), places, **options)
        return dict(self.collator([self.dataset[i] for i in rows]))


class BatchBuilder:
    """Build the micro-batches of one process, step by step or in an evaluation.

    A process whose micro-batch has no example of its own (the last, uneven step of an epoch) still
    runs one forward and backward, since the others wait for its gradients, and divides it by
    nothing: it adds zero.

    Args:
        sharding: how the forget examples are dealt out.
        retain: None without a retain set.
        normalization: `step` or `micro_batch`, see `PALUConfig`. With the second one repeated
            examples count, as in the released code.
        method: gives the roles of tokens, and what its terms are means over.
    """

    def __init__(
        self,
        sharding: Sharding,
        retain: RetainSampler | None,
        normalization: str,
        method: Method,
    ) -> None:
        self.sharding, self.retain, self.normalization = sharding, retain, normalization
        self.method = method

    def step(
        self,
        samples: Sequence[Mapping[str, Any]],
        first: int,
        step: int,
        reduce: Callable[[Tensor], Tensor],
    ) -> list[dict[str, Any]]:
        """Return the forget micro-batches of one step, each with its retain micro-batch under
        `RETAIN` (or None) and both with the step's denominators.

        Args:
            samples: the forget batches of this process, at least one.
            first: which micro-batch of the epoch the first of them is.
            step: optimizer steps done so far.
            reduce: sums a tensor over processes.
        """
        per_step = self.normalization == "step"
        origin = self.sharding.first_place(first)
        batches, rows, used = [], [], []
        for number, sample in enumerate(samples, first):
            own = self.sharding.own(number)
            if not per_step and self.sharding.processes > 1:
                own = self.sharding.dealt(number)
            batches.append(self._with_retain(sample, own, origin, step))
            rows.append(self._counts(batches[-1]))
            used.append(bool(own))
        counts = torch.tensor(rows) * torch.tensor(used)[:, None]
        if per_step:
            divisors = reduce(counts.sum(0)).clamp(min=1).repeat(len(batches), 1)
        else:
            divisors = counts.clamp(min=1) * len(batches) * self.sharding.processes
        for batch, divisor, counts_here in zip(batches, divisors, used, strict=True):
            _divide_by(divisor * counts_here, batch)
        return batches

    def evaluation(self, batch: Mapping[str, Any], number: int) -> dict[str, Any]:
        """Return an evaluation batch with its retain batch: the whole evaluation is one step."""
        own = self.sharding.own(number)
        completed = self._with_retain(batch, own, 0, 0)
        if not own:
            _divide_by(torch.zeros(3, dtype=torch.int64), completed)
        return completed

    def forget(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a collated batch of forget examples as a micro-batch."""
        if self.method.needs_alternates:
            batch = stacked(batch)
        roles = batch.get(ROLES)
        if roles is None:
            roles = RowRoles.of_labels(self.method.roles(batch["labels"]))
        return self._micro_batch(batch, roles)

    def retained(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a collated batch of retain examples as a micro-batch."""
        return self._micro_batch(batch, RowRoles.of_retain(batch["labels"]))

    def _micro_batch(self, batch: Mapping[str, Any], roles: RowRoles) -> dict[str, Any]:
        return {**only_inputs(batch), ROLES: roles, COUNTS: self.method.counts(roles)}

    def together(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a collated forget batch, with a collated retain batch under `RETAIN` or not, as
        one micro-batch."""
        forget = self.forget({name: value for name, value in batch.items() if name != RETAIN})
        if batch.get(RETAIN) is None:
            return forget
        return together(forget, self.retained(batch[RETAIN]))

    def _with_retain(
        self, batch: Mapping[str, Any], own: range, origin: int, step: int
    ) -> dict[str, Any]:
        batch = _first_rows(batch, self._own_rows(len(batch["input_ids"]), own))
        retain = None if self.retain is None else self.retain.batch(own, origin, step)
        retain = None if retain is None else self.retained(retain)
        return {**self.forget(batch), RETAIN: retain}

    def _counts(self, batch: Mapping[str, Any]) -> list[int]:
        """Of a forget micro-batch and its retain micro-batch together."""
        if batch[RETAIN] is None:
            return batch[COUNTS]
        return [a + b for a, b in zip(batch[COUNTS], batch[RETAIN][COUNTS], strict=True)]

    def _own_rows(self, rows: int, own: range) -> int:
        """How many rows of a batch are no repeats."""
        sharding = self.sharding
        if sharding.rows is None or sharding.processes == 1 or len(own) == sharding.batch:
            return rows
        if rows > sharding.batch:
            raise ValueError(
                f"a batch of {sharding.batch} rows of the data set holds {rows} examples, packed "
                f"beforehand, and some of them are repeats: the {sharding.rows} rows must divide "
                f"evenly into batches of {sharding.processes} processes, or hold one example each"
            )
        return max(len(own), 1)


def _divide_by(denominators: Tensor, batch: dict[str, Any]) -> None:
    batch[DENOMINATORS] = denominators
    if batch[RETAIN] is not None:
        batch[RETAIN][DENOMINATORS] = denominators


def _first_rows(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The first `count` rows of a batch; what has no entry for each row is left as it is."""
    rows = len(batch["input_ids"])
    if count >= rows:
        return dict(batch)
    first = {
        name: value[:count] if hasattr(value, "__len__") and len(value) == rows else value
        for name, value in batch.items()
    }
    return first | ({ROLES: batch[ROLES].examples(0, count)} if ROLES in batch else {})


class EpochPosition:
    """How far a pass over the training data has come.

    The Trainer takes up an interrupted pass by skipping its first micro-batches. With several
    processes accelerate then tells only a sampler of its own kind which epoch it is in; the order
    of any other would be that of the first epoch.

    Args:
        dataloader: the training data loader.
        accumulation: micro-batches a step.
        skip: whether what was trained on is skipped on resuming.
    """

    def __init__(self, dataloader: Any, accumulation: int, skip: bool) -> None:
        self._dataloader, self._accumulation, self._skip = dataloader, accumulation, skip
        self._iterator: Any = None
        self.drawn = 0  # micro-batches
        self.begun: int | None = None  # optimizer steps done before the first of this data loader

    def follow(self, iterator: Any, step: int) -> int:
        """Which micro-batch of its pass the next one of `iterator` is; call it before it is drawn.

        Args:
            iterator: of the pass; another one than before begins a new pass.
            step: optimizer steps done so far.
        """
        if iterator is not self._iterator:
            self._iterator, self.drawn = iterator, 0
            if self.begun is None:
                self.begun = step
                if step:
                    self._resume(step)
        return self.drawn

    def _resume(self, step: int) -> None:
        sampler = getattr(self._dataloader, "batch_sampler", None)
        if sampler is None:  # a stream
            return
        steps = max(math.ceil(len(self._dataloader) / self._accumulation), 1)
        epoch, done = divmod(step, steps)
        while hasattr(sampler, "batch_sampler"):
            sampler = sampler.batch_sampler
        if hasattr(getattr(sampler, "sampler", None), "set_epoch"):
            sampler.sampler.set_epoch(epoch)
        if self._skip:
            self.drawn = done * self._accumulation

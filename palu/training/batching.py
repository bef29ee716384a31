"""What travels with the forget rows of a step: their retain rows, and the rows that its means are
over."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from palu.methods.step_loss import RETAIN
from palu.training.retain import retain_rows
from palu.training.split import Split

# int64 [3] beside a batch: what each of its terms is divided by; 0 where it does not count.
# Integers, since DeepSpeed casts floating-point inputs to half precision.
DENOMINATORS = "palu_denominators"


@dataclass(frozen=True)
class RetainWalk:
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


class StepBatches:
    """Completes the micro-batches of one process, step by step or in an evaluation.

    A process whose micro-batch has no row of its own (the last, uneven step of a pass) still runs
    one row forward and backward, since the others wait for its gradients, and divides it by
    nothing: it adds zero.

    Args:
        split: how the forget rows are dealt out.
        retain: None without a retain set.
        normalization: `step` or `micro_batch`, see `PALUConfig`. With the second one repeated rows
            count, as in the released code.
    """

    def __init__(self, split: Split, retain: RetainWalk | None, normalization: str) -> None:
        self.split, self.retain, self.normalization = split, retain, normalization

    def complete(
        self,
        samples: Sequence[Mapping[str, Any]],
        first: int,
        step: int,
        count: Callable[[Mapping[str, Any]], Tensor],
        reduce: Callable[[Tensor], Tensor],
    ) -> list[dict[str, Any]]:
        """The micro-batches of one step, each with a retain batch (or None) and its denominators.

        Args:
            samples: the forget batches of this process, at least one.
            first: which micro-batch of the pass the first of them is.
            step: optimizer steps done so far.
            count: rows of each term in a batch, float32 `[3]`.
            reduce: sums a tensor over processes.
        """
        per_step = self.normalization == "step"
        origin = self.split.first_place(first)
        batches, rows, used = [], [], []
        for number, sample in enumerate(samples, first):
            own = self.split.own(number)
            if not per_step and self.split.processes > 1:
                own = self.split.dealt(number)
            batches.append(self._with_retain(sample, own, origin, step))
            rows.append(count(batches[-1]))
            used.append(bool(own))
        counts = torch.stack(rows).long() * torch.tensor(used, device=rows[0].device)[:, None]
        if per_step:
            divisors = reduce(counts.sum(0)).clamp(min=1).repeat(len(batches), 1)
        else:
            divisors = counts.clamp(min=1) * len(batches) * self.split.processes
        for batch, divisor, counts_here in zip(batches, divisors, used, strict=True):
            batch[DENOMINATORS] = divisor * counts_here
        return batches

    def for_evaluation(self, batch: Mapping[str, Any], number: int) -> dict[str, Any]:
        """An evaluation batch with its retain batch: the whole evaluation is one step."""
        own = self.split.own(number)
        completed = self._with_retain(batch, own, 0, 0)
        if not own:
            completed[DENOMINATORS] = torch.zeros(3, dtype=torch.int64)
        return completed

    def _with_retain(
        self, batch: Mapping[str, Any], own: range, origin: int, step: int
    ) -> dict[str, Any]:
        completed = _first_rows(batch, self._own_rows(len(batch["input_ids"]), own))
        completed[RETAIN] = None if self.retain is None else self.retain.batch(own, origin, step)
        return completed

    def _own_rows(self, rows: int, own: range) -> int:
        """How many rows of a batch are no repeats."""
        if self.split.rows is None or self.split.processes == 1 or len(own) == self.split.batch:
            return rows
        if rows > self.split.batch:
            raise ValueError(
                f"a batch of {self.split.batch} rows of the data set holds {rows} examples, packed "
                f"beforehand, and some of them are repeats: the {self.split.rows} rows must divide "
                f"evenly into batches of {self.split.processes} processes, or hold one example each"
            )
        return max(len(own), 1)


def _first_rows(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The first `count` rows of a batch; what has no entry for each row is left as it is."""
    rows = len(batch["input_ids"])
    if count >= rows:
        return dict(batch)
    return {
        name: value[:count] if hasattr(value, "__len__") and len(value) == rows else value
        for name, value in batch.items()
    }


class Pass:
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

    def follow(self, iterator: Any, step: int) -> int:
        """Which micro-batch of its pass the next one of `iterator` is; call it before it is drawn.

        Args:
            iterator: of the pass; another one than before begins a new pass.
            step: optimizer steps done so far.
        """
        if iterator is not self._iterator:
            first = self._iterator is None
            self._iterator, self.drawn = iterator, 0
            if first and step:
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

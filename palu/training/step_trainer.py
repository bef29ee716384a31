"""A Trainer whose steps are the same however they are split into micro-batches and processes."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from palu.data.roles import check_labels
from palu.methods.step_loss import RETAIN, Objective
from palu.training.batching import DENOMINATORS, Pass, RetainWalk, StepBatches
from palu.training.checkpoint_trainer import CheckpointTrainer
from palu.training.config import PALUConfig
from palu.training.split import LengthGroups, Split
from palu.training.step_log import StepLog
from palu_kernels.backend import check_values


class StepTrainer(CheckpointTrainer):
    """Gives every micro-batch its retain rows and the row counts of the whole step.

    Attributes:
        retain_dataset: the retain set, or None.
        objective: counts the rows of a batch.
        step_log: told of every step.
    """

    retain_dataset: Any
    objective: Objective
    step_log: StepLog
    _retain_lengths: list[int] | None  # of the retain rows, where rows of like length go together
    _columns: int | None  # entries of the vocabulary

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """The micro-batches of one step, each with its retain batch and the step's row counts
        beside it."""
        if self.control.should_training_stop:
            return [], None  # resumed where the run had reached its end
        self.step_log.start_clock()
        first = self._pass.follow(epoch_iterator, self.state.global_step)
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples:
            return samples, None
        self._pass.drawn += len(samples)
        for sample in samples:
            self.check_labels(sample)
        completed = self._step_batches.complete(
            samples,
            first,
            self.state.global_step,
            count=lambda batch: self.objective.count(batch).to(device),
            reduce=lambda counts: self.accelerator.reduce(counts, "sum"),
        )
        retain = [batch[RETAIN] for batch in completed if batch[RETAIN] is not None]
        self.step_log.add_step([*completed, *retain])
        # Not None, so that older versions know the loss is scaled for the whole step already.
        return completed, sum(batch[DENOMINATORS].sum() for batch in completed)

    def get_train_dataloader(self) -> Any:
        """Hugging Face's, and with it how its rows make up the steps."""
        # An attempt at training begins: one that `auto_find_batch_size` gave up does not count.
        self.step_log.reset()
        loader = super().get_train_dataloader()
        args = self.args
        self._pass = Pass(loader, args.gradient_accumulation_steps, not args.ignore_data_skip)
        # What balances batches itself deals out batches of any size.
        balanced = getattr(args, "train_sampling_strategy", None) == "batch_rebalance"
        rows = None if balanced else length_of(self.train_dataset)
        self._step_batches = self.batches_of(rows, self._train_batch_size)
        return loader

    def batches_of(self, rows: int | None, batch_size: int) -> StepBatches:
        """How steps are made up from a data set that is loaded in batches of `batch_size`.

        Args:
            rows: how many it has; None where that is not known, or accelerate does not deal them
                out.
            batch_size: as the Trainer's arguments have it.
        """
        args = self.args
        shares = args.world_size if self.accelerator.split_batches else 1
        split = Split(rows, batch_size // shares, args.process_index, args.world_size)
        if self.retain_dataset is None:
            return StepBatches(split, None, args.normalization)
        forget_batch = self._train_batch_size // shares
        retain_batch = args.retain_batch_size or forget_batch
        walk = RetainWalk(
            self.retain_dataset,
            self.data_collator,
            Fraction(retain_batch, forget_batch),
            retain_batch * args.gradient_accumulation_steps * args.world_size,
            args.data_seed if args.data_seed is not None else args.seed,
            self._retain_lengths,
        )
        return StepBatches(split, walk, args.normalization)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if not groups_by_length(self.args) or not hasattr(self.train_dataset, "__len__"):
            return super()._get_train_sampler(*args, **kwargs)
        step = self._train_batch_size * self.args.gradient_accumulation_steps
        step *= 1 if self.accelerator.split_batches else self.args.world_size
        lengths = [len(row["input_ids"]) for row in self.train_dataset]
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        return LengthGroups(step, lengths, seed)

    def check_labels(self, batch: dict) -> None:
        """Raises ValueError for a label that is no token, where values are checked."""
        if self._columns is not None and check_values(batch["labels"].device):
            check_labels(batch["labels"], self._columns)


def groups_by_length(args: PALUConfig) -> bool:
    """Whether the Trainer puts forget rows of like length together, so that retain rows should be
    too (the option had another name in transformers 5.0)."""
    strategy = getattr(args, "train_sampling_strategy", None)
    return strategy == "group_by_length" or bool(getattr(args, "group_by_length", False))


def length_of(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None

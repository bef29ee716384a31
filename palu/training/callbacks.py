"""Stopping when the model no longer knows what it is to forget."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from palu.data.roles import FORGET
from palu.models.wrappers import eval_mode
from palu.training.knowledge import check_length, token_scores

if TYPE_CHECKING:
    from palu.training.trainer import PALUTrainer

logger = logging.getLogger(__name__)

FORGET_PROB = "forget_prob"


class StopAtForgetProb(TrainerCallback):
    """Measure `forget_probability` on the training data at the end of each epoch (every
    `args.eval_steps` steps if that is set), logs it as `forget_prob`, and ends the training where
    it is at most `args.stop_at_forget_prob`.

    Where checkpoints are saved by steps one is saved at that step too. A run that is resumed from
    it takes no further step.

    Args:
        trainer: whose model and data are measured; it takes this callback.

    Raises:
        ValueError: its data set has no length or no token to forget.
    """

    def __init__(self, trainer: PALUTrainer) -> None:
        self.trainer = trainer
        rows = trainer.train_dataset
        check_length("stop_at_forget_prob", rows)
        if not any(self._is_forget([i])[1].any() for i in range(len(rows))):
            raise ValueError(
                "stop_at_forget_prob needs a token to forget, and no row of train_dataset has one"
            )

    def on_train_begin(self, args, state, control, **kwargs):
        """The checkpoint that a run goes on from may have been written when the target was
        reached."""
        now = [e for e in state.log_history if e.get("step") == state.global_step]
        measured = [entry[FORGET_PROB] for entry in now if FORGET_PROB in entry]
        if measured:
            self._stop_if_reached(measured[-1], args, state, control)

    def on_step_end(self, args, state, control, **kwargs):
        last = state.global_step >= state.max_steps
        if args.eval_steps is not None:
            due = state.global_step % state.eval_steps == 0
        else:
            due = state.epoch == int(state.epoch)
        if not due and not last:
            return
        with self.trainer.step_log.paused():
            probability = self.forget_probability()
        should_log = control.should_log  # every log puts it out, also the one that follows this one
        self.trainer.log({FORGET_PROB: probability})
        control.should_log = should_log
        if self._stop_if_reached(probability, args, state, control):
            control.should_log = True
            control.should_save |= args.save_strategy == "steps"
        elif last and state.is_world_process_zero:
            logger.warning(
                "the forget probability after the last step is %.3g, above stop_at_forget_prob=%g",
                probability,
                args.stop_at_forget_prob,
            )

    def _stop_if_reached(self, probability: float, args, state, control) -> bool:
        if probability > args.stop_at_forget_prob:
            return False
        control.should_training_stop = True
        if state.is_world_process_zero:
            logger.warning(
                "stopped after step %d of %d: the forget probability is %.3g, at most "
                "stop_at_forget_prob=%g",
                state.global_step,
                state.max_steps,
                probability,
                args.stop_at_forget_prob,
            )
        return True

    @torch.no_grad()
    def forget_probability(self) -> float:
        """How likely the model, given the true tokens before them, still finds the tokens that the
        forget term acts on: the first `prefix_length` of each sensitive run.

        `exp(-mean NLL)` over those tokens of an example (the geometric mean of their
        probabilities), averaged over the examples that have some. With `prefix_length=0` it is the
        sensitive probability of `palu.evaluation`. Every process measures a part of the rows and
        all get the same number.
        """
        trainer = self.trainer
        args, count = trainer.args, len(trainer.train_dataset)
        size, rank = args.per_device_train_batch_size, args.process_index
        total = examples = 0.0
        with eval_mode(trainer.model, keep_rng=False):
            for start in range(rank * size, count + rank * size, size * args.world_size):
                rows = range(start, min(start + size, count))
                # Without rows of its own a process still calls the model: a sharded one waits.
                probabilities = self._probabilities(rows or [0])
                total += math.fsum(probabilities) if rows else 0.0
                examples += len(probabilities) if rows else 0
        own = torch.tensor([[total, examples]], device=args.device)
        found = trainer.accelerator.gather(own).tolist()
        # The same sums in the same order on every process: all of them stop, or none.
        total, examples = (math.fsum(column) for column in zip(*found, strict=True))
        return total / examples

    def _probabilities(self, rows: Any) -> list[float]:
        """Of each example that has a token to forget."""
        batch, forget = self._is_forget(rows)
        nll, _ = token_scores(self.trainer, batch, forget, likeliest=False)
        parts = nll.split(forget.sum(1).tolist())
        return [math.exp(-part.mean().item()) for part in parts if len(part)]

    def _is_forget(self, rows: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Rows of the training data as a batch, and bool `[B, T]`: which of its labels are to be
        forgotten."""
        batch = self.trainer.data_collator([self.trainer.train_dataset[i] for i in rows])
        return batch, self.trainer.method.roles(batch["labels"]) == FORGET

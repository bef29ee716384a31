"""The weight of the retain term as a variable of its own: what PDU needs beside its loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import TrainerCallback

from palu.methods.objective import MethodObjective
from palu.methods.pdu import PDU

if TYPE_CHECKING:
    from palu.training.trainer import PALUTrainer


class DualObjective(MethodObjective):
    """A `MethodObjective` whose `retain_weight` moves from step to step; see `PDU`.

    Args: as of `MethodObjective`, whose `loss` is a `PDU` here.
    """

    loss: PDU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._first = self.retain_weight
        self._retain: Tensor | None = None  # of this process's micro-batches in the step

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Any], denominators: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `Objective`; remembers the retain term of training."""
        total, means = super().__call__(model, batch, denominators)
        if model.training:
            self._retain = means[2] if self._retain is None else self._retain + means[2]
        return total, means

    def take_retain(self) -> Tensor:
        """Float32 scalar: this process's share of the step's retain term; a new step begins."""
        found, self._retain = self._retain, None
        return found

    def state(self) -> dict[str, float]:
        """See `Objective.state`."""
        return {"dual": self.retain_weight}

    def restore(self, state: Mapping[str, float]) -> None:
        """See `Objective.restore`."""
        self.retain_weight = state.get("dual", self._first)
        self._retain = None


class DualAscent(TrainerCallback):
    """Moves the weight of the retain term after each step, in all processes alike.

    Args:
        trainer: whose objective is a `DualObjective`; it takes this callback.
    """

    def __init__(self, trainer: PALUTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        objective, loss = self.trainer.objective, self.trainer.loss_fn
        # The same sum in the same order on every process.
        parts = self.trainer.accelerator.gather(objective.take_retain()[None]).tolist()
        # The epoch is counted to the end of the step: no step of the warm-up is beyond it.
        if state.epoch > loss.dual_warmup_epochs:
            objective.retain_weight = loss.next_dual(objective.retain_weight, math.fsum(parts))

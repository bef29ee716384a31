"""PDU: the weight of the retain term moves by itself, so that a bound on it holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from transformers import TrainerCallback

from palu.methods.answers import Answers
from palu.methods.base import Method, check_number
from palu.methods.step_loss import AnswerStepLoss, StepLoss
from palu_kernels import linear_local_entropy_loss, local_entropy_loss

if TYPE_CHECKING:
    from palu.training.trainer import PALUTrainer


class PDUStepLoss(AnswerStepLoss):
    """An `AnswerStepLoss` whose `retain_weight` is the dual variable of `PDU`.

    Args: as of `StepLoss`.
    """

    method: PDU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._first = self.retain_weight
        self._retain: Tensor | None = None  # of this process's micro-batches in the step

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Any], denominators: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `StepLoss`; remembers the retain term of training."""
        total, means = super().__call__(model, batch, denominators)
        if model.training:
            self._retain = means[2] if self._retain is None else self._retain + means[2]
        return total, means

    def take_retain(self) -> Tensor:
        """Return this process's share of the step's retain term, float32; a new step begins."""
        share, self._retain = self._retain, None
        return share

    def state(self) -> dict[str, float]:
        """See `StepLoss.state`."""
        return {"dual": self.retain_weight}

    def restore(self, state: Mapping[str, float]) -> None:
        """See `StepLoss.restore`."""
        super().restore(state)
        self.retain_weight = state.get("dual", self._first)
        self._retain = None


class DualAscent(TrainerCallback):
    """Move the weight of the retain term after each step, in all processes alike.

    Args:
        trainer: whose step loss is a `PDUStepLoss`; it takes this callback.
    """

    def __init__(self, trainer: PALUTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        step_loss, method = self.trainer.step_loss, self.trainer.method
        # The same sum in the same order on every process.
        shares = self.trainer.accelerator.gather(step_loss.take_retain()[None]).tolist()
        # The epoch is counted to the end of the step: no step of the warm-up is beyond it.
        if state.epoch > method.dual_warmup_epochs:
            step_loss.retain_weight = method.next_dual(step_loss.retain_weight, math.fsum(shares))


@dataclass(kw_only=True)
class PDU(Method):
    """Primal-dual unlearning (Entesari et al. 2025, arXiv 2506.05314).

    `forget = mean over tokens of (max(z) - mean(z))^2`, with `z` the logits of the vocabulary:
    PALU's flatten of the single largest one. It is lowered under the constraint `retain <=
    retain_loss_eps`: a step's loss is `forget_weight * forget + dual * (retain - retain_loss_eps)`
    (the constant `dual * retain_loss_eps` is left out of what is reported), and after the step
    `dual` becomes `max(0, dual + dual_step_size * (retain - retain_loss_eps))`, with `retain` the
    step's mean. `dual` begins as `retain_weight`, is logged and kept in checkpoints.

    Here `z` are the logits that predict an answer's tokens; open-unlearning takes those one place
    later, at the tokens themselves. There each process moves a `dual` of its own with each
    micro-batch; here all move it together, once a step. There it may move once an epoch instead.

    Args:
        retain_loss_eps: the bound on the retain loss, at least 0: somewhat above that of the
            original model. 0.3, the default, is published for TOFU, beside `retain_weight=100` and
            `dual_step_size=5`.
        dual_step_size: above 0.
        dual_warmup_epochs: `dual` stays as it is for so many epochs; at least 0.
    """

    name = "pdu"
    retain = "needed"
    step_loss: ClassVar[type[StepLoss]] = PDUStepLoss
    retain_loss_eps: float = 0.3
    dual_step_size: float = 1.0
    dual_warmup_epochs: float = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("retain_loss_eps", self.retain_loss_eps, above_zero=False)
        check_number("dual_step_size", self.dual_step_size)
        check_number("dual_warmup_epochs", self.dual_warmup_epochs, above_zero=False)

    def loss(self, answers: Answers) -> Tensor:
        """Return `[tokens]`."""
        options = {"top_k": 1, "objective": "flatten", "center": "global_mean"}
        options |= {"reduction": "none", "backend": self.backend}
        if answers.head is None:
            return local_entropy_loss(answers.rows, **options)
        return linear_local_entropy_loss(answers.rows, answers.head, **options)

    def next_dual(self, dual: float, retain: float) -> float:
        """`dual` after a step whose mean retain loss was `retain`."""
        return max(0.0, dual + self.dual_step_size * (retain - self.retain_loss_eps))

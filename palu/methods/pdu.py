"""The method that weighs the retain term by itself, so that a bound on it holds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from palu.methods.answers import Answers
from palu.methods.base import Method, check_number
from palu_kernels import linear_local_entropy_loss, local_entropy_loss


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
    retain_loss_eps: float = 0.3
    dual_step_size: float = 1.0
    dual_warmup_epochs: float = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("retain_loss_eps", self.retain_loss_eps, above_zero=False)
        check_number("dual_step_size", self.dual_step_size)
        check_number("dual_warmup_epochs", self.dual_warmup_epochs, above_zero=False)

    def loss(self, answers: Answers) -> Tensor:
        """`[tokens]`."""
        options = {"top_k": 1, "objective": "flatten", "center": "global_mean"}
        options |= {"reduction": "none", "backend": self.backend}
        if answers.head is None:
            return local_entropy_loss(answers.rows, **options)
        return linear_local_entropy_loss(answers.rows, answers.head, **options)

    def next_dual(self, dual: float, retain: float) -> float:
        """`dual` after a step whose mean retain loss was `retain`."""
        return max(0.0, dual + self.dual_step_size * (retain - self.retain_loss_eps))

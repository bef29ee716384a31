"""Methods that make the answers' tokens less likely, each token by itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from palu.methods.answers import Answers
from palu.methods.base import Method, check_number


@dataclass(kw_only=True)
class GradAscent(Method):
    """Gradient ascent (Jang et al. 2023, arXiv 2210.01504; TOFU, arXiv 2401.06121).

    `forget = mean over tokens of log p(token)`, and no retain term.
    """

    name = "grad_ascent"
    retain = "refused"

    def loss(self, answers: Answers) -> Tensor:
        """Return `[tokens]`."""
        return -answers.nll


@dataclass(kw_only=True)
class GradDiff(GradAscent):
    """Gradient difference (Liu et al. 2022, arXiv 2203.12817; TOFU, arXiv 2401.06121).

    `GradAscent` with a retain term.
    """

    name = "grad_diff"
    retain = "needed"


@dataclass(kw_only=True)
class WGA(Method):
    """Weighted gradient ascent (Wang et al. 2025, arXiv 2502.19301).

    `forget = mean over tokens of w * log p(token)` with `w = p(token)^beta`, through which no
    gradient goes. (The paper sums over the tokens of an answer; here and in open-unlearning it is
    the mean over all tokens.)

    Args:
        beta: 0 is gradient ascent; at least 0.
    """

    name = "wga"
    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta", self.beta, above_zero=False)

    def loss(self, answers: Answers) -> Tensor:
        """Return `[tokens]`."""
        nll = answers.nll
        return -(-self.beta * nll.detach()).exp() * nll


@dataclass(kw_only=True)
class SatImp(Method):
    """Weights by saturation and importance (Yang et al. 2025, arXiv 2505.11953).

    `forget = mean over tokens of w * log p(token)` with `w = p^beta1 * (1 - p)^beta2`, through
    which no gradient goes. Published beside `retain_weight=0.1`; open-unlearning's configuration
    has `forget_weight=0.1` instead.

    Args:
        beta1: of saturation, at least 0.
        beta2: of importance, at least 0.
    """

    name = "sat_imp"
    beta1: float = 5.0
    beta2: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta1", self.beta1, above_zero=False)
        check_number("beta2", self.beta2, above_zero=False)

    def loss(self, answers: Answers) -> Tensor:
        """Return `[tokens]`."""
        nll = answers.nll
        fixed = nll.detach()
        # A row that sums to less than 1 in rounding must not give 1 - p below 0.
        rest = -(-fixed.clamp(min=0)).expm1()
        return -(-self.beta1 * fixed).exp() * rest**self.beta2 * nll

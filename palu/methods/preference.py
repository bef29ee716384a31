"""Methods made from preference learning: each answer as a whole, by its likelihood."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from palu.methods.answers import Answers
from palu.methods.base import Method, check_number


@dataclass(kw_only=True)
class NPO(Method):
    """Negative preference optimization (Zhang et al. 2024, arXiv 2404.05868).

    `forget = mean over answers of -(2 / beta) * log sigmoid(-beta * (log p(answer) - log
    p_original(answer)))`, where `log p(answer)` is the sum over its tokens.

    Args:
        beta: inverse temperature, above 0; towards 0 it is gradient ascent.
    """

    name = "npo"
    needs_reference = True
    per_example = True
    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta", self.beta)

    def loss(self, answers: Answers) -> Tensor:
        """Return `[answers]`."""
        log_ratio = answers.sums(answers.ref_nll - answers.nll)
        return -2 / self.beta * logsigmoid(-self.beta * log_ratio)


@dataclass(kw_only=True)
class SimNPO(Method):
    """Simple negative preference optimization (Fan et al. 2024, arXiv 2410.07163).

    `forget = mean over answers of -(2 / beta) * log sigmoid(-beta * (log p(answer) / tokens +
    delta))`: NPO by the mean over tokens and without the original model. The paper writes the
    margin outside, `gamma = beta * delta`; `delta` is what its code and open-unlearning take.
    Published beside `forget_weight=0.125`.

    Args:
        beta: inverse temperature, above 0.
        delta: margin of the mean NLL, at least 0.
    """

    name = "sim_npo"
    per_example = True
    beta: float = 4.5
    delta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta", self.beta)
        check_number("delta", self.delta, above_zero=False)

    def loss(self, answers: Answers) -> Tensor:
        """Return `[answers]`."""
        nll = answers.sums(answers.nll) / answers.lengths
        return -2 / self.beta * logsigmoid(self.beta * (nll - self.delta))


@dataclass(kw_only=True)
class DPO(Method):
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290) of a second answer.

    `forget = mean over pairs of -log sigmoid(beta * (r(second) - r(answer)))` with `r(y) = log
    p(y) - log p_original(y)`, sums over the tokens of an answer. (open-unlearning multiplies by
    `2 / beta`: `forget_weight` times that gives its numbers.) The second answer is the record's
    `alternate_answer`; see `palu.data.pairs`.

    Args:
        beta: inverse temperature, above 0.
    """

    name = "dpo"
    needs_reference = True
    per_example = True
    needs_alternates = True
    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta", self.beta)

    def loss(self, answers: Answers) -> Tensor:
        """Return `[pairs]`."""
        log_ratio = answers.sums(answers.ref_nll - answers.nll)
        first, second = log_ratio.view(2, -1)
        return -logsigmoid(self.beta * (second - first))


@dataclass(kw_only=True)
class IdkDPO(DPO):
    """`DPO` whose second answer is a refusal ("I don't know."), as in TOFU (arXiv 2401.06121).

    Each example keeps one refusal through the run; TOFU's own list is not used, and it draws one
    anew each time.
    """

    name = "idk_dpo"

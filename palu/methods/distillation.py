"""Methods that teach the answers' tokens another distribution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from palu.data.roles import FORGET, NONE
from palu.methods.answers import Answers
from palu.methods.base import Method, check_number


@dataclass(kw_only=True)
class UNDIAL(Method):
    """Self-distillation with adjusted logits (Dong et al. 2025, arXiv 2402.10052).

    `forget = mean over tokens of CE(q, p)` with `q = softmax(z_original - beta * onehot(token))`.
    (open-unlearning's mean is over every position, prompt and padding included, where there is no
    token to lower; the paper's is over the tokens to forget, as here.) Published without a retain
    set, at a learning rate of 1e-4.

    Args:
        beta: how far the token's logit is lowered, above 0.
    """

    name = "undial"
    needs_reference = True
    beta: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta", self.beta)

    def loss(self, answers: Answers) -> Tensor:
        """Return `[tokens]`."""

        def distill(logits: Tensor, targets: Tensor, ref_logits: Tensor) -> Tensor:
            lower = ref_logits.new_full((len(targets), 1), -self.beta)
            adjusted = ref_logits.scatter_add(1, targets[:, None], lower)
            return cross_entropy(logits, adjusted.softmax(1), reduction="none")

        return answers.map_logits(distill, reference=True)


@dataclass(kw_only=True)
class CEU(Method):
    """Cross-entropy unlearning (Yang 2025, arXiv 2503.01224).

    `forget = mean over tokens of CE(q, p)` with `q` the model's own distribution without the token,
    `softmax` of its logits with the token's at -inf, through which no gradient goes. Published
    without a retain set.

    Args:
        ignore_first: how many tokens at the start of each answer are left as they are.
    """

    name = "ce_u"
    ignore_first: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.ignore_first, bool) or not isinstance(self.ignore_first, int):
            raise TypeError(f"ignore_first is {self.ignore_first!r}; it must be an integer")
        if self.ignore_first < 0:
            raise ValueError(f"ignore_first is {self.ignore_first}; it must be at least 0")

    def roles(self, labels: Tensor) -> Tensor:
        """As `Method.roles`, without the first `ignore_first` tokens of each answer. (In a
        conversation there are several in a row, with what is no answer between them.)"""
        roles = super().roles(labels)
        position = torch.arange(roles.shape[1], device=roles.device)
        outside = torch.where(roles == FORGET, 0, position).cummax(1).values
        return torch.where(position - outside <= self.ignore_first, NONE, roles)

    def loss(self, answers: Answers) -> Tensor:
        """Return `[tokens]`."""

        def avoid(logits: Tensor, targets: Tensor, _: None) -> Tensor:
            others = logits.detach().scatter(1, targets[:, None], -torch.inf)
            return cross_entropy(logits, others.softmax(1), reduction="none")

        return answers.map_logits(avoid)

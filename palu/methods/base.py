"""What a method of unlearning is: a loss on whole answers of the forget set."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from palu.data.roles import FORGET, IGNORE, NONE, PRESERVE
from palu.methods.answers import Answers
from palu.methods.micro_batch import RETAINED, RowRoles
from palu.methods.step_loss import AnswerStepLoss, StepLoss
from palu.models.wrappers import unwrap
from palu_kernels import validation as arguments
from palu_kernels.backend import BACKENDS

RETAIN_LOSSES = ("nll", "kl")


@dataclass(kw_only=True)
class Method:
    """A forget term: the mean of `loss` over the answer tokens, or the answers, of a step.

    Every token of a forget answer takes part, its end token too; spans are not looked at. (Method
    `palu`, which looks at spans, has a `step_loss` of its own.) The step is `forget_weight * forget
    + retain_weight * retain`.

    A subclass has its options as fields and defines `loss`.

    Args:
        forget_weight: of the forget term, a finite number of at least 0.
        backend: `auto`, `triton` or `torch`, for every operator.
        seed: of what the method draws at random.
        trainable_params_regex: trains only the parameters whose whole name in the model it matches,
            of those that were to train; None: all. (With LoRA names end in `lora_A.default.weight`
            and `lora_B.default.weight`.)

    Raises:
        TypeError, ValueError: an option is not as above.
    """

    forget_weight: float = 1.0
    backend: str = "auto"
    seed: int = 0
    trainable_params_regex: str | None = None

    name: ClassVar[str]  # of `PALUConfig.method`
    needs_reference: ClassVar[bool] = False  # whether `loss` asks for the original model
    per_example: ClassVar[bool] = False  # whether `loss` gives a number an answer, else a token
    needs_alternates: ClassVar[bool] = False  # whether every example has a second answer
    retain: ClassVar[str] = "optional"  # a retain set is `optional`, `needed` or `refused`
    retain_losses: ClassVar[tuple[str, ...]] = RETAIN_LOSSES  # the first is the default
    by_span: ClassVar[bool] = False  # whether it acts on marked spans, and not on whole answers
    step_loss: ClassVar[type[StepLoss]] = AnswerStepLoss  # computes the terms of a micro-batch
    preserve: ClassVar[str | None] = None  # the loss that preserves tokens not marked, if any

    def __post_init__(self) -> None:
        arguments.choice("backend", self.backend, BACKENDS)
        check_number("forget_weight", self.forget_weight, above_zero=False)
        _check_regex(self.trainable_params_regex)

    @classmethod
    def option_names(cls) -> list[str]:
        """Its own options."""
        shared = {field.name for field in fields(Method)}
        return [field.name for field in fields(cls) if field.name not in shared]

    def check_run(self, *, retain: bool, reference: str, reference_needed: bool) -> None:
        """Check that a run has what the method needs.

        Args:
            retain: whether there is a retain set.
            reference: its kind, see `PALUConfig`.
            reference_needed: whether a term needs one.

        Raises:
            ValueError: it has not.
        """
        if self.retain == "refused" and retain:
            raise ValueError(
                f"method {self.name!r} has no retain term, and a retain set is given; it must be "
                "left out (grad_diff is the same with one)"
            )
        if self.retain == "needed" and not retain:
            raise ValueError(
                f"method {self.name!r} needs a retain set, and its retain_weight must be above 0"
            )
        if reference_needed and reference == "cached" and not self.by_span:
            raise ValueError(
                "reference='cached' holds what method 'palu' needs; with method "
                f"{self.name!r} it must be 'live', or 'adapter_off' for a model with adapters"
            )

    def counts(self, roles: RowRoles) -> list[int]:
        """Return what each term is a mean over, in a micro-batch: tokens to forget (answers where
        `per_example`), tokens to preserve, tokens to retain."""
        forget = roles.count(FORGET, answers=self.per_example)
        forget //= 2 if self.needs_alternates else 1  # a pair of answers counts once
        return [forget, roles.count(PRESERVE), roles.count(RETAINED)]

    def check_layers(self, count: int) -> None:
        """Raise ValueError where a model of so many decoder layers will not do."""

    def prepare(self, model: nn.Module) -> None:
        """Turn off `requires_grad` of what does not train.

        Raises:
            ValueError: nothing would train.
        """
        if self.trainable_params_regex is not None:
            named = unwrap(model).named_parameters()
            self.train_only(model, [name for name, p in named if p.requires_grad], "the model")

    def train_only(self, model: nn.Module, could: Collection[str], where: str) -> None:
        """Freeze every parameter but those of `could` that `trainable_params_regex` matches.

        Args:
            where: these are, in a message.
        """
        regex = self.trainable_params_regex
        train = {name for name in could if regex is None or re.fullmatch(regex, name)}
        if not train:
            raise ValueError(
                f"trainable_params_regex is {regex!r} and matches none of the parameters that may "
                f"train in {where}; it must match the whole name of one, such as "
                f"{', '.join(list(could)[-3:]) or '(there is none)'}"
            )
        for name, parameter in unwrap(model).named_parameters():
            parameter.requires_grad_(name in train)

    def roles(self, labels: Tensor) -> Tensor:
        """int8 `[B, T]`: FORGET for every answer token but one at position 0, which nothing
        predicts."""
        roles = torch.where(labels != IGNORE, FORGET, NONE).to(torch.int8)
        roles[:, :1] = NONE
        return roles

    def loss(self, answers: Answers) -> Tensor:
        """Return `[tokens]`, or `[answers]` where `per_example`: the forget term is their mean.

        Must give no entries for no rows.
        """
        raise NotImplementedError


def check_number(name: str, value: Any, *, above_zero: bool = True) -> None:
    """Raise TypeError or ValueError unless it is a finite number above 0 (of at least 0)."""
    arguments.number(name, value, above_zero=above_zero)


def _check_regex(regex: Any) -> None:
    if regex is not None and not isinstance(regex, str):
        raise TypeError(f"trainable_params_regex is {regex!r}; it must be a text or None")
    try:
        re.compile(regex or "")
    except re.error as error:
        raise ValueError(
            f"trainable_params_regex is {regex!r}; it must be a regular expression ({error})"
        ) from None

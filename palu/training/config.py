"""`PALUConfig`: Hugging Face's training arguments plus the settings of PALU."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from palu.loss import PALULoss
from palu.methods import METHODS, PALU, Method, check_options, make_method
from palu.methods.base import check_number
from palu.training.options import (
    PAPER,
    LossOptions,
    MethodOptions,
    RunOptions,
    check_choice,
    check_read,
)
from palu_kernels import validation as arguments


def parse_center(center: str | float) -> str | float:
    """`"global_mean"` and `"local_mean"` stay; a number or its text becomes a float.

    Raises:
        ValueError: it is neither.
    """
    if center in ("global_mean", "local_mean"):
        return center
    with contextlib.suppress(TypeError, ValueError):
        if not isinstance(center, bool):
            return float(center)
    raise ValueError(f"center must be global_mean, local_mean or a number, not {center!r}")


@dataclass
class PALUConfig(LossOptions, MethodOptions, RunOptions, TrainingArguments):
    """Settings of `PALUTrainer`. Every field works with `HfArgumentParser`.

    Where they are None, `objective`, `prefix_length`, `forget_weight` and `checks` are `flatten`,
    3, 1 and `none`.

    `center` and `preserve` are kept as text (`"0.5"`, `"none"`) so that they survive a command
    line; `loss_options()` gives the values `PALULoss` takes.

    Raises:
        TypeError, ValueError: a value of another type or outside its choices, or an option that
            the method or the objective does not read; naming the field.
    """

    base_is_original: bool = field(
        default=False,
        metadata={
            "help": "With reference adapter_off: the model without its adapter is the original "
            "though the adapter changes it from the start (a trained adapter goes on)."
        },
    )

    # Defaults of the Trainer that fit unlearning.
    output_dir: str | None = field(default="palu-checkpoints")
    learning_rate: float = field(default=1e-5)
    num_train_epochs: float = field(default=10.0)
    logging_steps: float = field(default=5)
    save_strategy: str = field(default="no")
    # The order is the Trainer's own: HfArgumentParser cannot read the union the other way round.
    report_to: None | str | list[str] = field(default="none")  # noqa: RUF036
    # Labels and answer masks are columns the model's forward does not name.
    remove_unused_columns: bool | None = field(default=False)
    # A NaN is an error with its step and term here, never something to average over in the logs.
    logging_nan_inf_filter: bool = field(default=False)

    def __post_init__(self) -> None:
        # What `palu unlearn` chooses by model and data is the paper's here.
        for name, value in PAPER.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if isinstance(self.preserve, str) and self.preserve.lower() == "none":
            self.preserve = None
        parse_center(self.center)
        check_options(self.method, self.method_options())
        check_read(self)
        losses = METHODS[self.method].retain_losses
        if self.retain_loss is None:
            self.retain_loss = losses[0]
        if self.retain_loss not in losses:
            raise ValueError(
                f"retain_loss must be one of {', '.join(losses)}, not {self.retain_loss!r} "
                f"(method {self.method!r})"
            )
        check_choice(self, RunOptions, "normalization", "reference", "checks")
        if not isinstance(self.base_is_original, bool):
            raise TypeError(
                f"base_is_original must be True or False, not {self.base_is_original!r}"
            )
        check_number("retain_weight", self.retain_weight, above_zero=False)
        if self.retain_batch_size is not None:
            arguments.positive_int("retain_batch_size", self.retain_batch_size)
        if not isinstance(self.reference_cache, (str, os.PathLike, type(None))):
            raise TypeError(
                f"reference_cache is {self.reference_cache!r}; it must be a folder's name or None"
            )
        stop = self.stop_at_forget_prob
        if stop is not None and not (isinstance(stop, (int, float)) and 0 < stop < 1):
            raise ValueError(
                f"stop_at_forget_prob must be a number above 0 and below 1, or None, not {stop!r}"
            )
        every = 1 if self.eval_steps is None else self.eval_steps
        if stop is not None and not every > 0:
            raise ValueError(
                f"eval_steps is {every}; with stop_at_forget_prob it must be above 0, or None for "
                "once an epoch"
            )
        PALULoss(**self.loss_options())  # its options are checked here, before any work
        self.make_loss()
        super().__post_init__()

    def check_retain(self, *, given: bool) -> None:
        """Raise ValueError for an option of the retain term where no retain set is given."""
        usual = {"retain_batch_size": None, "retain_weight": 1.0}
        usual["retain_loss"] = METHODS[self.method].retain_losses[0]
        for name, value in usual.items():
            if not given and getattr(self, name) not in (value, 0):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r} and there is no retain set; it must be "
                    "left out, or a retain set be given"
                )

    def make_loss(self, eos_token_id: int | list[int] | None = None) -> Method:
        """Return the method with its options.

        Args:
            eos_token_id: of `PALULoss`.
        """
        names = ("forget_weight", "backend", "seed", "trainable_params_regex")
        shared = {name: getattr(self, name) for name in names}
        if self.method == "palu":
            return PALU(**shared | self.loss_options(), eos_token_id=eos_token_id)
        return make_method(self.method, self.method_options(), **shared)

    def method_options(self) -> dict[str, Any]:
        """The options of methods other than PALU; None where the method's default is meant."""
        return {option.name: getattr(self, option.name) for option in fields(MethodOptions)}

    def loss_options(self) -> dict[str, Any]:
        """The keyword arguments for `PALULoss`, all but `eos_token_id`."""
        options = {option.name: getattr(self, option.name) for option in fields(LossOptions)}
        options |= {"forget_weight": self.forget_weight, "backend": self.backend}
        return options | {"center": parse_center(self.center)}

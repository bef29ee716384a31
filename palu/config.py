"""`PALUConfig`: Hugging Face's training arguments plus the settings of PALU."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from palu.loss import PALULoss
from palu.methods import Method, check_options, make_method

RETAIN_LOSSES = ("nll", "kl")
NORMALIZATIONS = ("step", "micro_batch")
REFERENCES = ("live", "adapter_off", "cached")
METHOD_OPTIONS = ("beta", "beta1", "beta2", "delta", "ignore_first")


def parse_center(center: str | float) -> str | float:
    """`"global_mean"` and `"local_mean"` stay; a number or its text becomes a float.

    Raises:
        ValueError: it is neither.
    """
    if center in ("global_mean", "local_mean"):
        return center
    try:
        return float(center)
    except (TypeError, ValueError):
        raise ValueError(
            f"center must be global_mean, local_mean or a number, not {center!r}"
        ) from None


@dataclass
class PALUConfig(TrainingArguments):
    """Settings of `PALUTrainer`. Every field works with `HfArgumentParser`.

    `center` and `preserve` are kept as text (`"0.5"`, `"none"`) so that they survive a command
    line; `loss_options()` gives the values `PALULoss` takes.

    Raises:
        ValueError: a value outside its choices, naming the field.
    """

    method: str = field(
        default="palu",
        metadata={
            "help": "palu, or a method that forgets whole answers: grad_ascent, grad_diff, npo, "
            "sim_npo, dpo, idk_dpo, wga, sat_imp, undial, ce_u. The fields from top_k to preserve, "
            "preserve_weight and select_from are PALU's alone."
        },
    )
    beta: float | None = field(
        default=None,
        metadata={
            "help": "Of npo, dpo, idk_dpo (default 0.1), sim_npo (4.5), wga (1), undial (10)."
        },
    )
    beta1: float | None = field(default=None, metadata={"help": "Of sat_imp (default 5)."})
    beta2: float | None = field(default=None, metadata={"help": "Of sat_imp (default 1)."})
    delta: float | None = field(default=None, metadata={"help": "Of sim_npo (default 0)."})
    ignore_first: int | None = field(
        default=None,
        metadata={"help": "Of ce_u: tokens at the start of an answer left alone (default 1)."},
    )

    top_k: int = field(
        default=50,
        metadata={"help": "How many of the largest logits are levelled in a forget row."},
    )
    prefix_length: int = field(
        default=3,
        metadata={"help": "Tokens at the start of each sensitive run to act on; 0 or less: all."},
    )
    objective: str = field(
        default="flatten", metadata={"help": "What levels the logits: flatten or entropy."}
    )
    center: str = field(
        default="global_mean",
        metadata={"help": "Where flatten pulls to: global_mean, local_mean or a number."},
    )
    preserve: str | None = field(
        default="reverse_kl",
        metadata={"help": "Holds the other answer tokens: reverse_kl, forward_kl, nll or none."},
    )
    forget_weight: float = field(default=1.0, metadata={"help": "Weight of the forget term."})
    preserve_weight: float = field(default=1.0, metadata={"help": "Weight of the preserve term."})
    select_from: str = field(
        default="reference",
        metadata={"help": "Whose logits choose the top k: reference or current."},
    )
    backend: str = field(default="auto", metadata={"help": "Kernels: auto, triton or torch."})
    retain_loss: str = field(
        default="nll",
        metadata={"help": "Loss on the retain set: nll, or kl to the original model."},
    )
    retain_weight: float = field(default=1.0, metadata={"help": "Weight of the retain term."})
    retain_batch_size: int | None = field(
        default=None,
        metadata={"help": "Retain rows beside each forget batch; default: as many as the batch."},
    )

    normalization: str = field(
        default="step",
        metadata={
            "help": "What the means are over: step (all rows of the optimizer step) or micro_batch "
            "(each micro-batch by itself, averaged; the released code)."
        },
    )

    reference: str = field(
        default="live",
        metadata={
            "help": "Where the original model's numbers come from: live (a frozen copy), "
            "adapter_off (the model without its PEFT adapters) or cached (computed once, before "
            "training)."
        },
    )
    reference_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the cache, built if it is not there; default: reference-cache in "
            "the output folder."
        },
    )

    stop_at_forget_prob: float | None = field(
        default=None,
        metadata={
            "help": "Stop when the probability of the tokens to forget is at most this, measured "
            "after each epoch, or every eval_steps."
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
        if isinstance(self.preserve, str) and self.preserve.lower() == "none":
            self.preserve = None
        parse_center(self.center)
        if self.retain_loss not in RETAIN_LOSSES:
            raise ValueError(
                f"retain_loss must be one of {', '.join(RETAIN_LOSSES)}, not {self.retain_loss!r}"
            )
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(
                f"normalization must be one of {', '.join(NORMALIZATIONS)}, not "
                f"{self.normalization!r}"
            )
        if self.reference not in REFERENCES:
            raise ValueError(
                f"reference must be one of {', '.join(REFERENCES)}, not {self.reference!r}"
            )
        if not 0 <= self.retain_weight < math.inf:
            raise ValueError(
                f"retain_weight must be a finite number of at least 0, not {self.retain_weight}"
            )
        if self.retain_batch_size is not None and self.retain_batch_size < 1:
            raise ValueError(f"retain_batch_size must be at least 1, not {self.retain_batch_size}")
        if self.stop_at_forget_prob is not None and not 0 < self.stop_at_forget_prob < 1:
            raise ValueError(
                "stop_at_forget_prob must be a number above 0 and below 1, or None, not "
                f"{self.stop_at_forget_prob}"
            )
        every = 1 if self.eval_steps is None else self.eval_steps
        if self.stop_at_forget_prob is not None and not every > 0:
            raise ValueError(
                f"eval_steps is {every}; with stop_at_forget_prob it must be above 0, or None for "
                "once an epoch"
            )
        check_options(self.method, self.method_options())
        PALULoss(**self.loss_options())  # its options are checked here, before any work
        self.make_loss()
        super().__post_init__()

    def make_loss(self, eos_token_id: int | list[int] | None = None) -> PALULoss | Method:
        """The loss of `method` with its options.

        Args:
            eos_token_id: of `PALULoss`.
        """
        if self.method == "palu":
            return PALULoss(**self.loss_options(), eos_token_id=eos_token_id)
        shared = {"forget_weight": self.forget_weight, "backend": self.backend}
        return make_method(self.method, self.method_options(), **shared)

    def method_options(self) -> dict[str, Any]:
        """The options of methods other than PALU; None where the method's default is meant."""
        return {name: getattr(self, name) for name in METHOD_OPTIONS}

    def loss_options(self) -> dict[str, Any]:
        """The keyword arguments for `PALULoss`, all but `eos_token_id`."""
        return {
            "top_k": self.top_k,
            "prefix_length": self.prefix_length,
            "objective": self.objective,
            "center": parse_center(self.center),
            "preserve": self.preserve,
            "forget_weight": self.forget_weight,
            "preserve_weight": self.preserve_weight,
            "select_from": self.select_from,
            "backend": self.backend,
        }

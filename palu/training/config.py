"""`PALUConfig`: Hugging Face's training arguments plus the settings of PALU."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from palu.loss import PALULoss
from palu.methods import METHODS, Method, check_options, make_method
from palu.methods.base import RETAIN_LOSSES, check_number
from palu.reference.model import REFERENCES
from palu_kernels import validation as arguments

NORMALIZATIONS = ("step", "micro_batch")
METHOD_OPTIONS = ("beta", "beta1", "beta2", "delta", "ignore_first")
METHOD_OPTIONS += ("retain_loss_eps", "dual_step_size", "dual_warmup_epochs")
METHOD_OPTIONS += ("layer_id", "steering_coeff", "trainable_params_regex")


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
class PALUConfig(TrainingArguments):
    """Settings of `PALUTrainer`. Every field works with `HfArgumentParser`.

    `center` and `preserve` are kept as text (`"0.5"`, `"none"`) so that they survive a command
    line; `loss_options()` gives the values `PALULoss` takes.

    Raises:
        TypeError, ValueError: a value of another type or outside its choices, naming the field.
    """

    method: str = field(
        default="palu",
        metadata={
            "help": "palu, or a method that forgets whole answers: grad_ascent, grad_diff, npo, "
            "sim_npo, dpo, idk_dpo, wga, sat_imp, undial, ce_u, pdu, rmu. The fields from top_k to "
            "preserve, preserve_weight and select_from are PALU's alone."
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
    retain_loss_eps: float | None = field(
        default=None,
        metadata={"help": "Of pdu: bound on the retain loss (default 0.3)."},
    )
    dual_step_size: float | None = field(
        default=None,
        metadata={"help": "Of pdu: how fast retain_weight moves to keep it (default 1)."},
    )
    dual_warmup_epochs: float | None = field(
        default=None, metadata={"help": "Of pdu: epochs before it moves (default 5)."}
    )
    layer_id: int | None = field(
        default=None,
        metadata={
            "help": "Of rmu: the decoder layer whose output is steered, from 0 (default 7, or the "
            "last one of a model with fewer)."
        },
    )
    steering_coeff: float | None = field(
        default=None,
        metadata={"help": "Of rmu: length of the vector steered to (default 2)."},
    )
    trainable_params_regex: str | None = field(
        default=None,
        metadata={
            "help": "Of rmu: which parameters up to that layer train, by whole names (default: all "
            "of that layer and the two before it)."
        },
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
    base_is_original: bool = field(
        default=False,
        metadata={
            "help": "With reference adapter_off: the model without its adapter is the original "
            "though the adapter changes it from the start (a trained adapter goes on)."
        },
    )
    retain_loss: str | None = field(
        default=None,
        metadata={
            "help": "Loss on the retain set: nll (the default), or kl to the original model; of "
            "rmu embed_diff, the distance to the original's activations."
        },
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
        check_options(self.method, self.method_options())
        losses = RETAIN_LOSSES if self.method == "palu" else METHODS[self.method].retain_losses
        if self.retain_loss is None:
            self.retain_loss = losses[0]
        if self.retain_loss not in losses:
            raise ValueError(
                f"retain_loss must be one of {', '.join(losses)}, not {self.retain_loss!r} "
                f"(method {self.method!r})"
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
        """Raises ValueError for a `retain_batch_size` where no retain set is given."""
        if self.retain_batch_size is not None and not given:
            raise ValueError(
                f"retain_batch_size is {self.retain_batch_size} and there is no retain set; it "
                "must be left out, or a retain set be given"
            )

    def make_loss(self, eos_token_id: int | list[int] | None = None) -> PALULoss | Method:
        """The loss of `method` with its options.

        Args:
            eos_token_id: of `PALULoss`.
        """
        if self.method == "palu":
            return PALULoss(**self.loss_options(), eos_token_id=eos_token_id)
        shared = {"forget_weight": self.forget_weight, "backend": self.backend, "seed": self.seed}
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

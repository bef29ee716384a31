"""Trainer: PALU's terms on the forget batch beside the checkout's own retain loss."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from palu.data.roles import FORGET, KEEP, NONE
from palu.data.spans import integer
from palu.loss import PALULoss
from palu.models.forward import logits_at, shift_to_logits
from palu.models.wrappers import eos_token_ids
from palu_kernels import validation as arguments

# Names of the released code, beside palu's own.
_CENTERS = {"mean": "global_mean", "global_mean": "global_mean", "local_mean": "local_mean"}
_PRESERVES = {
    "kl": "reverse_kl",
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "nll": "nll",
    None: None,
}
_INPUTS = ("input_ids", "attention_mask", "labels")


def loss_of(
    *,
    top_k: int,
    first_n: int,
    target_mode: str | float,
    non_sensitive_constraint_type: str | None,
    objective: str,
    gamma: float,
    alpha: float,
    eos_token_id: int | Sequence[int] | None = None,
) -> PALULoss:
    """Return the `PALULoss` of the released code's parameters; see `PALUMixin`.

    Raises:
        TypeError, ValueError: names the parameter, its value and what it must be.
    """
    center: Any = target_mode
    if isinstance(target_mode, str) or target_mode is None:
        arguments.choice("target_mode", target_mode, tuple(_CENTERS))
        center = _CENTERS[target_mode]
    elif not _finite(target_mode):
        raise TypeError(
            f"target_mode is {target_mode!r}; it must be one of "
            f"{', '.join(map(repr, _CENTERS))} or a finite number"
        )
    arguments.choice(
        "non_sensitive_constraint_type", non_sensitive_constraint_type, tuple(_PRESERVES)
    )
    for name, weight in (("gamma", gamma), ("alpha", alpha)):
        if not (_finite(weight) and weight >= 0):
            raise ValueError(f"{name} is {weight!r}; it must be a finite number of at least 0")
    return PALULoss(
        top_k=top_k,
        prefix_length=integer("first_n", first_n),
        objective=objective,
        center=center,
        preserve=_PRESERVES[non_sensitive_constraint_type],
        forget_weight=gamma,
        preserve_weight=alpha,
        eos_token_id=eos_token_id,
    )


class PALUMixin:
    """PALU for the checkout's trainers; `register` mixes it into its `GradDiff`.

    ``loss = gamma * forget + alpha * preserve + alpha * retain``, as in the released code; the
    retain term is `GradDiff`'s. Each term is a mean over the tokens of one micro-batch, as that
    project's other losses are. The reference is a frozen copy of the model, made as that project
    makes it. Logits of tokens without a loss are neither kept nor, where the installed transformers
    can leave them out, computed.

    Args:
        top_k: how many of the reference's largest logits are levelled, at least 1.
        first_n: how many tokens of each sensitive run are forgotten; 0 or less takes all.
        target_mode: what they are levelled to: `mean` of all logits (also `global_mean`),
            `local_mean` of the chosen ones, or a number.
        non_sensitive_constraint_type: what holds the other answer tokens: `kl` (current to
            reference; also `reverse_kl`), `forward_kl`, `nll`, or None for nothing.
        objective: `flatten` (the released code) or `entropy`.
        gamma: weight of the forget term.
        alpha: weight of the preserve and of the retain term.
        retain_loss_type: `NLL` or `KL`.
        **kwargs: what that project hands to a trainer.

    Raises:
        TypeError, ValueError: a parameter is not as above, or a batch has no forget or retain part.
    """

    def __init__(
        self,
        *,
        top_k: int = 50,
        first_n: int = 3,
        target_mode: str | float = "mean",
        non_sensitive_constraint_type: str | None = "kl",
        objective: str = "flatten",
        gamma: float = 1.0,
        alpha: float = 1.0,
        retain_loss_type: str = "NLL",
        **kwargs: Any,
    ) -> None:
        arguments.choice("retain_loss_type", retain_loss_type, ("NLL", "KL"))
        tokenizer = kwargs.get("tokenizer")
        self.palu_loss = loss_of(
            top_k=top_k,
            first_n=first_n,
            target_mode=target_mode,
            non_sensitive_constraint_type=non_sensitive_constraint_type,
            objective=objective,
            gamma=gamma,
            alpha=alpha,
            eos_token_id=eos_token_ids(kwargs["model"], tokenizer),
        )
        self._terms: Tensor | float = 0.0  # sums over the micro-batches since the last log
        self._batches = 0
        self._seen_labels = False
        # transformers 4.46 renamed the argument that the checkout passes, 5 refuses the old name.
        renamed = "processing_class" in inspect.signature(Trainer.__init__).parameters
        if renamed and "tokenizer" in kwargs:
            kwargs["processing_class"] = kwargs.pop("tokenizer")
        super().__init__(gamma=gamma, alpha=alpha, retain_loss_type=retain_loss_type, **kwargs)
        if renamed and not hasattr(type(self), "tokenizer"):
            self.tokenizer = tokenizer  # the checkout's evaluation reads it
        # A micro-batch's mean has to be divided by the number of micro-batches. From 4.46 on the
        # Trainer leaves that out for models that take loss arguments.
        self.model_accepts_loss_kwargs = False
        if self.ref_model is None:
            self.ref_model = self._prepare_ref_model(self.model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the weighted sum of a batch with a `forget` and a `retain` part.

        `num_items_in_batch` is what newer transformers pass; it is not used. With `return_outputs`
        the second value is a dict with the `logits` of the forget tokens that carry a loss.
        """
        for part in ("forget", "retain"):
            if part not in inputs:
                raise ValueError(
                    f"the batch has {', '.join(map(repr, inputs))} and no {part!r}; PALU needs "
                    f"mode=unlearn and a dataset under data.{part}"
                )
        forget, retain = ({k: inputs[part][k] for k in _INPUTS} for part in ("forget", "retain"))
        if not self._seen_labels:
            self._seen_labels = True
            _warn_unannotated(forget["labels"])
        loss, logits, terms = self._forget_terms(model, **forget)
        retain_loss = self.compute_retain_loss(model=model, retain_inputs=retain)
        loss = loss + self.alpha * retain_loss
        self._terms = self._terms + torch.stack([*terms, retain_loss.detach()]).float()
        self._batches += 1
        return (loss, {"logits": logits}) if return_outputs else loss

    def _forget_terms(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Return the weighted forget and preserve terms, their logits, and the bare terms."""
        roles = self.palu_loss.roles(labels)
        predicted = roles == FORGET if self.palu_loss.preserve is None else roles != NONE
        rows = input_ids, attention_mask, shift_to_logits(predicted)
        logits = logits_at(model, *rows)
        with torch.no_grad():
            ref_logits = logits_at(self.ref_model, *rows).to(logits.dtype)
        output = self.palu_loss.from_rows(logits, roles[:, 1:][predicted[:, 1:]], ref_logits)
        return output.loss, logits, (output.forget, output.preserve)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the bare terms to training logs: this process's mean over the micro-batches since
        the last log."""
        if "loss" in logs and self._batches:
            means = (self._terms / self._batches).tolist()
            names = ("forget_loss", "preserve_loss", "retain_loss")
            logs = {**logs, **dict(zip(names, means, strict=True))}
            self._terms, self._batches = 0.0, 0
        super().log(logs, *args, **kwargs)


def _finite(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)


def _warn_unannotated(labels: Tensor) -> None:
    if not bool((labels == KEEP).any()):
        warnings.warn(
            f"the first forget batch has no label {KEEP}: every answer token counts as sensitive. "
            "Annotated data come from the handler PALUAnnotatedQA (data/datasets@data.forget="
            "PALU_forget)",
            stacklevel=3,
        )

"""The frozen original model that the losses compare with, beside the model or inside it.

Each kind gives the reference's hidden states, its logits and its head for a batch (a cache, see
`palu.reference.cached`, has no logits). The model that is trained comes with every call, wrapped as
the trainer holds it. None of them is an `nn.Module`: nothing that walks modules may find them, save
them, or put them into training mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import palu_kernels
from palu.models.forward import logits_at, model_hidden_states
from palu.models.lm_head import fusable_head
from palu.models.wrappers import adapters_off

REFERENCES = ("live", "adapter_off", "cached")


class ReferenceRows(NamedTuple):
    """The reference's outputs for the rows of a batch, in their order; None where not asked for."""

    forget: Tensor | None  # hidden [forget rows, D]
    indices: Tensor | None  # int32 [forget rows, k]
    preserve: Tensor | None  # hidden [preserve rows, D]
    retain: Tensor | None  # hidden [retain rows, D]


class Inputs(NamedTuple):
    """A batch as the model is called with it, and the rows of it that carry a loss."""

    input_ids: Tensor  # int64 [B, T]
    attention_mask: Tensor | None  # [B, T]
    keep: Tensor  # bool [B, T]: rows of logits that are needed, forget batch first, then retain
    is_forget: Tensor  # bool [forget and preserve rows], which of the kept rows are which
    more: Mapping[str, Tensor] = {}  # what else the model is called with


class _ModelReference:
    """What `LiveReference` and `AdapterOffReference` share."""

    head: palu_kernels.LMHead | None = None  # None: the trained model's own

    def of(self, model: nn.Module, take: Callable[[nn.Module], Tensor]) -> Tensor:
        """Return what `take` gives of the original, without gradient."""
        raise NotImplementedError

    def logits(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Return `[keep.sum(), V]` without gradient; see `palu.models.forward.logits_at`."""
        return self.of(model, lambda original: logits_at(original, *inputs[:3], **inputs.more))

    def rows(self, model: nn.Module, inputs: Inputs, batch: Mapping[str, Any]) -> ReferenceRows:
        """Return the original's hidden states, without gradient."""
        hidden = self.of(
            model,
            lambda original: model_hidden_states(original, *inputs[:2], **inputs.more)[inputs.keep],
        )
        forget, retain = hidden.split([len(inputs.is_forget), len(hidden) - len(inputs.is_forget)])
        return ReferenceRows(forget[inputs.is_forget], None, forget[~inputs.is_forget], retain)


class LiveReference(_ModelReference):
    """A frozen copy of the model in eval mode, called beside it at every step.

    Args:
        model: the model that is about to be trained; it is copied, so its training never changes
            the reference.
        ref_model: another model to use instead of a copy. It is frozen and put into eval mode in
            place.

    Raises:
        ValueError: `ref_model` is the model itself, or has another vocabulary size.
    """

    def __init__(self, model: nn.Module, ref_model: nn.Module | None = None) -> None:
        if ref_model is model:
            raise ValueError(
                "ref_model must be another object than model: training changes the model, and the "
                "reference must stay as it was (leave ref_model out to have a copy made)"
            )
        if ref_model is not None:
            size, ref_size = vocabulary_size(model), vocabulary_size(ref_model)
            if size != ref_size:
                raise ValueError(
                    f"ref_model must have the model's vocabulary of {size} entries, not {ref_size}"
                )
        self.model = copy.deepcopy(model) if ref_model is None else ref_model
        self.model.requires_grad_(False)
        self.model.eval()

    def to(self, device: torch.device | str) -> LiveReference:
        """Move the copy to a device, in place."""
        self.model.to(device)
        return self

    def has_fusable_head(self, inputs: Inputs) -> bool:
        """Return whether losses may be computed from the reference's hidden states."""
        self.head = fusable_head(self.model, *inputs[:2], **inputs.more)
        return self.head is not None

    @torch.no_grad()
    def of(self, model: nn.Module, take: Callable[[nn.Module], Tensor]) -> Tensor:
        return take(self.model)


class AdapterOffReference(_ModelReference):
    """The model itself with its PEFT adapters switched off: no second copy, one more forward pass.

    Args:
        model: a `PeftModel` whose trainable parameters all belong to adapters.

    Raises:
        ValueError: it is not, or something else in it trains as well.
    """

    def __init__(self, model: nn.Module) -> None:
        if not hasattr(model, "disable_adapter"):
            raise ValueError(
                "reference='adapter_off' needs a PEFT model, whose adapters can be switched off; "
                f"model is a {type(model).__name__}: use reference='live' or 'cached'"
            )
        if any(getattr(module, "merged", False) for module in model.modules()):
            raise ValueError(
                "reference='adapter_off' and an adapter is merged into the weights: call "
                "model.unmerge_adapter() first, or use reference='live' or 'cached'"
            )
        names = ("modules_to_save", "trainable_tokens_", getattr(model.base_model, "prefix", ""))
        for name, parameter in model.named_parameters():
            adapter = any(part and part in name for part in names)
            if parameter.requires_grad and not adapter:
                raise ValueError(
                    f"reference='adapter_off' and the parameter {name} trains, which belongs to no "
                    "adapter: the reference would change with it; freeze it, or use "
                    "reference='live' or 'cached'"
                )

    def to(self, device: torch.device | str) -> AdapterOffReference:
        """Do nothing: the model is where it is."""
        return self

    def has_fusable_head(self, inputs: Inputs) -> bool:
        """Return True: the head is the model's."""
        return True

    def of(self, model: nn.Module, take: Callable[[nn.Module], Tensor]) -> Tensor:
        with adapters_off(model):
            return take(model)


def vocabulary_size(model: nn.Module) -> int | None:
    """Return the vocabulary size that the model's config tells, else None."""
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)

"""The frozen original model that the losses compare with, beside the model or inside it.

Each kind runs the original on a batch (`of`) and knows its head. (A cache, see
`palu.reference.cached`, knows what it was built from.) The model that is trained comes with every
call, wrapped as the trainer holds it. None of them is an `nn.Module`: nothing that walks modules
may find them, save them, or put them into training mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import palu_kernels
from palu.models.head_check import why_not_fusable
from palu.models.in_head import whole_head
from palu.models.lm_head import LMHead
from palu.models.wrappers import adapters_off, is_sharded

REFERENCES = ("live", "adapter_off", "cached")


class LiveReference:
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
        self.head: palu_kernels.LMHead | None = None

    def to(self, device: torch.device | str) -> LiveReference:
        """Move the copy to a device, in place."""
        self.model.to(device)
        return self

    def why_not_fusable(self, inputs: Mapping[str, Any]) -> str | None:
        """Return why losses cannot be computed from the reference's hidden states, else None."""
        reason = why_not_fusable(self.model, **inputs)
        if reason is None and not is_sharded(self.model):
            self.head = LMHead.from_model(self.model)
        return None if reason is None else f"of the reference, {reason}"

    def whole_head(self) -> AbstractContextManager[palu_kernels.LMHead]:
        """Yield its head, whole for the time of the block where it is sharded."""
        return whole_head(self.model) if self.head is None else nullcontext(self.head)

    @torch.no_grad()
    def of(self, model: nn.Module, take: Callable[[nn.Module], Tensor]) -> Tensor:
        """Return what `take` gives of the original, without gradient."""
        return take(self.model)


class AdapterOffReference:
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

    def why_not_fusable(self, inputs: Mapping[str, Any]) -> str | None:
        """Return None: the head is the model's."""
        return None

    def whole_head(self) -> AbstractContextManager[None]:
        """Yield None: it is the model's, which no adapter touches."""
        return nullcontext()

    def of(self, model: nn.Module, take: Callable[[nn.Module], Tensor]) -> Tensor:
        with adapters_off(model):
            return take(model)


def vocabulary_size(model: nn.Module) -> int | None:
    """Return the vocabulary size that the model's config tells, else None."""
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)


def token_count(model: nn.Module) -> int | None:
    """Return how many tokens the model can be given, None where nothing tells. Some know more than
    they can say, such as that of an image."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    return getattr(embeddings, "num_embeddings", vocabulary_size(model))

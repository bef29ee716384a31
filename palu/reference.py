"""The frozen original model that the losses compare with."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from palu.modeling import kept_logits


class LiveReference:
    """A frozen copy of the model in eval mode, called beside it at every step.

    It is no `nn.Module` on purpose: nothing that walks the trainer's or the model's modules may
    find it, save it, or put it back into training mode.

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
        """Moves the copy to a device, in place."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def kept_logits(self, input_ids: Tensor, attention_mask: Tensor | None, keep: Tensor) -> Tensor:
        """`[keep.sum(), V]` logits without gradient; see `palu.modeling.kept_logits`."""
        return kept_logits(self.model, input_ids, attention_mask, keep)


def vocabulary_size(model: nn.Module) -> int | None:
    """Entries of a row of logits, as the model's config tells; None where it does not."""
    return getattr(getattr(model, "config", None), "vocab_size", None)

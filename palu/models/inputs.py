"""The inputs of a model beside `input_ids` and `attention_mask`: nothing that a collator gives
is dropped without a word."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from palu.data.pairs import PREFIX
from palu.data.roles import IGNORE
from palu.models.wrappers import unwrap

# Columns that the losses use, and prefixes of those that the trainer adds.
COLUMNS = ("input_ids", "labels", "attention_mask")
_OURS = ("palu_", "alternate_")
# Columns that are no input of any model.
_FOR_USERS = {"example_id", "id", "ids", "idx", "index", "length", "special_tokens_mask"}
# Inputs that the losses set themselves, or that change what a causal language model computes.
_SET_HERE = {
    "inputs_embeds",
    "logits_to_keep",
    "num_logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "past_key_values",
    "return_dict",
    "shift_labels",
    "use_cache",
}


def input_names(model: nn.Module) -> frozenset[str] | None:
    """Return the names that the forward of the model inside the wrappers takes; None for one
    that takes anything."""
    inner = unwrap(model)
    parameters = inspect.signature(inner.forward).parameters
    names = set(parameters)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        if "input_ids" not in names:
            return None
        # `**kwargs` go on to the base model, whose forward may name them.
        base = getattr(inner, "base_model", inner)
        names |= set(inspect.signature(base.forward).parameters)
    return frozenset(names)


def more_inputs(batch: Mapping[str, Any], device: torch.device | None = None) -> dict[str, Tensor]:
    """Return the tensors of a batch that the model is called with beside `input_ids` and
    `attention_mask`, on a device or where they are."""
    return {
        name: value.to(device)
        for name, value in batch.items()
        if isinstance(value, Tensor)
        and name not in COLUMNS
        and name not in _FOR_USERS
        and not name.startswith(_OURS)
    }


def real_tokens(batch: Mapping[str, Any]) -> Tensor | None:
    """Return bool `[B, T]`, false at padding; None where no mask of that shape tells."""
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == batch["input_ids"].shape:
        return mask != 0
    return None


def is_default(name: str, value: Any, batch: Mapping[str, Any]) -> bool:
    """Return whether a model that is not given this input computes the same: positions that
    count the tokens, one type of tokens."""
    if name not in ("position_ids", "cache_position", "token_type_ids"):
        return False
    if name == "token_type_ids":
        return not bool(value.any())
    real = real_tokens(batch)
    counted = torch.arange(batch["input_ids"].shape[1], device=value.device)
    if value.shape[-1:] != counted.shape:
        return False
    return not bool(((value != counted) & (True if real is None else real)).any())


def taken_inputs(batch: Mapping[str, Any], names: frozenset[str] | None, whose: str) -> dict:
    """Return a batch without what its model does not take and needs not.

    Args:
        batch: as a collator makes it, `[B, T]`.
        names: of `input_names`.
        whose: the model's and the collator's name, for the message.

    Raises:
        ValueError: names what the model does not take and may not be left out.
    """
    taken, unknown = {}, []
    for name, value in batch.items():
        if name in COLUMNS or name.startswith(_OURS):
            taken[name] = value
        elif name in _SET_HERE:
            unknown.append(name)
        elif (names is None or name in names) and isinstance(value, Tensor):
            taken[name] = value
        elif name in _FOR_USERS or (name not in (names or ()) and not isinstance(value, Tensor)):
            continue  # a tensor could be an input, a list of texts could not
        elif not (isinstance(value, Tensor) and is_default(name, value, batch)):
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{whose} {', '.join(map(repr, sorted(unknown)))}; a batch must hold input_ids, labels "
            "and tensors that the model's forward takes: leave it out of the batch or of the data "
            "set"
        )
    return taken


def joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Tensor]:
    """Concatenate the rows of two batches, padded on the right alike: `input_ids`,
    `attention_mask`, `labels` and what else the model is called with.

    Raises:
        ValueError: an input that only one of them has, or whose shapes do not allow it.
    """
    sides = [{**_columns(batch), **more_inputs(batch)} for batch in (first, second)]
    length = max(side["input_ids"].shape[1] for side in sides)

    def padded(name: str, side: Mapping[str, Tensor]) -> Tensor:
        value, shape = side[name], side["input_ids"].shape
        if value.shape[:2] != shape:
            raise ValueError(
                f"{name} has shape {list(value.shape)} beside input_ids of {list(shape)}; it must "
                "begin with that shape where forget and retain rows, or two answers to a question, "
                "go through the model in one batch"
            )
        # The padding's id does not matter: its mask is 0 and its label IGNORE.
        pads = [0, 0] * (value.dim() - 2) + [0, length - shape[1]]
        return functional.pad(value, pads, value=IGNORE if name == "labels" else 0)

    if odd := sides[0].keys() ^ sides[1].keys():
        raise ValueError(
            f"{', '.join(map(repr, sorted(odd)))} is in one batch of a step and not in the other "
            "(forget and retain rows, or two answers to a question); it must be in both"
        )
    return {name: torch.cat([padded(name, side) for side in sides]) for name in sides[0]}


def stacked(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Concatenate the answers of a batch and its second answers to 2 B rows: `input_ids`,
    `labels`, `attention_mask` and more that the model is called with. An example without an
    answer token has no second one either.

    Raises:
        ValueError: the batch has rows, and no second answers.
    """
    if len(batch["input_ids"]) == 0:  # a micro-batch of retain examples
        return dict(batch)
    if PREFIX + "input_ids" not in batch:
        raise ValueError(
            f"the forget rows have no {PREFIX}input_ids and {PREFIX}labels; this method needs a "
            "second answer in each (palu.data.pairs.add_alternates)"
        )
    others = {n.removeprefix(PREFIX): v for n, v in batch.items() if n.startswith(PREFIX)}
    answered = (batch["labels"][:, 1:] != IGNORE).any(1, keepdim=True)
    others["labels"] = torch.where(answered, others["labels"], IGNORE)
    return joined(batch, others)


def _columns(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    columns = {name: batch[name] for name in COLUMNS if batch.get(name) is not None}
    columns.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    return columns

"""Pad tokenised examples to a batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from palu.data.roles import IGNORE
from palu.data.spans import integer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Of columns that not every example needs to have: their values, by the number of tokens.
_DEFAULTS: dict[str, Callable[[int], Sequence[int]]] = {
    "attention_mask": lambda length: [1] * length,
    "position_ids": range,
    "token_type_ids": lambda length: [0] * length,
}


class Collator:
    """Pad tokenised examples on the right to the longest of a batch.

    Args:
        tokenizer: the tokenizer, or the id to pad with. A tokenizer's pad token is used, else its
            EOS, else 0: the choice does not matter, since the mask is built from lengths, and from
            the examples' own masks, and never from ids.
        keep_ids: whether the batch holds `example_id`, a list of str. (Models do not take it.)
        pad_to_multiple_of: round the length up to a multiple of this.

    Calling it with a list of B dicts returns `input_ids`, `labels` (padded with -100) and
    `attention_mask` (1 for real tokens; an example's own where it has one), each int64 [B, T];
    `position_ids` and `token_type_ids` too (padded with 0) where an example has them. Other fields
    are left out.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase | int",
        *,
        keep_ids: bool = False,
        pad_to_multiple_of: int | None = None,
    ):
        if not isinstance(tokenizer, int) and not hasattr(tokenizer, "pad_token_id"):
            kind = type(tokenizer).__name__
            raise TypeError(f"tokenizer must be a tokenizer or the id to pad with, not {kind}")
        self.pad_id = tokenizer if isinstance(tokenizer, int) else _pad_id(tokenizer)
        if self.pad_id < 0:
            raise ValueError(f"the padding id must be 0 or more, got {self.pad_id}")
        if pad_to_multiple_of is not None and integer("pad_to_multiple_of", pad_to_multiple_of) < 1:
            raise ValueError(f"pad_to_multiple_of must be 1 or more, got {pad_to_multiple_of}")
        self.keep_ids = keep_ids
        self.multiple = pad_to_multiple_of or 1

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not features:
            raise ValueError("a batch needs at least one example")
        wanted = ["input_ids", "labels"] + ["example_id"] * self.keep_ids
        for number, feature in enumerate(features):
            _check(number, feature, wanted)
        lengths = [len(feature["input_ids"]) for feature in features]
        longest = -(-max(lengths) // self.multiple) * self.multiple
        shape = (len(features), longest)
        input_ids = torch.full(shape, self.pad_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORE, dtype=torch.int64)
        for row, (feature, length) in enumerate(zip(features, lengths, strict=True)):
            input_ids[row, :length] = torch.as_tensor(feature["input_ids"], dtype=torch.int64)
            labels[row, :length] = torch.as_tensor(feature["labels"], dtype=torch.int64)
        batch: dict[str, Any] = {"input_ids": input_ids, "labels": labels}
        for name, default in _DEFAULTS.items():
            if name != "attention_mask" and not any(name in feature for feature in features):
                continue
            batch[name] = torch.zeros(shape, dtype=torch.int64)
            for row, (feature, length) in enumerate(zip(features, lengths, strict=True)):
                values = feature.get(name)
                values = default(length) if values is None else values  # tables fill with None
                if len(values) != length:
                    raise ValueError(
                        f"example {row} of the batch has {length} input_ids but {len(values)} "
                        f"{name}"
                    )
                batch[name][row, :length] = torch.as_tensor(values, dtype=torch.int64)
        if self.keep_ids:
            batch["example_id"] = [feature["example_id"] for feature in features]
        return batch


def _check(number: int, feature: Any, wanted: Sequence[str]) -> None:
    """Raise TypeError or ValueError for an example that has not got what a batch is made of."""
    if not isinstance(feature, Mapping):
        raise TypeError(
            f"example {number} of the batch is a {type(feature).__name__}; it must be a mapping "
            "with input_ids and labels"
        )
    for name in wanted:
        if name not in feature:
            raise ValueError(
                f"example {number} of the batch has no {name!r}, only {[*feature.keys()]}"
            )
    ids, labels = len(feature["input_ids"]), len(feature["labels"])
    if ids != labels:
        raise ValueError(f"example {number} of the batch has {ids} input_ids but {labels} labels")


def _pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return candidate
    return 0

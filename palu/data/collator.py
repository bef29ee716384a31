"""Pad tokenised examples to a batch."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from palu.data.roles import IGNORE
from palu.data.spans import integer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Collator:
    """Pad tokenised examples on the right to the longest of a batch.

    Args:
        tokenizer: the tokenizer, or the id to pad with. A tokenizer's pad token is used, else its
            EOS, else 0: the choice does not matter, since the mask is built from lengths and never
            from ids.
        keep_ids: whether the batch holds `example_id`, a list of str. (Models do not take it.)
        pad_to_multiple_of: round the length up to a multiple of this.

    Calling it with a list of B dicts returns `input_ids`, `labels` (padded with -100) and
    `attention_mask` (1 for real tokens), each int64 [B, T]; `position_ids` and `token_type_ids`
    too (padded with 0) where an example has them. Other fields are left out.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase | int",
        *,
        keep_ids: bool = False,
        pad_to_multiple_of: int | None = None,
    ):
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
            for name in wanted:
                if name not in feature:
                    raise ValueError(
                        f"example {number} of the batch has no {name!r}, only {[*feature.keys()]}"
                    )
            ids, labels = len(feature["input_ids"]), len(feature["labels"])
            if ids != labels:
                raise ValueError(
                    f"example {number} of the batch has {ids} input_ids but {labels} labels"
                )
        lengths = [len(feature["input_ids"]) for feature in features]
        longest = -(-max(lengths) // self.multiple) * self.multiple
        shape = (len(features), longest)
        input_ids = torch.full(shape, self.pad_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORE, dtype=torch.int64)
        for row, (feature, length) in enumerate(zip(features, lengths, strict=True)):
            input_ids[row, :length] = torch.as_tensor(feature["input_ids"], dtype=torch.int64)
            labels[row, :length] = torch.as_tensor(feature["labels"], dtype=torch.int64)
        real = torch.arange(longest) < torch.tensor(lengths)[:, None]
        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": real.to(torch.int64),
        }
        for name in ("position_ids", "token_type_ids"):
            if not any(name in feature for feature in features):
                continue
            batch[name] = torch.zeros(shape, dtype=torch.int64)
            for row, (feature, length) in enumerate(zip(features, lengths, strict=True)):
                default = range(length) if name == "position_ids" else [0] * length
                values = feature.get(name, default)
                batch[name][row, :length] = torch.as_tensor(values, dtype=torch.int64)
        if self.keep_ids:
            batch["example_id"] = [feature["example_id"] for feature in features]
        return batch


def _pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return candidate
    return 0

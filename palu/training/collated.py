"""What a collator of the user's makes, as the losses take it."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from palu.data.collator import Collator
from palu.data.roles import IGNORE, KEEP, check_labels, check_tokens
from palu.models.inputs import input_names, real_tokens, taken_inputs
from palu.models.wrappers import unwrap
from palu.reference.model import token_count, vocabulary_size
from palu_kernels.backend import check_values

_FIRST = 8  # examples that a collator is tried out with
# What says where the examples of a packed row begin, and nothing else that the losses need.
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")

Labels = list[tuple[int, int]]  # those that are not IGNORE, each with its token


class ExampleRows:
    """A collator whose batches have every example in a row of its own, padded on the right, with
    the labels of the data set and what the model takes.

    Packed examples (`position_ids` that begin again, `cu_seq_lens_q`, `seq_idx`, an
    `attention_mask` that numbers them) are taken apart, and what is padded on the left is moved: so
    their numbers are those of padded ones whatever the model makes of positions, a cache knows them
    by their ids, and no run of labels goes from one example into the next.

    Args:
        collator: the user's.
        model: in wrappers or not.
        ordered: whether the examples have to come in the order they are given in.
        more: gives what is added to a batch of examples in rows.

    Raises:
        ValueError, TypeError: when it is called: the collator changes labels, gives what the model
            does not take, or no batch of tensors; a token id or a label is none of the vocabulary.
    """

    def __init__(
        self,
        collator: Callable[[list], Mapping[str, Any]],
        model: nn.Module,
        *,
        ordered: bool = False,
        more: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        self.collator, self.ordered, self.more = collator, ordered, more
        self.names = input_names(model)
        self._vocab_size = vocabulary_size(unwrap(model))
        self._token_count = token_count(unwrap(model))
        self._model_name = type(unwrap(model)).__name__
        while isinstance(collator, functools.partial):
            collator = collator.func
        self._name = f"data_collator {getattr(collator, '__name__', type(collator).__name__)}"
        # Theirs make tensors of all that an example has, and of texts they cannot.
        self._numbers_only = (getattr(collator, "__module__", None) or "").startswith(
            "transformers."
        )
        if hasattr(collator, "tokenizer"):
            self.tokenizer = collator.tokenizer  # which Trainer saves where it has none itself

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        # Before it is called: some collators change the examples.
        wanted = None if type(self.collator) is Collator else _labels_of(features)
        if self._numbers_only:
            features = [
                {n: v for n, v in feature.items() if not isinstance(v, str)}
                if isinstance(feature, Mapping)
                else feature
                for feature in features
            ]
        try:
            batch = self.collator(features)
        except (KeyError, TypeError, ValueError) as error:  # KeyError: records without tokens
            if not self._numbers_only:
                raise  # the user's own words
            raise ValueError(
                f"{self._name} cannot take these examples; leave data_collator out, or take "
                f"DataCollatorForSeq2Seq, which pads labels ({error})"
            ) from error
        batch = examples_in_rows(self._checked(batch))
        if wanted is not None:
            self._compare(wanted, batch)
        whose = f"{self._name} gives what {self._model_name} does not take:"
        batch = taken_inputs(batch, self.names, whose)
        return batch if self.more is None else batch | self.more(batch)

    def _checked(self, batch: Any) -> dict[str, Any]:
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"{self._name} returns a {type(batch).__name__}; it must be a mapping with "
                "input_ids and labels"
            )
        for name in ("input_ids", "labels"):
            value = batch.get(name)
            if not isinstance(value, Tensor) or value.dim() != 2:
                found = (
                    f"a tensor of shape {list(value.shape)}"
                    if isinstance(value, Tensor)
                    else f"a {type(value).__name__}"
                )
                raise TypeError(
                    f"{self._name} gives {name} as {found} (its batch has "
                    f"{', '.join(map(str, batch))}); it must be a tensor [B, T]"
                )
        if batch["labels"].shape != batch["input_ids"].shape:
            raise ValueError(
                f"{self._name} gives labels of shape {list(batch['labels'].shape)} and input_ids "
                f"of {list(batch['input_ids'].shape)}; they must be the same"
            )
        mask = batch.get("attention_mask")
        if mask is not None and not isinstance(mask, Tensor):
            raise TypeError(
                f"{self._name} gives attention_mask as a {type(mask).__name__}; it must be a tensor"
            )
        if self._vocab_size is not None and check_values(batch["labels"].device):
            check_tokens(batch["input_ids"], self._token_count)
            check_labels(batch["labels"], self._vocab_size)
        return dict(batch)

    def _compare(self, wanted: list[Labels], batch: Mapping[str, Tensor]) -> None:
        # The first token of an example is never predicted, and collators that pack drop its label.
        found = [
            _labelled(ids, labels)
            for ids, labels in zip(batch["input_ids"][:, 1:], batch["labels"][:, 1:], strict=True)
        ]
        examples = len(wanted)
        if len(found) != examples:  # rows of the data set were packed beforehand
            found, wanted = ([list(itertools.chain(*rows))] for rows in (found, wanted))
        if found == wanted or (not self.ordered and sorted(found) == sorted(wanted)):
            return
        counts = []
        for rows in (wanted, found):
            labels = [label for row in rows for label, _ in row]
            ids = sum(label >= 0 for label in labels)
            counts.append(f"{ids} token ids and {labels.count(KEEP)} times {KEEP}")
        where = "" if counts[0] != counts[1] else ", others, elsewhere or in another order"
        raise ValueError(
            f"{self._name} changes labels: {examples} examples of the data set have {counts[0]} "
            f"(beside {IGNORE}), its batch {counts[1]}{where}; it must only pad or pack them: "
            "leave data_collator out, or take palu.data.collator.Collator or DataCollatorForSeq2Seq"
        )


def try_out(collator: Callable[[list], Any], datasets: Iterable[Any]) -> None:
    """Call a collator with the first examples of data sets that can be indexed: what is wrong with
    it is told before any work. The random state is as it was afterwards."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            for dataset in datasets:
                if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
                    rows = [dataset[i] for i in range(min(len(dataset), _FIRST))]
                    if rows:
                        collator(rows)
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


def examples_in_rows(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch with one example a row from its first column on; itself where it is so already.

    Raises:
        ValueError: packed examples beside something that cannot be taken apart.
    """
    begins = _begins(batch)
    batch = {name: value for name, value in batch.items() if name not in _PACKING}
    if not bool(begins[:, 1:].any()):
        return batch
    real = real_tokens(batch)
    if real is None and batch.get("attention_mask") is not None:
        raise ValueError(
            f"attention_mask has shape {list(batch['attention_mask'].shape)} beside packed "
            f"examples; it must be {list(begins.shape)} or left out: they are kept apart anyway"
        )
    pieces = _pieces(begins, real, batch["labels"])
    lengths = torch.tensor([stop - start for _, start, stop in pieces])
    columns = torch.arange(int(lengths.max()))
    mask = batch.get("attention_mask", batch["input_ids"])
    batch["attention_mask"] = (torch.ones_like(mask) if real is None else real).to(mask.dtype)
    one_a_row = [row for row, _, _ in pieces] == list(range(len(begins)))
    return {
        name: _rows(name, value, pieces, columns, begins.shape, one_a_row)
        for name, value in batch.items()
    }


def _pieces(begins: Tensor, real: Tensor | None, labels: Tensor) -> list[tuple[int, int, int]]:
    """Row, first column and last plus one of every example."""
    pieces = []
    for row, starts in enumerate(begins):
        places = starts.nonzero().flatten().tolist() or [0]
        end = begins.shape[1]
        if real is not None:
            end = max(real[row].nonzero().flatten().tolist(), default=-1) + 1
        pieces += [(row, *ends) for ends in zip(places, [*places[1:], end], strict=True)]
    # Padding without a mask, where every position is 0.
    kept = [
        (row, start, stop)
        for row, start, stop in pieces
        if stop - start > 1 or real is not None or labels[row, start] != IGNORE
    ]
    return kept or pieces


def _rows(
    name: str,
    value: Any,
    pieces: Sequence[tuple[int, int, int]],
    columns: Tensor,
    shape: torch.Size,
    one_a_row: bool,
) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.shape[:2] != shape:
        if one_a_row:
            return value
        raise ValueError(
            f"{name} has shape {list(value.shape)} beside packed examples of {list(shape)}; it "
            "must begin with that shape, so that they can be told apart"
        )
    made = value.new_full(
        (len(pieces), len(columns), *value.shape[2:]), IGNORE if name == "labels" else 0
    )
    for number, (row, start, stop) in enumerate(pieces):
        made[number, : stop - start] = value[row, start:stop]
    return made


def _begins(batch: Mapping[str, Any]) -> Tensor:
    """Bool `[B, T]`: the first token of every example."""
    ids, real = batch["input_ids"], real_tokens(batch)
    begins = torch.zeros_like(ids, dtype=torch.bool)
    positions, numbers = batch.get("position_ids"), batch.get("seq_idx")
    if (ends := batch.get("cu_seq_lens_q")) is not None:
        ends = torch.as_tensor(ends).flatten().tolist()
        if len(ids) != 1 or sorted({0, *ends}) != ends or ends[-1] > ids.shape[1]:
            raise ValueError(
                f"cu_seq_lens_q is {ends} beside input_ids of shape {list(ids.shape)}; it must "
                "rise from 0 to the length of one packed row"
            )
        begins[0, ends[:-1]] = True
        if ends[-1] < ids.shape[1]:
            begins[0, ends[-1]] = True  # what is left is padding
    elif real is not None and bool((batch["attention_mask"] > 1).any()):
        mask = batch["attention_mask"]  # the number of the example, as some packers have it
        begins[:, 1:] = mask[:, 1:] != mask[:, :-1]
    elif isinstance(numbers, Tensor) and numbers.shape == ids.shape:
        begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    elif isinstance(positions, Tensor) and positions.shape == ids.shape:
        begins[:, 1:] = positions[:, 1:] <= positions[:, :-1]
    if real is None:
        begins[:, 0] = True
        return begins
    first = real & (real.cumsum(1) == 1)
    return (begins & real) | first


def _labels_of(features: Sequence[Any]) -> list[Labels] | None:
    """Of every example without its first token; None where there is one without labels, which the
    collator makes."""
    found = []
    for feature in features:
        if not isinstance(feature, Mapping):
            return None
        names = ("input_ids", "labels", "attention_mask", "position_ids", "seq_idx")
        row = {n: torch.as_tensor(feature[n])[None] for n in names if _are_numbers(feature.get(n))}
        if not {"input_ids", "labels"} <= row.keys() or len({v.shape for v in row.values()}) > 1:
            return None
        later = ~_begins(row)
        found.append(_labelled(row["input_ids"][later], row["labels"][later]))
    return found


def _labelled(ids: Tensor, labels: Tensor) -> Labels:
    chosen = labels != IGNORE
    return list(zip(labels[chosen].tolist(), ids[chosen].tolist(), strict=True))


def _are_numbers(values: Any) -> bool:
    return (
        isinstance(values, (Sequence, Tensor, np.ndarray))
        and getattr(values, "ndim", 1) == 1
        and len(values) > 0
        and not isinstance(values[0], (str, bytes, Sequence))
    )

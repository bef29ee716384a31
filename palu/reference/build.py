"""Building a reference cache: one pass of the frozen starting model over the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from palu.data.roles import check_labels, check_tokens
from palu.loss import PALULoss
from palu.reference.rows import reference_head, reference_rows
from palu.reference.store import CacheError, PartialCache
from palu.storage.fingerprint import example_bytes, example_id, example_ids

AUTOCAST = (None, torch.bfloat16, torch.float16)


class Source:
    """One data set of a cache: its distinct examples and their ids.

    Args:
        token_count: of the model that is going to read it; None: of no model.

    Attributes:
        name: `forget` or `retain`.
        dataset: mappings with `input_ids` and `labels`.
        ids: the id of each row.
    """

    def __init__(self, name: str, dataset: Any, token_count: int | None = None) -> None:
        self.name, self.dataset, self._token_count = name, dataset, token_count
        self.ids: list[int] = []
        self._lengths: list[int] = []
        first: dict[int, int] = {}
        if not hasattr(dataset, "__len__"):
            raise CacheError(
                f"the {name} set is a {type(dataset).__name__} without a length: a stream cannot "
                "be cached, use reference='live'"
            )
        if len(dataset) == 0:
            raise CacheError(f"the {name} set must have at least one row")
        for number in range(len(dataset)):
            row = self._row(number)
            self._check_tokens(number, row["input_ids"])
            its_id = example_id(row)
            self.ids.append(its_id)
            self._lengths.append(len(row["input_ids"]))
            other = first.setdefault(its_id, number)
            if other != number and example_bytes(row) != example_bytes(self._row(other)):
                raise CacheError(
                    f"rows {other} and {number} of the {name} set are different examples with the "
                    f"same id {its_id}: change or remove one of them"
                )
        self._first = list(first.values())

    def _row(self, number: int) -> Mapping[str, Any]:
        row = self.dataset[number]
        for key in ("input_ids", "labels"):
            if key not in row:
                raise CacheError(f"row {number} of the {self.name} set has no {key!r}")
        ids, labels = len(row["input_ids"]), len(row["labels"])
        if ids != labels:
            raise CacheError(
                f"row {number} of the {self.name} set has {ids} input_ids but {labels} labels"
            )
        return row

    def _check_tokens(self, number: int, ids: Any) -> None:
        where = f"row {number} of the {self.name} set"
        ids = torch.as_tensor(ids)
        if ids.is_floating_point() and len(ids):  # an empty list is of no kind
            raise CacheError(f"{where} has input_ids of {ids.dtype}; they must be integers")
        try:
            if self._token_count is not None:
                check_tokens(ids, self._token_count)
        except ValueError as error:
            raise CacheError(f"{where}: {error}") from None

    @property
    def unique(self) -> int:
        """The number of distinct examples."""
        return len(self._first)

    def batches(self, size: int) -> list[list[int]]:
        """Return row numbers of the distinct examples, of like length together; the same for any
        order of the data set."""
        order = sorted(self._first, key=lambda i: (self._lengths[i], self.ids[i]))
        return [order[start : start + size] for start in range(0, len(order), size)]


def check_options(
    loss: PALULoss,
    retain_dataset: Any,
    autocast_dtype: torch.dtype | None,
    batch_size: int,
    shard_bytes: int,
) -> None:
    """Check the arguments of `ReferenceCache.build`.

    Raises:
        ValueError: names the argument.
        CacheError: there is nothing to store.
    """
    for name, value in (("batch_size", batch_size), ("shard_bytes", shard_bytes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")
    if autocast_dtype not in AUTOCAST:
        raise ValueError(
            f"autocast_dtype is {autocast_dtype}; it must be torch.bfloat16, torch.float16 or None"
        )
    if retain_dataset is None and not loss.needs_reference:
        raise CacheError(
            "nothing to store: select_from='current' with preserve=None and no retain_dataset "
            "needs no reference"
        )


class ReferencePass:
    """One pass of the frozen starting model over data; call its methods in `eval_mode`.

    Args:
        sources: the forget set, and the retain set where its term is a KL.
        loss: says which rows matter and what of them is needed.
        collator: pads a list of examples.

    Raises:
        CacheError: the model's head is none that can be cached.
    """

    def __init__(
        self, model: nn.Module, sources: Sequence[Source], loss: PALULoss, collator: Callable
    ) -> None:
        self.model, self.sources, self.loss, self.collator = model, sources, loss, collator
        self.head = reference_head(model, collator([sources[0].dataset[0]]))

    def batches(self, size: int) -> list[tuple[Source, list[int]]]:
        """Return the batches of all that the loss needs: data set and row numbers."""
        wanted = [s for s in self.sources if s.name == "retain" or self.loss.needs_reference]
        return [(s, numbers) for s in wanted for numbers in s.batches(size)]

    def rows(self, source: Source, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Compute `reference_rows` of one of these batches.

        Raises:
            CacheError: a label is no token, or the collator does more than padding.
            FloatingPointError: a hidden state is infinite or NaN.
        """
        batch = self.collator([source.dataset[i] for i in numbers])
        ids = [source.ids[i] for i in numbers]
        if example_ids(batch).tolist() != ids:
            raise CacheError(
                f"the collator changes examples of the {source.name} set, reorders them or leaves "
                "out attention_mask: it must only pad"
            )
        try:
            check_labels(batch["labels"], self.head.vocab_size)
        except ValueError as error:
            raise CacheError(f"{source.name} set: {error}") from None
        return reference_rows(self.model, self.head, batch, ids, source.name, self.loss)

    def store(self, partial: PartialCache, report: Callable[..., None] | None) -> None:
        """Compute and write the shards that are not there yet."""
        batches = self.batches(partial.content["batch_size"])
        total, done = sum(len(numbers) for _, numbers in batches), 0
        pending: list[dict[str, Tensor]] = []
        for number, (source, numbers) in enumerate(batches):
            done += len(numbers)
            if number < partial.batches_done:
                continue
            pending.append(self.rows(source, numbers))
            size = sum(
                rows[n].nbytes for rows in pending for n in ("indices", "hidden") if n in rows
            )
            last = number + 1 == len(batches) or batches[number + 1][0] is not source
            if last or size >= partial.content["shard_bytes"]:
                shard = {name: torch.cat([rows[name] for rows in pending]) for name in pending[0]}
                partial.store_shard(source.name, shard, batches=len(pending))
                pending = []
            if report is not None:
                report(done, total)

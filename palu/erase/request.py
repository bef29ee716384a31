"""What is erased, out of what, and how; and what tells a request from another one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palu.storage.fingerprint import data_digests
from palu.storage.output import versions


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is erased, out of what, and how.

    Attributes:
        model: folder of the model, or its id on the hub.
        records: the data that the model was tuned on, or as much of it as there is: a file, folder
            or id on the hub that `palu.load_examples` reads. The records in which a term is found
            are forgotten.
        output: folder for the result.
        terms: files of values to erase, or values; none: the spans that the records have already.
        columns, retain_columns: of `records` and `retain`, see `palu.load_examples`.
        retain: what to keep; None: the other records of `records`.
        retrained: folder of a model that never saw what is erased, for comparison.
        options: more words of `palu unlearn`'s command line: `("--lora-rank", "16")`.
        quick: a first look with few attacks.
        seed: of training, attacks, and the choice of what is measured.
        dtype, device: of the weights.
        keep_work: leave `OUTPUT-work` where it is.
    """

    model: str | Path
    records: str
    output: str | Path
    terms: str | Sequence[str] = ()
    columns: str | None = None
    retain: str | None = None
    retain_columns: str | None = None
    retrained: str | Path | None = None
    options: Sequence[str] = ()
    quick: bool = False
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    keep_work: bool = False

    @property
    def inputs(self) -> list[Path]:
        """Return the files and folders that are read."""
        from palu.data.files import local_path

        named = [self.records, self.retain, *(term for term in self.terms if os.path.exists(term))]
        places = [local_path(one) for one in named if one is not None]
        return [Path(one) for one in (*places, self.model, self.retrained) if one is not None]


def request_key(request: Request) -> str:
    """Return what tells whether a request is another one, but for the content of its models."""
    own = {**vars(request), "output": None, "keep_work": None}
    more = [source_digest(word) for word in request.options]
    return key_of(data_key(request), own, more, versions())


def data_key(request: Request) -> str:
    sources = (request.records, request.retain, *request.terms)
    return key_of(request.columns, request.retain_columns, *map(source_digest, sources))


def source_digest(source: str | None) -> Any:
    """Return what tells whether a file, or what is none, is another one."""
    from palu.data.files import local_path

    place = None
    with suppress(ValueError):  # a term may be no file at all
        place = local_path(source)
    return source, None if place is None else data_digests(place)


def key_of(*parts: Any) -> str:
    text = json.dumps([str(part) for part in parts])
    return hashlib.sha256(text.encode()).hexdigest()

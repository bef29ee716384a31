"""Tables of a benchmark: found in a local folder or on the hub, and read as they stand.

On the hub a data set has configurations and splits. A local folder may be a copy of it
(`CONFIG/SPLIT-00000-of-00001.parquet`), of the benchmark's own repository (`CONFIG/SPLIT.json`), or
of files named after the configuration alone (`CONFIG.json`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from palu.data.sources import open_source
from palu.data.spans import check_text, shown

_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_ENDINGS = (".json", ".jsonl", ".parquet", ".csv", ".json.gz", ".jsonl.gz")


class Table(NamedTuple):
    """Records and where each stands, for messages."""

    name: str
    records: list[tuple[Any, str]]

    def digest(self) -> str:
        """Return an order-sensitive hash of the records."""
        text = json.dumps([record for record, _ in self.records], sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16, person=b"palu.benchmark").hexdigest()

    def texts(self, *fields: str) -> list[tuple[str, ...]]:
        """Return the texts of some fields of every record.

        Raises:
            ValueError, TypeError: a field is missing or no text; names table, row and field.
        """
        return [
            tuple(
                check_text(f"{where}, field {name!r}", value(record, where, name))
                for name in fields
            )
            for record, where in self.records
        ]


def value(record: Any, where: str, name: str) -> Any:
    """Return a field of a record. Raises ValueError where it has none, naming it."""
    if not isinstance(record, dict):
        raise TypeError(f"{where}: a record must be an object with fields, got {shown(record)}")
    if record.get(name) is None:
        fields = ", ".join(map(str, record)) or "none"
        raise ValueError(f"{where}: field {name!r} is missing (the fields are {fields})")
    return record[name]


def text_field(record: Any, where: str, name: str) -> str:
    """Return a field of a record, a text. Raises TypeError where it is none, naming it."""
    return check_text(f"{where}, field {name!r}", value(record, where, name))


def read_table(data: str, places: Sequence[tuple[str, str]]) -> Table:
    """Read the first of some tables that is there.

    Args:
        data: a local folder, or the id of a data set on the hub (`org/name`).
        places: (configuration, split), in the order in which they are looked for. On the hub the
            first is asked for.

    Raises:
        ValueError: none is there, or what is there cannot be read or is empty.
    """
    if is_hub(data):
        config, split = places[0]
        return _read(f"{data}/{config}:{split}", [f"{data}/{config}:{split}"])
    for config, split in places:
        if files := _files(Path(data), config, split):
            return _read(str(Path(data) / config / split), files)
    names = " or ".join(f"{config}/{split}.json" for config, split in places)
    raise ValueError(f"--data {data!r}: holds no {names} (nor .jsonl, .parquet, .csv)")


def has_table(data: str, places: Sequence[tuple[str, str]]) -> bool:
    """Return whether a local folder has one of some tables; of a data set on the hub, True."""
    return is_hub(data) or any(_files(Path(data), *place) for place in places)


def is_hub(data: str) -> bool:
    """Return whether a name is the id of a data set on the hub.

    Raises:
        ValueError: it is neither an id nor a folder that is here.
    """
    if Path(data).is_dir():
        return False
    if Path(data).exists() or not _ID.fullmatch(data) or Path(data).parent.is_dir():
        raise ValueError(f"--data {data!r}: no such folder, and no data set on the hub (org/name)")
    return True


def _files(folder: Path, config: str, split: str) -> list[str]:
    """Return the files of a table in a folder, several where it is in shards."""
    for path in (folder / config / split, folder / config):
        for ending in _ENDINGS:
            if (file := path.with_name(path.name + ending)).is_file():
                return [str(file)]
    shards = sorted((folder / config).glob(f"{split}-*-of-*.parquet"))
    if shards:
        _check_shards(shards)
        return [*map(str, shards)]
    saved = folder / config / split
    return [str(saved)] if (saved / "dataset_info.json").is_file() else []


def _check_shards(shards: Sequence[Path]) -> None:
    wanted = int(shards[0].stem.rsplit("-", 1)[1])
    if len(shards) != wanted:
        raise ValueError(f"{shards[0].parent}: has {len(shards)} of the {wanted} shards of a table")


def _read(name: str, files: Iterable[str]) -> Table:
    records = []
    for file in files:
        source, _ = open_source(file)
        records += map(source.read, range(source.count))
    if not records:
        raise ValueError(f"{name}: holds no records")
    return Table(name, records)

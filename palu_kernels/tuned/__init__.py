"""Launch settings that were measured on a card, by its architecture: `sm_90.json`, `gfx942.json`.

`benchmarks/gpu.sh` writes such a file on a card, and the launchers read the one of the card they
run on; where there is none, they keep their own settings. A file looks like this:

    {"card": "NVIDIA H100 80GB HBM3", "triton": "3.6.0", "torch": "2.11.0", "commit": "1cbdd0e",
     "settings": [{"reads": 2, "writes": 0, "bytes": 2, "columns": 128256, "rows": 256,
                   "block": 4096, "warps": 8, "programs": 4}, ...]}

`reads` and `writes` count the tensors of logits' shape that a kernel walks, `bytes` an entry of
theirs; `block`, `warps` and `programs` (that a multiprocessor is given) are what was fastest there.
A launch takes the settings of its walk whose columns, then rows, are nearest to its own.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

FOLDER = Path(__file__).parent
# What may stand in a file: a power of two, up to this number.
LARGEST = {"block": 16384, "warps": 32}
SMALLEST = {"block": 256}


class Walk(NamedTuple):
    """What a kernel does to memory, as far as its launch is concerned."""

    reads: int
    writes: int
    bytes: int
    columns: int
    rows: int


class Settings(NamedTuple):
    block: int
    warps: int
    programs: int  # a multiprocessor


_tried: list[tuple[Settings | None, list[Walk]]] = []


@contextlib.contextmanager
def trying(settings: Settings | None) -> Iterator[list[Walk]]:
    """Give every launch inside the block these settings (None: the launcher's own), as a sweep
    does. The list holds the walks that asked, in their order."""
    _tried.append((settings, []))
    try:
        yield _tried[-1][1]
    finally:
        _tried.pop()


def settings_of(device: torch.device, walk: Walk) -> Settings | None:
    """Return the settings that were measured for the nearest walk on such a card, or None.

    Raises:
        ValueError: the file of the card is not as above; with its name.
    """
    if _tried:
        settings, walks = _tried[-1]
        walks.append(walk)
        return settings
    arch = architecture(device)
    return None if arch is None else _nearest(FOLDER / f"{arch}.json", walk)


def architecture(device: torch.device) -> str | None:
    """Return `sm_90`, `gfx942`; None of what has no such name."""
    return _architecture(device.index) if device.type == "cuda" else None


@lru_cache
def _architecture(index: int | None) -> str:
    properties = torch.cuda.get_device_properties(index or 0)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@lru_cache(1024)
def _nearest(path: Path, walk: Walk) -> Settings | None:
    kind = (walk.reads, walk.writes, walk.bytes)
    same = [(w, s) for w, s in read(path) if (w.reads, w.writes, w.bytes) == kind]
    if not same:
        return None

    def distance(one: tuple[Walk, Settings]) -> tuple[float, float]:
        return _octaves(one[0].columns, walk.columns), _octaves(one[0].rows, walk.rows)

    return min(same, key=distance)[1]


def _octaves(a: int, b: int) -> float:
    return abs(math.log2(a / max(b, 1)))


@lru_cache
def read(path: Path) -> tuple[tuple[Walk, Settings], ...]:
    """Return what a file says; nothing where there is no file.

    Raises:
        ValueError: it is not as the head of this module says.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    try:
        entries = json.loads(text)["settings"]
        return tuple(_entry(f"settings[{n}]", entry) for n, entry in enumerate(entries))
    except KeyError as missing:
        raise ValueError(f"{path} has no {missing}; benchmarks/gpu.sh writes such files") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}; benchmarks/gpu.sh writes such files") from None


def _entry(name: str, entry: Any) -> tuple[Walk, Settings]:
    made = []
    for kind in (Walk, Settings):
        numbers = {}
        for field in kind._fields:
            value, where = entry[field], f"{name}.{field}"
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{where} is {value!r}; it must be a number of things")
            if field in LARGEST:
                low, high = SMALLEST.get(field, 1), LARGEST[field]
                if value & (value - 1) or not low <= value <= high:
                    raise ValueError(
                        f"{where} is {value}; it must be a power of two from {low} to {high}"
                    )
            elif value == 0 and field != "writes":
                raise ValueError(f"{where} is 0; it must be at least 1")
            numbers[field] = value
        made.append(kind(**numbers))
    return tuple(made)

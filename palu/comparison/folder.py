"""`comparison.yaml` in a comparison's folder: what all runs in it have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from palu.comparison.config import Comparison
from palu.comparison.run_file import read_run
from palu.storage.files import new_file
from palu.storage.json_files import NotJSON, parse_yaml, read_text

FILE, FORMAT = "comparison.yaml", "palu-comparison-config/1"
FIXED = ("common", "attacks", "evaluate")
FIXED_BY_SEARCH = ("seeds", "forgetting", "utility_metrics")
"""What decides which settings a search looks for."""
OF_METHODS = "retain file of a method: "
"""Begins the names of digests of files that come and go with methods."""


def open_folder(
    folder: Path, comparison: Comparison, digests: Mapping[str, str], *, threads: int
) -> int:
    """Write `comparison.yaml`; of a folder that has one, see that its runs and those of this
    comparison can stand in one table. Return how many threads a run has, which is as at the first
    start: numbers can depend on it.

    Args:
        digests: of the models and of the data, by name.

    Raises:
        ValueError: the folder holds something else, or what is compared is another model, other
            data, or measured in another way; names what differs.
    """
    path = folder / FILE
    threads = check_folder(folder, comparison, digests) or threads
    content = {
        "format": FORMAT,
        **as_config(comparison),
        "threads": threads,
        "digests": dict(digests),
    }
    if path.is_file():
        before = _read(path)
        content["methods"] |= _gone(folder, before["methods"], content["methods"])
        content["digests"] = before["digests"] | content["digests"]
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        yaml.safe_dump(content, file, sort_keys=False, allow_unicode=True, width=100)
    return threads


def check_folder(folder: Path, comparison: Comparison, digests: Mapping[str, str]) -> int | None:
    """Check a folder as `open_folder` does, and return the threads of its runs; None where there is
    none yet."""
    path = folder / FILE
    if not path.is_file() and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{str(folder)!r} holds something that palu compare did not write; "
            "name another --output"
        )
    if not path.is_file():
        return None
    known = _read(path)
    _check_same(path, known, comparison, digests)
    return known["threads"]


def _gone(folder: Path, before: Mapping[str, Any], methods: Mapping[str, Any]) -> dict[str, Any]:
    """Return the methods that the configuration has no longer and of which runs are there: who
    takes one of them up again may not give it other options."""
    gone = [name for name in before if name not in methods]
    runs = sorted(folder.glob("runs/*/run.json")) if gone else ()
    there = {read_run(path).method for path in runs}
    return {name: before[name] for name in gone if name in there}


def as_config(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as its configuration file would have it."""
    content = json.loads(json.dumps(asdict(comparison)))
    for method in content["methods"].values():
        if method["search"] is None:
            del method["search"]
    return {name: value for name, value in content.items() if value is not None and name != "jobs"}


def digest(value: Any) -> str:
    """Return a short name of a JSON value."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = parse_yaml(read_text(path))
    except NotJSON as error:
        raise ValueError(f"{path}: not readable: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: palu compare did not write it (its format is not {FORMAT!r})")
    return content


def _check_same(
    path: Path, known: Mapping[str, Any], comparison: Comparison, digests: Mapping[str, str]
) -> None:
    wanted = as_config(comparison)
    of_methods = {name: one for name, one in digests.items() if name.startswith(OF_METHODS)}
    before = of_methods | known["digests"]
    differs = [f"the {name}" for name in digests if before.get(name) != digests[name]]
    differs += [
        f"the {name}" for name in before if name not in digests and not name.startswith(OF_METHODS)
    ]
    differs += [name for name in FIXED if known.get(name) != wanted[name]]
    differs += [
        f"methods.{name}.options"
        for name, method in wanted["methods"].items()
        if name in known["methods"] and known["methods"][name]["options"] != method["options"]
    ]
    if any(method.search for method in comparison.methods.values()):
        differs += [name for name in FIXED_BY_SEARCH if known.get(name) != wanted[name]]
    asked = comparison.threads
    if asked is not None and asked != known["threads"]:
        differs.append("threads")
    if differs:
        raise ValueError(
            f"{str(path.parent)!r} is of another comparison: {differs[0]} differs from {path.name} "
            "there. Runs of both cannot stand in one table; name another --output"
        )

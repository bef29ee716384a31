"""Models on the hub: found by their id, as the snapshot of them in its cache.

All that reads or copies a model reads a folder; a snapshot is one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from palu.errors import one_line

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Nothing that is a program or a pickle, and no second copy of the weights.
_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
_UNWANTED = ["*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model", "consolidated*.safetensors"]


def located(model: str | Path) -> Path:
    """Return the folder of a model: the one that is named, or of an id on the hub (`org/name`)
    the snapshot in its cache, into which what is missing is downloaded. What is neither is returned
    as it is.

    Raises:
        FileNotFoundError: it looks like an id, and no such model can be had.
    """
    name = os.fspath(model)
    if not _is_id(name):
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except Exception as error:  # of many kinds: no such name, no right to it, no network
        raise FileNotFoundError(
            f"model {name!r} is no folder here, and it could not be loaded from the hub: "
            f"{one_line(error, 200)}"
        ) from error


def hub_name(folder: str | Path) -> str | None:
    """Return the id of the model whose snapshot a folder is; None where it is none."""
    parts = Path(os.path.abspath(folder)).parts
    if len(parts) < 3 or parts[-2] != "snapshots" or not parts[-3].startswith("models--"):
        return None
    return parts[-3].removeprefix("models--").replace("--", "/")


def shown_model(folder: str | Path) -> str:
    """Return what messages and records call a model: its id on the hub, or its path."""
    return hub_name(folder) or str(folder)


def place_beside(folder: Path, name: str, option: str) -> Path:
    """Return `folder / name`, where results about a model stand if nobody says where. Raises
    ValueError where the folder is a snapshot, which is the cache's."""
    if (known := hub_name(folder)) is not None:
        raise ValueError(f"{option} must be given: the model is {known} of the hub and no folder")
    return folder / name


def looks_like_id(name: str) -> bool:
    """Return whether a name has the form of an id, `org/name`, which a path may have too."""
    return _ID.fullmatch(name) is not None


def _is_id(name: str) -> bool:
    """Return whether a name is an id, and not that of a folder that is here or was mistyped."""
    return (
        looks_like_id(name)
        and not os.path.lexists(name)
        and not os.path.isdir(os.path.dirname(name))
    )

"""Reading files of JSON that users give, and saying what one is where it is no such file."""

from __future__ import annotations

import codecs
import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from palu.errors import one_line

# First bytes of other kinds of files that are given by mistake.
_KINDS = (
    (codecs.BOM_UTF32_LE, "UTF-32 text: save it as UTF-8"),
    (codecs.BOM_UTF32_BE, "UTF-32 text: save it as UTF-8"),
    (codecs.BOM_UTF16_LE, "UTF-16 text: save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16 text: save it as UTF-8"),
    (b"\x1f\x8b", "compressed by gzip: unpack it first"),
    (b"BZh", "compressed by bzip2: unpack it first"),
    (b"\xfd7zXZ\x00", "compressed by xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it first"),
    (b"PK\x03\x04", "a zip archive: unpack it first"),
    (b"PAR1", "a Parquet file: write it as JSON lines"),
    (b"ARROW1", "an Arrow file: name the folder that `save_to_disk` wrote"),
    (b"version https://git-lfs", "a Git LFS pointer and not the file itself: run git lfs pull"),
)
_SPECIAL = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class NotJSON(ValueError):
    """A text is not JSON that can be used.

    Attributes:
        line: where, from 1 on; None where that is not known.
    """

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def look(path: str | os.PathLike[str], *, folder: bool = False) -> None:
    """Raise ValueError where a path is not a regular file's (or, with `folder`, a folder's),
    without opening it: a pipe or a device may have no end."""
    shown = one_line(os.fspath(path) or repr(""), limit=200)
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{shown}: no such file{' or folder' * folder}") from None
    except OSError as error:
        raise ValueError(f"{shown}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a NUL in the name
        raise ValueError(f"{shown!r} is no name of a file: {error}") from None
    if stat.S_ISREG(mode) or (folder and stat.S_ISDIR(mode)):
        return
    kind = next((name for test, name in _SPECIAL if test(mode)), "something else")
    raise ValueError(f"{shown}: is {kind} and not a regular file")


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a regular file of UTF-8 text, without a byte order mark. Raises ValueError, which names
    the file and what it looks like."""
    return as_text(path, read_bytes(path))


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Read a regular file. Raises ValueError, which names it."""
    look(path)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{os.fspath(path)}: cannot be read: {error.strerror or error}") from None


def as_text(path: str | os.PathLike[str], raw: bytes) -> str:
    """Return what `read_text` returns of a file that was read (and perhaps unpacked)."""
    check_kind(path, raw)
    if b"\0" in raw:  # JSON would escape it
        kind = "a binary file"
        for codec in ("utf-16-le", "utf-16-be"):
            if "\0" not in raw[:1024].decode(codec, errors="ignore"):
                kind = "a binary file, or UTF-16 text: save it as UTF-8"
        line = raw.count(b"\n", 0, raw.index(b"\0")) + 1
        raise ValueError(f"{os.fspath(path)}:{line}: holds NUL bytes; it is {kind}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{os.fspath(path)}:{line}: not UTF-8 text: {error}") from None


def check_kind(path: str | os.PathLike[str], head: bytes) -> None:
    """Raise ValueError where a file begins as one of another kind does (compressed, a pointer)."""
    for start, kind in _KINDS:
        if head.startswith(start):
            raise ValueError(f"{os.fspath(path)}: is {kind}")


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file of a model or adapter. Raises ValueError, which names the
    file."""
    try:
        content = parse(read_text(path), unique_keys=False)
    except NotJSON as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def parse(text: str, *, unique_keys: bool = True) -> Any:
    """Return the value of a JSON text.

    Raises:
        NotJSON: it has none, nests too deeply, has an integer of thousands of digits, or (with
            `unique_keys`) an object that has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object if unique_keys else None)
    except NotJSON:
        raise
    except json.JSONDecodeError as error:
        raise NotJSON(f"{error.msg} at column {error.colno}", error.lineno) from None
    except RecursionError:
        raise NotJSON("nested too deeply") from None
    except ValueError:
        raise NotJSON("an integer has too many digits") from None


def parse_yaml(text: str) -> Any:
    """Return the value that a YAML text says.

    Raises:
        NotJSON: it says none, or has a key twice.
    """
    import yaml

    try:
        _no_key_twice(yaml.compose(text, yaml.SafeLoader))
        return yaml.safe_load(text)
    except (RecursionError, ValueError, yaml.YAMLError) as error:
        raise NotJSON(one_line(error)) from None


def _no_key_twice(node: Any) -> None:
    """Raise ValueError where a mapping of YAML nodes, or one in it, has a key twice."""
    if getattr(node, "id", "scalar") == "scalar":
        return
    if node.id == "sequence":
        for one in node.value:
            _no_key_twice(one)
        return
    keys = Counter(str(key.value) for key, _ in node.value)
    if twice := [key for key, count in keys.items() if count > 1]:
        raise ValueError(f"it has the key {twice[0]!r} twice")
    for _, value in node.value:
        _no_key_twice(value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise NotJSON(f"an object has the key {one_line(repr(twice), 100)} twice")
    return content

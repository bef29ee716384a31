"""Files of a reference cache: safetensors and sealed JSON, each written aside, flushed to the disk
and renamed; read back only when every byte is as it was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palu.storage.files import new_file
from palu.storage.fingerprint import byte_chunks, file_digest
from palu.storage.output import CACHE_FORMAT

VERSION = 1
MANIFEST = "manifest.json"

_REPAIR = "delete the cache's folder and build it anew"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
}


class CacheError(ValueError):
    """A reference cache cannot be made or used; the message says why and what to do."""


class CacheMismatch(CacheError):
    """The cache was built from something else than what it is to be used with."""


class CacheDamaged(CacheError):
    """A file of the cache is missing or not as it was written."""


class CacheWriteError(OSError):
    """A file of the cache could not be written: `errno`, `strerror` and `filename` say more."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Writes a safetensors file.

    It is written here and not by `safetensors`, so that a large tensor on an accelerator needs no
    second copy on the host, and a full disk is an `OSError`.

    Args:
        path: the file; what is there is replaced.
        tensors: by name; float64, float32, bfloat16, float16, int64 or int32.

    Returns:
        the file's record: `file`, `bytes`, `blake2b` (hex), for `check_file`.

    Raises:
        CacheWriteError: the file system refused.
    """
    # Wide elements first: then every tensor starts at a multiple of its element.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {}, 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        facts = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**facts, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def pieces() -> Iterable[bytes | memoryview]:
        yield len(text).to_bytes(8, "little")
        yield text
        for name in names:
            yield from byte_chunks(tensors[name])

    return _write(path, pieces())


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON with a checksum over itself.

    Raises:
        CacheWriteError: the file system refused.
    """
    _write(path, [_sealed(content)])


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote, without the seal.

    Raises:
        CacheDamaged: there is no such file, or a byte of it was changed.
        CacheMismatch: it is of a newer version, or of another kind.
    """
    try:
        raw = path.read_bytes()
        content = json.loads(raw)
    except FileNotFoundError:
        raise CacheDamaged(
            f"{str(path.parent)!r} is no reference cache: {str(path)!r} does not exist"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CacheDamaged(
            f"{str(path)!r} is damaged, not JSON any more ({error}); {_REPAIR}"
        ) from None
    if not isinstance(content, dict) or content.get("format") != CACHE_FORMAT:
        raise CacheMismatch(f"{str(path)!r} is not the manifest of a reference cache, or damaged")
    version = content.get("version")
    if version != VERSION:
        raise CacheMismatch(
            f"{str(path)!r}: the format version is {version!r}, this palu reads {VERSION}; "
            "use the palu that wrote it, or delete the cache's folder and build it anew"
        )
    content = {k: v for k, v in content.items() if k not in ("format", "version", "checksum")}
    if _sealed(content) != raw:
        raise CacheDamaged(
            f"{str(path)!r} is damaged: its content does not fit its checksum; {_REPAIR}"
        )
    return content


def check_file(folder: Path, record: Mapping[str, Any]) -> Path:
    """The path of a file that `write_tensors` wrote, whole and unchanged.

    Raises:
        CacheDamaged: it is missing, truncated, or a byte of it was changed.
    """
    path = folder / record["file"]
    if not path.is_file():
        raise CacheDamaged(f"{str(path)!r} is missing; {_REPAIR}")
    size = path.stat().st_size
    if size != record["bytes"]:
        raise CacheDamaged(
            f"{str(path)!r} is damaged: it has {size} bytes and must have {record['bytes']}; "
            f"{_REPAIR}"
        )
    if file_digest(path) != record["blake2b"]:
        raise CacheDamaged(
            f"{str(path)!r} is damaged: its bytes do not fit the checksum {record['blake2b'][:12]} "
            f"in the manifest; {_REPAIR}"
        )
    return path


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    digest, size = hashlib.blake2b(digest_size=32), 0
    try:
        with new_file(path, "wb") as stream:
            for piece in pieces:
                stream.write(piece)
                digest.update(piece)
                size += len(piece)
    except OSError as error:
        raise write_error(error, path) from error
    return {"file": path.name, "bytes": size, "blake2b": digest.hexdigest()}


def write_error(error: OSError, path: Path) -> CacheWriteError:
    """The error to raise for one that the file system gave."""
    why = f"{error.strerror or error}; what is finished is kept, and building again goes on from it"
    return CacheWriteError(error.errno, why, str(path))


def _sealed(content: Mapping[str, Any]) -> bytes:
    content = {"format": CACHE_FORMAT, "version": VERSION, **content}
    bare = json.dumps(content, sort_keys=True, allow_nan=False).encode()
    content["checksum"] = hashlib.blake2b(bare, digest_size=32).hexdigest()
    return (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()

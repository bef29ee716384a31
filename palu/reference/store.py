"""Files of a reference cache: safetensors and sealed JSON, written aside, flushed and renamed.

A build goes on in a folder beside the cache's place, which a later build continues.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

import palu_kernels
from palu.storage.files import (
    InUse,
    aside_of,
    beside,
    locked,
    new_file,
    put,
    settle,
)
from palu.storage.fingerprint import file_digest
from palu.storage.output import CACHE_FORMAT, Claim, is_cache_file

VERSION = 1
MANIFEST = "manifest.json"

_REPAIR = "delete the cache's folder and build it anew"
# The manifest under another name for as long as shards are missing.
PROGRESS = "progress.json"
HEAD = "head.safetensors"


class CacheError(ValueError):
    """A reference cache cannot be made or used; the message says why and what to do."""


class CacheMismatch(CacheError):
    """The cache was built from something else than what it is to be used with."""


class CacheDamaged(CacheError):
    """A file of the cache is missing or not as it was written."""


class CacheWriteError(OSError):
    """A file of the cache could not be written: `errno`, `strerror` and `filename` say more."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file and return its record for `check_file`. Raises CacheWriteError."""
    return _write(path, save({name: x.detach().cpu().contiguous() for name, x in tensors.items()}))


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with a checksum over itself. Raises CacheWriteError."""
    _write(path, _sealed(content))


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what `write_sealed` wrote, without the seal.

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
    """Read a file that `write_tensors` wrote and return its path. Raises CacheDamaged where it is
    missing, truncated, or a byte of it was changed."""
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


def _write(path: Path, data: bytes) -> dict[str, Any]:
    try:
        with new_file(path, "wb") as stream:
            stream.write(data)
    except OSError as error:
        raise write_error(error, path) from error
    digest = hashlib.blake2b(data, digest_size=32).hexdigest()
    return {"file": path.name, "bytes": len(data), "blake2b": digest}


def write_error(error: OSError, path: Path) -> CacheWriteError:
    """Turn an error of the file system into a CacheWriteError."""
    why = f"{error.strerror or error}; what is finished is kept, and building again goes on from it"
    return CacheWriteError(error.errno, why, str(path))


def _sealed(content: Mapping[str, Any]) -> bytes:
    content = {"format": CACHE_FORMAT, "version": VERSION, **content}
    bare = json.dumps(content, sort_keys=True, allow_nan=False).encode()
    content["checksum"] = hashlib.blake2b(bare, digest_size=32).hexdigest()
    return (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


# ---- a build in progress -----------------------------------------------------------------------


class PartialCache:
    """The files of a build so far; no other process can make any at the same time.

    Every file is whole on the disk before `progress.json` names it, so a process may be killed at
    any moment: what is named can be built upon, what is not is removed.

    Attributes:
        folder: where they are.
        content: the manifest without the files; files of another one are removed.
        claim: the place of the cache, and what was there when the build began.
    """

    def __init__(self, folder: Path, content: Mapping[str, Any], claim: Claim) -> None:
        self.folder, self.content, self.claim = folder, dict(content), claim
        self._head: dict[str, Any] | None = None
        self._shards: list[dict[str, Any]] = []
        for path in folder.iterdir():
            if not is_cache_file(path.name) or (path.is_dir() and not path.is_symlink()):
                raise CacheError(
                    f"{str(path)!r} is in the way of the cache that is built in {str(folder)!r}, "
                    "and palu did not write it; move it away"
                )
        self._take_over()
        known = {PROGRESS, *(record["file"] for record in self._shards)}
        known |= {HEAD} if self._head else set()
        for path in folder.iterdir():
            if path.name not in known:
                path.unlink()

    @property
    def batches_done(self) -> int:
        return sum(record["batches"] for record in self._shards)

    def store_head(self, head: palu_kernels.LMHead) -> None:
        """Write the weight and the bias of the frozen head, unless they are there."""
        if self._head is None:
            tensors = {"weight": head.weight, "bias": head.bias}
            tensors = {name: x for name, x in tensors.items() if x is not None}
            self._head = write_tensors(self.folder / HEAD, tensors)
            self._record()

    def store_shard(self, source: str, tensors: Mapping[str, Tensor], *, batches: int) -> None:
        """Write the next shard, made of so many batches."""
        path = self.folder / f"shard-{len(self._shards):05d}.safetensors"
        record = {"source": source, "batches": batches, "examples": len(tensors["example_ids"])}
        for name in ("index_rows", "hidden_rows"):
            record[name] = int(tensors[name].sum())
        self._shards.append({**record, **write_tensors(path, tensors)})
        self._record()

    def finish(self) -> None:
        """Move the folder to its place; what was there is removed after that."""
        path = self.claim.path
        try:
            self.claim.check()
            os.replace(self.folder / PROGRESS, self.folder / MANIFEST)
            settle(self.folder)
            with aside_of(path) as aside:
                put(self.folder, path, aside)
        except OSError as error:
            raise write_error(error, path) from error

    def _record(self) -> None:
        content = {**self.content, "head_file": self._head, "shards": self._shards}
        write_sealed(self.folder / PROGRESS, content)

    def _take_over(self) -> None:
        """Take up what an interrupted build of the same cache left: the first whole shards, and the
        head."""
        # A build killed between the last two renames left the whole manifest by its final name.
        with suppress(OSError):
            os.replace(self.folder / MANIFEST, self.folder / PROGRESS)
        try:
            content = read_sealed(self.folder / PROGRESS)
        except CacheError:
            return
        head, shards = content.pop("head_file"), content.pop("shards")
        if {**content, "notes": None} != {**self.content, "notes": None}:
            return
        with suppress(CacheError):
            if head is not None:
                check_file(self.folder, head)
                self._head = head
        with suppress(CacheError):
            for record in shards:
                check_file(self.folder, record)
                self._shards.append(record)


@contextmanager
def partial_cache(path: Path, content: Mapping[str, Any]) -> Iterator[PartialCache]:
    """Hold the folder beside `path` that a cache is built in. It stays there when the build fails.

    Raises:
        CacheError: another process is building the same cache.
        CacheWriteError: the folder cannot be made.
    """
    path = path.resolve()
    folder = beside(path, "partial")
    if folder.is_symlink():
        raise CacheError(f"{str(folder)!r}, where the cache is to be built, is a link; remove it")
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder))
            folder.mkdir(exist_ok=True)
            partial = PartialCache(folder, content, Claim(path))
        except InUse:
            raise CacheError(
                f"another process is building a cache in {str(folder)!r}: wait for it"
            ) from None
        except OSError as error:
            raise write_error(error, folder) from error
        yield partial

"""A cache while it is being built: a folder beside its place that a later build goes on from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

import palu_kernels
from palu.reference.store import (
    MANIFEST,
    CacheError,
    check_file,
    read_sealed,
    write_error,
    write_sealed,
    write_tensors,
)
from palu.storage.files import beside, new_aside, put, remove_abandoned, remove_aside, settle
from palu.storage.output import Claim, is_cache_file

try:
    import fcntl
except ImportError:  # Windows: two builds of one cache at a time are not told apart there
    fcntl = None

# The manifest under another name for as long as shards are missing.
PROGRESS = "progress.json"
HEAD = "head.safetensors"


class PartialCache:
    """The files made so far; another process cannot make any at the same time.

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
        """Writes the weight and the bias of the frozen head, unless they are there."""
        if self._head is None:
            tensors = {"weight": head.weight, "bias": head.bias}
            tensors = {name: x for name, x in tensors.items() if x is not None}
            self._head = write_tensors(self.folder / HEAD, tensors)
            self._record()

    def store_shard(self, source: str, tensors: Mapping[str, Tensor], *, batches: int) -> None:
        """Writes the next shard, made of so many batches."""
        path = self.folder / f"shard-{len(self._shards):05d}.safetensors"
        record = {"source": source, "batches": batches, "examples": len(tensors["example_ids"])}
        for name in ("index_rows", "hidden_rows"):
            record[name] = int(tensors[name].sum())
        self._shards.append({**record, **write_tensors(path, tensors)})
        self._record()

    def finish(self) -> None:
        """Puts the folder in its place; what was there goes away when it is."""
        path = self.claim.path
        try:
            self.claim.check()
            os.replace(self.folder / PROGRESS, self.folder / MANIFEST)
            settle(self.folder)
            remove_abandoned(path)
            aside = new_aside(path)
            try:
                put(self.folder, path, aside)
            finally:
                remove_aside(aside)
        except OSError as error:
            raise write_error(error, path) from error

    def _record(self) -> None:
        content = {**self.content, "head_file": self._head, "shards": self._shards}
        write_sealed(self.folder / PROGRESS, content)

    def _take_over(self) -> None:
        """Finds what an interrupted build of the same cache left: the first shards that are whole,
        and the head."""
        # A build that ended between the last two renames left everything, under its final name.
        with suppress(OSError):
            os.replace(self.folder / MANIFEST, self.folder / PROGRESS)
        try:
            found = read_sealed(self.folder / PROGRESS)
        except CacheError:
            return
        head, shards = found.pop("head_file"), found.pop("shards")
        if {**found, "notes": None} != {**self.content, "notes": None}:
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
    """The folder beside `path` that a cache is built in, for this process alone. It stays there
    when the build fails.

    Raises:
        CacheError: another process is building the same cache.
        CacheWriteError: the folder cannot be made.
    """
    path = path.resolve()
    folder = beside(path, "partial")
    if folder.is_symlink():
        raise CacheError(f"{str(folder)!r}, where the cache is to be built, is a link; remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY) if fcntl is not None else None
    except OSError as error:
        raise write_error(error, folder) from error
    try:
        if lock is not None:
            _lock(lock, folder)
        try:
            partial = PartialCache(folder, content, Claim(path))
        except OSError as error:
            raise write_error(error, folder) from error
        yield partial
    finally:
        if lock is not None:
            os.close(lock)


def _lock(number: int, folder: Path) -> None:
    """Holds the folder until its number is closed, be it by a kill."""
    taken = False
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another process may have finished, and moved the folder away, since it was opened.
        taken = not folder.exists() or not os.path.samestat(os.fstat(number), folder.stat())
    except BlockingIOError:
        taken = True
    except OSError:
        pass  # a file system without locks
    if taken:
        raise CacheError(f"another process is building a cache in {str(folder)!r}: wait for it")

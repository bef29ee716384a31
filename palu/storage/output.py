"""Output folders: whole or absent, held by one run, and replaced only where palu wrote them."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from palu import __version__
from palu.storage import files
from palu.storage.files import (
    Changed,
    aside_of,
    beside,
    locked,
    put,
    remove_abandoned,
    replace_folder,
    settle,
    write_json,
)
from palu.storage.json_files import read_object

RECORD = "palu.json"
EVALUATION_FILES = ("TOFU_EVAL.json", "TOFU_SUMMARY.json", "palu_evaluate.json")
# Of the other benchmarks: {name}_EVAL.json, {name}_SUMMARY.json, palu_evaluate_{name}.json.
BENCHMARKS = ("MUSE", "WMDP", "RWKU", "LMEval")
# What the stages after `palu unlearn` leave in a model's folder.
REPORT_FILES = ("annotation.json", "evaluation.json", "attack.json", "report.html", "report.json")
REPORT_FILES += ("README.md",)
CACHE_FORMAT = "palu reference cache"
# The last two are files that were being written when the build was killed.
_CACHE_FILES = (
    r"(manifest|progress)\.json|(head|shard-\d{5,})\.safetensors|"
    r"[^.].*\.(json|safetensors)\.partial|\..*\.(json|safetensors)\.[0-9a-f]{16}\.partial"
)
_PACKAGES = ("torch", "transformers", "tokenizers", "triton", "numpy", "accelerate", "peft")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide what a run computes."""
    result = {"python": platform.python_version(), "palu": __version__}
    for name in _PACKAGES:
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return result


def evaluation_files(name: str) -> tuple[str, str, str]:
    """Return the names of the log, the summary and the record of an evaluation on a benchmark."""
    if name == "TOFU":
        return EVALUATION_FILES
    return f"{name}_EVAL.json", f"{name}_SUMMARY.json", f"palu_evaluate_{name}.json"


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """Read the `palu.json` of a model folder; None where there is none. Raises ValueError for no
    object."""
    path = Path(folder) / RECORD
    if not path.is_file():
        return None
    return read_object(path)


def check_output(path: str | Path, *, overwrite: bool, inputs: tuple[str | Path, ...] = ()) -> Path:
    """Check that a folder may be written (or replaced), before any work is done.

    Args:
        path: the output folder.
        overwrite: whether what is there may be replaced.
        inputs: files and folders of this run, which must not lie in what is replaced.

    Raises:
        FileExistsError: it is a file, or holds something and `overwrite` is false, or something
            that palu did not write.
        ValueError: replacing it would take an input, the working directory or the home directory
            away, or it cannot be replaced.
    """
    folder = Path(path)
    try:
        real = folder.resolve()
        there = real.exists()
    except (OSError, RuntimeError) as error:  # a name too long, links in a circle
        raise ValueError(f"output {str(folder)!r} cannot be used: {error}") from None
    if there and not real.is_dir():
        raise FileExistsError(f"output {str(folder)!r} is a file; name a folder")
    for kept in (Path.cwd(), Path(os.path.expanduser("~")), Path("/")):
        if _lies_in(kept, real):
            raise ValueError(
                f"output {str(folder)!r}: replacing it would delete {str(kept)!r}; name another "
                "folder (--overwrite would delete what lies in it)"
            )
    if os.path.ismount(real):
        raise ValueError(
            f"output {str(folder)!r} is where a file system is mounted and cannot be replaced; "
            "name a folder in it"
        )
    if not there or not any(real.iterdir()):
        return folder
    if not overwrite:
        raise FileExistsError(
            f"output folder {str(folder)!r} is not empty; name another one or add --overwrite"
        )
    for kept in inputs:
        if _lies_in(Path(kept), real):
            raise ValueError(
                f"--overwrite would delete {str(kept)!r}, which lies in {str(folder)!r}; "
                "name another output folder"
            )
    if foreign := _foreign(real):
        raise FileExistsError(
            f"--overwrite: output folder {str(folder)!r} holds {foreign!r}, which palu did not "
            "write; move it away, or name another output folder"
        )
    return folder


def check_json(path: Path, *, inputs: tuple[str | Path | None, ...] = ()) -> None:
    """Check that `palu evaluate --json` may write a file, before any work is done.

    Raises:
        FileExistsError: it is an input, no regular file, or one that palu evaluate did not write.
    """
    for kept in inputs:
        there = kept is not None and os.path.exists(kept) and os.path.exists(path)
        if there and os.path.samefile(kept, path):
            raise FileExistsError(f"--json {str(path)!r} is an input of this run; name another")
    files.check_json(path, {"model", "template", "versions", "summary"}, "palu evaluate --json")


def _lies_in(path: Path, folder: Path) -> bool:
    """Return whether a path is the folder or in it, by what the file system says, which may not
    tell cases apart."""
    places = {
        p for one in (Path(os.path.abspath(path)), path.resolve()) for p in (one, *one.parents)
    }
    return folder in places or any(
        folder.exists() and p.exists() and os.path.samefile(p, folder) for p in places
    )


def is_cache_file(name: str) -> bool:
    """Return whether a cache, or one that is being built, has a file of this name."""
    return re.fullmatch(_CACHE_FILES, name) is not None


def remove_cache(folder: Path) -> None:
    """Remove the files of a reference cache, if there is one, and of one that is not whole yet; and
    their folders where nothing else lies in them.

    Raises:
        InUse: another process builds a cache there.
    """
    folder = folder.resolve()
    for place in (folder, beside(folder, "partial")):
        if not place.is_dir():
            continue
        with locked(place):
            for path in place.iterdir():
                if is_cache_file(path.name) and not path.is_dir():
                    path.unlink()
            if not any(place.iterdir()):
                place.rmdir()


def _foreign(folder: Path) -> str | None:
    """Return the name of something in an output folder that palu did not write, else None."""
    names = sorted(path.name for path in folder.iterdir())
    if all(map(is_cache_file, names)) and (
        "head.safetensors" in names
        or any(name.startswith("shard-") for name in names)
        or any(CACHE_FORMAT.encode() in (folder / name).read_bytes() for name in names)
    ):
        return None
    try:
        record = read_record(folder) or json.loads((folder / "metrics.json").read_text("utf-8"))
        keys = {*record}  # "checks" is of a demo's metrics.json
        ours = "made_by" in keys or ("versions" in keys and keys & {"template", "checks", "files"})
    except (OSError, ValueError, TypeError, RecursionError):
        ours = False
    if not ours:
        return names[0]
    if (known := record.get("files")) is None:  # written before palu kept a list of files
        return None
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        ours = {file for one in ("TOFU", *BENCHMARKS) for file in evaluation_files(one)}
        if name not in known and path.name not in {*ours, *REPORT_FILES}:
            return name
    return None


def _state(path: Path) -> tuple | None:
    """Return what tells whether a folder was changed or replaced since; None where it is absent or
    empty."""
    if not path.exists():
        return None
    names = sorted(entry.name for entry in path.iterdir())
    status = path.stat()
    return (status.st_dev, status.st_ino, *names) if names else None


class Claim:
    """An output that no other process writes: its path, and what was there."""

    def __init__(self, path: Path) -> None:
        self.path, self.before = path, _state(path)

    def check(self) -> None:
        """Raise Changed where something else is there by now."""
        if _state(self.path) != self.before:
            why = "was changed or made while this run was going on, and is left as it is"
            raise Changed(errno.EEXIST, why, str(self.path))


@contextmanager
def claim_output(
    path: str | Path, *, overwrite: bool, inputs: tuple[str | Path, ...] = ()
) -> Iterator[Claim]:
    """Check an output folder as `check_output` does and lock it until the block ends;
    `output_folder` takes what this gives.

    Raises:
        FileExistsError, ValueError: as `check_output`; another process writes it.
        OSError: nothing can be written beside it.
    """
    check_output(path, overwrite=overwrite, inputs=inputs)
    real = Path(path).resolve()
    with locked(real):
        remove_abandoned(real)
        # Once more: it may have appeared before the lock was held.
        check_output(path, overwrite=overwrite, inputs=inputs)
        yield Claim(real)


def cache_place(reference: str, folder: Path | None, output: Path) -> Path | None:
    """Return where `palu unlearn` keeps its reference cache: beside the output, which is replaced
    as a whole.

    Args:
        reference: live, adapter_off or cached.
        folder: what the user asked for, None where nothing was said.
        output: the output folder.

    Returns:
        the folder; None where the run has no cache.

    Raises:
        ValueError: it is a file, lies in the output or the output in it, or no cache is asked for.
    """
    if reference != "cached":
        if folder is not None:
            raise ValueError(
                f"--reference-cache {str(folder)!r} needs --reference cached, not {reference!r}"
            )
        return None
    cache = Path(f"{output}-reference-cache") if folder is None else folder
    if cache.exists() and not cache.is_dir():
        raise ValueError(f"the reference cache {str(cache)!r} is a file; name a folder")
    one, other = cache.resolve(), output.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise ValueError(
            f"the reference cache {str(cache)!r} and the output {str(output)!r} lie in one "
            "another; name another --reference-cache, since the output is replaced as a whole"
        )
    return cache


@contextmanager
def output_folder(output: Path | Claim) -> Iterator[Path]:
    """Make a folder beside `output` to write into, put in its place when the block ends without an
    error.

    What was there stays untouched until then; after an error the new folder is removed, and what a
    killed run left behind is removed by the next one. The names of its files are added to its
    `palu.json`, so that `check_output` knows what is palu's.

    Args:
        output: what `claim_output` gave; a path is claimed here, whatever it holds.
    """
    if not isinstance(output, Claim):
        real = Path(output).resolve()
        with locked(real), output_folder(Claim(real)) as folder:
            yield folder
        return
    with replace_folder(output.path, output.check) as folder:
        yield folder
        list_files(folder)


def put_in_place(folder: Path, claim: Claim) -> None:
    """Put a folder that is whole, and whose files are listed, in the place of an output, as
    `output_folder` does; both are in one folder."""
    with aside_of(claim.path) as aside:
        settle(folder)
        claim.check()
        put(folder, claim.path, aside)


def list_files(folder: Path, more: Iterable[str] = ()) -> None:
    """Add the names of a folder's files, and of `more` that are written later, to its
    `palu.json`."""
    record = read_record(folder) or {}
    files = (path for path in folder.rglob("*") if not path.is_dir())
    names = {path.relative_to(folder).as_posix() for path in files} | {RECORD, *more}
    write_json(folder / RECORD, {"versions": versions(), **record, "files": sorted(names)})

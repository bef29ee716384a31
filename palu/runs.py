"""What a run leaves behind: an output folder that is whole or absent, and `palu.json` that tells
how it was made."""

from __future__ import annotations

import glob
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from palu.folders import read_object
from palu.labels import Template

RECORD = "palu.json"
_PACKAGES = ("palu", "torch", "transformers", "tokenizers", "triton", "numpy", "accelerate")


def write_json(path: Path, content: Any) -> None:
    """Writes JSON beside the place and renames it there, so that no reader sees half a file."""
    beside = path.with_name(path.name + ".partial")
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    beside.write_text(text + "\n", encoding="utf-8")
    os.replace(beside, path)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_record(folder: Path, *, template: Template, **content: Any) -> None:
    """Writes `palu.json`: the template, the versions and the time, and whatever else is given.

    Args:
        folder: the model folder.
        template: what the model was trained with; `palu evaluate` insists on it.
        **content: settings, seed, loss curve and so on, as JSON values.
    """
    record = {"template": template.to_dict(), **content, "versions": versions()}
    record["written"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    write_json(folder / RECORD, record)


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """The `palu.json` of a model folder, None where there is none.

    Raises:
        ValueError: the file is no JSON object.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        return None
    return read_object(path)


def choose_template(
    folder: str | Path,
    *,
    system_prompt: str | None = None,
    date_string: str | None = None,
    chat_template_kwargs: str | None = None,
    force: bool = False,
) -> Template:
    """The template to use with a model: the one in its `palu.json`, or one made from what the user
    asked for.

    Args:
        folder: the model folder.
        system_prompt, date_string, chat_template_kwargs: what the user asked for (the last a JSON
            object, as text); None where nothing was said.
        force: take what was asked for even where it differs from `palu.json`.

    Raises:
        ValueError: what was asked for differs from `palu.json` and `force` is false.
        TypeError, ValueError: `chat_template_kwargs` is no JSON object.
    """
    asked: dict[str, Any] = {"system_prompt": system_prompt, "date_string": date_string}
    if chat_template_kwargs is not None:
        try:
            asked["chat_template_kwargs"] = json.loads(chat_template_kwargs)
        except (ValueError, RecursionError):
            asked["chat_template_kwargs"] = chat_template_kwargs  # the template says what is wrong
        if asked["chat_template_kwargs"] is None:
            asked["chat_template_kwargs"] = "null"
    asked = {name: value for name, value in asked.items() if value is not None}
    record = read_record(folder)
    if record is None or "template" not in record:
        return Template(**asked)
    try:
        known = Template.from_dict(record["template"])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{Path(folder) / RECORD} has a template that cannot be used: {error}"
        ) from error
    wanted = Template.from_dict({**known.to_dict(), **asked})
    for name in asked:
        was, now = getattr(known, name), getattr(wanted, name)
        if was != now and not force:
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"{option} {now!r} differs from {was!r}, which {Path(folder) / RECORD} says this "
                f"model was trained with. "
                f"Leave {option} out, or add --force-template to use yours."
            )
    return wanted


def check_output(path: str | Path, *, overwrite: bool, inputs: tuple[str | Path, ...] = ()) -> Path:
    """Decides whether a folder may be written (or replaced) before any work is done.

    Args:
        path: the output folder.
        overwrite: whether what is there may be replaced.
        inputs: files and folders of this run, which must not lie in what is replaced.

    Raises:
        FileExistsError: it is a file, or holds something and `overwrite` is false.
        ValueError: replacing it would take an input, the working directory or the home directory
            away.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output {str(folder)!r} is a file; name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return folder
    if not overwrite:
        raise FileExistsError(
            f"output folder {str(folder)!r} is not empty; name another one or add --overwrite"
        )
    real = folder.resolve()
    for kept in (*inputs, Path.cwd(), Path.home()):
        if Path(kept).resolve().is_relative_to(real):
            raise ValueError(
                f"--overwrite would delete {str(kept)!r}, which lies in {str(folder)!r}; "
                "name another output folder"
            )
    return folder


def cache_place(reference: str, folder: Path | None, output: Path) -> Path | None:
    """Where `palu unlearn` keeps its reference cache: beside the output, which is replaced as a
    whole.

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
    place = Path(f"{output}-reference-cache") if folder is None else folder
    if place.exists() and not place.is_dir():
        raise ValueError(f"the reference cache {str(place)!r} is a file; name a folder")
    one, other = place.resolve(), output.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise ValueError(
            f"the reference cache {str(place)!r} and the output {str(output)!r} lie in one "
            "another; name another --reference-cache, since the output is replaced as a whole"
        )
    return place


def _remove_abandoned(path: Path) -> None:
    """Folders that `output_folder` began for `path` in processes that are no more."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        number = left.name.rpartition("-")[2]
        if number.isdigit() and left.is_dir() and not Path("/proc", number).exists():
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path` to write into, put in its place when the block ends without an
    error.

    What was at `path` stays untouched until then; after an error the new folder is removed, and
    what a killed run left behind is removed by the next one. Call `check_output` first.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    beside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(beside, path)
    except OSError:
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)

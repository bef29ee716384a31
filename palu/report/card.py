"""The card of an unlearned model: its README.md, without the secrets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from palu.report.content import content_of
from palu.report.examples import find_secrets
from palu.report.inputs import read_inputs
from palu.report.page import NAMES, SETS, environment, number
from palu.storage.files import new_file
from palu.storage.json_files import read_text
from palu.storage.output import RECORD, read_record
from palu.terminal import visible

CARD = "README.md"
MARK = "<!-- written by palu -->"
_OF_PEFT = "[More Information Needed]"  # of the template that PEFT saves beside an adapter


def write_card(
    folder: str | Path,
    *,
    forget: str | Path | None = None,
    name: str | None = None,
    content: Mapping[str, Any] | None = None,
) -> Path:
    """Write the model card, `README.md`, of an unlearned model or adapter, and return its path.

    It says what was done in numbers, how to load the model and what its limits are. It names no
    file of the data and no secret.

    Args:
        folder: the folder that `palu unlearn` or `palu erase` wrote; `attack.json` and
            `evaluation.json` there are read too.
        forget: the file that was forgotten, for masking; see `build_report`.
        name: what the card calls it, where it will be moved; its own name when None.
        content: what `build_report` returned, to say the same; made anew when None.

    Raises:
        ValueError: there is no `palu.json`, or a file is damaged; names it.
        FileExistsError: a README.md that neither palu nor PEFT wrote is there.
    """
    from palu.models.lora import is_adapter

    folder = Path(folder)
    if read_record(folder) is None:
        raise ValueError(f"{folder}: has no {RECORD}; name a folder that palu unlearn wrote")
    path = folder / CARD
    if path.exists() and not any(mark in read_text(path) for mark in (MARK, _OF_PEFT)):
        raise FileExistsError(f"{path} was not written by palu; move it away")
    if content is None:
        inputs = read_inputs(folder, name)
        content = content_of(inputs, find_secrets(inputs, forget)[0])
    base = content["models"]["original"]
    jinja = environment(plain)
    jinja.filters |= {"number": number, "yaml": _Ready.json, "sentence": _Ready.sentence}
    text = jinja.get_template("card.md.j2").render(
        mark=_Ready(MARK),
        adapter=is_adapter(folder),
        base=base_name(base["path"]),
        names=NAMES,
        sets=SETS,
        **content,
    )
    with new_file(path) as file:
        file.write(text)
    return path


class _Ready(str):
    """A text that is Markdown or YAML already."""

    @classmethod
    def json(cls, value: Any) -> _Ready:
        """Return a value as JSON, which YAML reads."""
        return cls(json.dumps(value))

    @classmethod
    def sentence(cls, text: str) -> _Ready:
        """Return a sentence of ours, whose code stands in backticks."""
        return cls(visible(text).replace("<", "&lt;"))


def base_name(path: str | None) -> str | None:
    """Return a hub id as it is, and of a folder its name alone: where it lies is nobody's
    business."""
    if path is None:
        return None
    parts = path.replace("\\", "/").rstrip("/").split("/")
    local = len(parts) != 2 or parts[0] in ("", ".", "..", "~")
    return parts[-1] if local else path


def plain(text: str) -> str:
    """Return a text as one line of Markdown that has no markup of its own."""
    text = " ".join(visible(text).split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|~$&" else c for c in text)

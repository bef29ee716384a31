"""What the stages of an erasure left in a folder, read and checked: nothing is computed here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from palu.storage.json_files import look, read_object
from palu.storage.output import RECORD

ANNOTATION, EVALUATION, ATTACK = "annotation.json", "evaluation.json", "attack.json"
ANNOTATION_FORMAT, ATTACK_FORMAT = "palu-annotation/1", "palu-attack/1"
EVALUATION_FORMAT = "palu-evaluation/1"
"""`{"format", "models": {name: {"path", "digest", set: what `evaluate_examples` returns}}}`; names
are `original`, `unlearned` and `retrained`, sets `forget` and `retain`."""
REPORT_FORMAT = "palu-report/1"
FILES = (RECORD, ANNOTATION, EVALUATION, ATTACK)

MODELS = ("original", "unlearned", "retrained")
"""The models of a report, in the order of its columns; others come after them."""

_KINDS = {dict: "an object", list: "a list", str: "a text", type(None): "missing"}


class Node:
    """A value of a JSON file, and where it stands there: reading it as what it is not is an error
    that names file and field, and no text of the file, which may be a secret."""

    def __init__(self, value: Any, file: Path, path: str = "") -> None:
        self.value, self.file, self.path = value, file, path

    def __getitem__(self, name: str) -> Node:
        path = f"{self.path}.{name}" if self.path else name
        return Node(self.object().get(name) if self else None, self.file, path)

    def __bool__(self) -> bool:
        return self.value is not None

    def fail(self, must: str) -> ValueError:
        """Return the error that this value is not what it must be."""
        shown = _KINDS.get(type(self.value)) or repr(self.value)
        return ValueError(
            f"{self.file}: {self.path or 'its content'} is {shown}; it must be {must}"
        )

    def object(self) -> Mapping[str, Any]:
        """Return the value as an object."""
        if not isinstance(self.value, Mapping):
            raise self.fail("an object")
        return self.value

    def named(self) -> Iterator[tuple[str, Node]]:
        """Yield the fields of an object that are there."""
        for name in self.object() if self else ():
            if self[name]:
                yield name, self[name]

    def each(self) -> Iterator[Node]:
        """Yield the values of a list; none where it is missing."""
        if self and not isinstance(self.value, list):
            raise self.fail("a list")
        for number, value in enumerate(self.value or ()):
            yield Node(value, self.file, f"{self.path}[{number}]")

    def text(self, default: str | None = None) -> str:
        """Return the value as a text."""
        value = default if self.value is None else self.value
        if not isinstance(value, str):
            raise self.fail("a text")
        return value

    def texts(self) -> list[str]:
        """Return a list of texts; an empty one where it is missing."""
        return [one.text() for one in self.each()]

    def count(self) -> int:
        """Return the value as a whole number, 0 or more."""
        if isinstance(self.value, bool) or not isinstance(self.value, int) or self.value < 0:
            raise self.fail("a whole number, 0 or more")
        return self.value

    def share(self) -> float:
        """Return the value as a number between 0 and 1."""
        value = self.value
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and 0 <= value <= 1 + 1e-6):
            raise self.fail("a number between 0 and 1")
        return min(float(value), 1.0)

    def format(self, wanted: str) -> None:
        """Raise ValueError where the field `format` of an object names another format."""
        if (kind := self["format"]).value != wanted:
            raise kind.fail(f"{wanted!r}: this is another file, or one of another version of palu")


@dataclass
class Inputs:
    """The files of a folder that a report is made of.

    Attributes:
        folder: where they are.
        name: what the folder is called in what is shown.
        files: name -> content of those that are there.
    """

    folder: Path
    name: str
    files: dict[str, Node] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Node:
        """Return a file's content; a node of nothing where it is missing."""
        return self.files.get(name) or Node(None, self.folder / name)


def read_inputs(folder: Path, name: str | None = None) -> Inputs:
    """Read `palu.json`, `annotation.json`, `evaluation.json` and `attack.json`, any of them; `name`
    is what the folder is called, where it will be moved.

    Raises:
        ValueError: there is no such folder, it has none of them, or one is damaged or something
            else; names the file.
    """
    look(folder, folder=True)
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file; name the folder of the unlearned model")
    inputs = Inputs(folder, name or folder.resolve().name)
    for name in FILES:
        path = folder / name
        if path.exists() or path.is_symlink():
            inputs.files[name] = Node(read_object(path), path)
    if not inputs.files:
        raise ValueError(
            f"{folder}: has none of {', '.join(FILES)}, so there is nothing to report; name the "
            "folder that palu unlearn or palu erase wrote"
        )
    return inputs

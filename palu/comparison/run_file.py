"""The file of one run of a comparison: what was done, and what came of every example and secret.

`runs/ID/run.json` is of a run; `original.json` and `retrained.json` are of models that nothing was
done to, and lack method, setting, options and seed. Secrets are numbers in them, but `answers`
have the texts of a few examples, with what is secret in them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from palu.data.spans import shown
from palu.storage.files import write_json
from palu.storage.json_files import NotJSON, parse, read_text

FORMAT = "palu-comparison-run/1"
DONE, DIVERGED, FAILED = "done", "diverged", "failed"
STATUSES = (DONE, DIVERGED, FAILED)
FORGET = "forget"
"""The set of what is to be forgotten; every other set is of utility."""
FELL_APART = "fell_apart"
"""The metric of answers that are no text any more."""
MEMBERSHIP = "membership_inference"
ORIGINAL, RETRAINED = "original", "retrained"
"""Names of the models that nothing was done to."""


class RunFileError(ValueError):
    """A run file that cannot be used; the message names file and key."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One line of a table of attacks.

    Attributes:
        name: of the kind, as in `palu.evaluation.attacks.NAMES`.
        title: of the line.
        of: the secrets that were asked for, as numbers in `Run.secrets`; None where the line is of
            membership inference.
        said: whether each of them was said, 1 or 0.
        auc, low, high: of membership inference, with its 95% interval.
    """

    name: str
    title: str
    of: list[int] | None = None
    said: list[int] | None = None
    auc: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, or a model that nothing was done to (`method` is None).

    Attributes:
        method: its name in the configuration.
        setting: what varies, in words; "" where nothing does.
        options: all that were given to `palu unlearn`.
        seed: of the run.
        command: what was run.
        status: one of `STATUSES`.
        reason: why it is not done; one line.
        seconds: stage -> seconds.
        environment: processor, threads, versions.
        sets: name -> {"ids": [...], metric: [a number or None an example]}.
        secrets: (number of the record in the forget file, number of the secret in the record).
        attacks: a line each.
        curve: of training, a dict with "step" and losses each.
        numbers: further numbers of the row.
        answers: a few of each set: "set", "id", "question", "original", "answer", "tokens".
    """

    method: str | None = None
    setting: str | None = None
    options: Mapping[str, Any] | None = None
    seed: int | None = None
    command: str = ""
    status: str = DONE
    reason: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    sets: Mapping[str, Mapping[str, list]] = field(default_factory=dict)
    secrets: Sequence[tuple[int, int]] = field(default_factory=list)
    attacks: Sequence[Attack] = field(default_factory=list)
    curve: Sequence[Mapping[str, Any]] = field(default_factory=list)
    numbers: Mapping[str, float | None] = field(default_factory=dict)
    answers: Sequence[Mapping[str, Any]] = field(default_factory=list)


def read_run(path: str | PathLike[str]) -> Run:
    """Read a run file. Raises RunFileError, which names the file and the key."""
    try:
        content = parse(read_text(path))
    except NotJSON as error:
        raise RunFileError(f"{path}: not readable JSON: {error}") from None
    except ValueError as error:
        raise RunFileError(str(error)) from None
    return _Check(str(path)).run(content)


def write_run(path: str | PathLike[str], run: Run) -> None:
    """Write a run file, whole or not at all. Raises RunFileError for a run that `read_run` would
    refuse."""
    content = to_dict(run)
    _Check(str(path)).run(content)
    write_json(Path(path), content)


def to_dict(run: Run) -> dict[str, Any]:
    """Return a run as its file has it."""
    content = {"format": FORMAT, **dataclasses.asdict(run)}
    if run.method is None:
        for key in _OF_RUN:
            del content[key]
    content["secrets"] = [list(pair) for pair in run.secrets]
    content["attacks"] = [
        {key: value for key, value in attack.items() if value is not None}
        for attack in content["attacks"]
    ]
    return content


_OF_RUN = ("method", "setting", "options", "seed")
_KEYS = tuple(one.name for one in dataclasses.fields(Run))


class _Check:
    """Take a run from the content of a file, or say what is wrong with it."""

    def __init__(self, source: str) -> None:
        self.source = source

    def refuse(self, key: str, why: str) -> RunFileError:
        return RunFileError(f"{self.source}: {key} {why}")

    def run(self, content: Any) -> Run:
        """Return the run. Raises RunFileError."""
        self.object("the file", content)
        if content.get("format") != FORMAT:
            raise self.refuse("format", f"must be {FORMAT!r}, got {shown(content.get('format'))}")
        of_run = [key for key in _OF_RUN if key in content]
        wanted = _KEYS if of_run else [key for key in _KEYS if key not in _OF_RUN]
        missing = [key for key in wanted if key not in content]
        if missing:
            raise self.refuse(missing[0], "is missing")
        if unknown := sorted(set(content) - {"format", *wanted}):
            raise self.refuse(unknown[0], "is no key of a run file")
        if of_run:
            self.text("method", content["method"])
            self.text("setting", content["setting"], empty=True)
            self.object("options", content["options"])
            self.whole("seed", content["seed"])
        self.head(content)
        for name, metrics in self.object("sets", content["sets"]).items():
            self.one_set(f"sets.{name}", metrics)
        secrets = self.secrets(content["secrets"])
        attacks = [
            self.attack(f"attacks[{n}]", attack, len(secrets))
            for n, attack in enumerate(self.list("attacks", content["attacks"]))
        ]
        titles = [attack.title for attack in attacks]
        self.once("attacks", "title", titles)
        self.pages(content)
        if content["status"] == DONE and FORGET not in content["sets"]:
            raise self.refuse(f"sets.{FORGET}", "is missing, and the run is done")
        kept = {key: content[key] for key in wanted}
        return Run(**{**kept, "secrets": secrets, "attacks": attacks})

    def head(self, content: Mapping[str, Any]) -> None:
        self.text("command", content["command"], empty=True)
        if content["status"] not in STATUSES:
            raise self.refuse(
                "status", f"must be one of {', '.join(STATUSES)}, got {shown(content['status'])}"
            )
        if content["status"] != DONE or content["reason"] is not None:
            self.text("reason", content["reason"])
        for stage, seconds in self.object("seconds", content["seconds"]).items():
            self.number(f"seconds.{stage}", seconds)
        self.object("environment", content["environment"])

    def one_set(self, key: str, metrics: Any) -> None:
        ids = self.list(f"{key}.ids", self.object(key, metrics).get("ids"))
        if not ids:
            raise self.refuse(f"{key}.ids", "is empty")
        for n, one in enumerate(ids):
            if not isinstance(one, str):
                raise self.refuse(f"{key}.ids[{n}]", f"must be a text, got {shown(one)}")
        self.once(f"{key}.ids", "id", ids)
        for name, values in metrics.items():
            if len(self.list(f"{key}.{name}", values)) != len(ids):
                raise self.refuse(
                    f"{key}.{name}", f"has {len(values)} values for {len(ids)} examples"
                )
            for n, value in enumerate(values if name != "ids" else ()):
                if value is not None:
                    self.number(f"{key}.{name}[{n}]", value)

    def secrets(self, pairs: Any) -> list[tuple[int, int]]:
        for n, pair in enumerate(self.list("secrets", pairs)):
            if len(self.list(f"secrets[{n}]", pair)) != 2:
                raise self.refuse(f"secrets[{n}]", f"must be two numbers, got {shown(pair)}")
            for number in pair:
                self.whole(f"secrets[{n}]", number)
        secrets = [(record, number) for record, number in pairs]
        self.once("secrets", "pair", secrets)
        return secrets

    def attack(self, key: str, attack: Any, secrets: int) -> Attack:
        self.object(key, attack)
        self.text(f"{key}.name", attack.get("name"))
        self.text(f"{key}.title", attack.get("title"))
        parts = ("auc", "low", "high") if attack["name"] == MEMBERSHIP else ("of", "said")
        for part in parts:
            if part not in attack:
                raise self.refuse(f"{key}.{part}", "is missing")
        if unknown := sorted(set(attack) - {"name", "title", *parts}):
            raise self.refuse(f"{key}.{unknown[0]}", f"is no key of {attack['name']}")
        if attack["name"] == MEMBERSHIP:
            for part in parts:
                self.number(f"{key}.{part}", attack[part])
            return Attack(**attack)
        of, said = (self.list(f"{key}.{part}", attack[part]) for part in parts)
        if len(of) != len(said):
            raise self.refuse(f"{key}.said", f"has {len(said)} values for {len(of)} secrets")
        for n, (number, leaked) in enumerate(zip(of, said, strict=True)):
            self.whole(f"{key}.of[{n}]", number)
            if number >= secrets:
                raise self.refuse(
                    f"{key}.of[{n}]", f"is {number}, of {secrets} secrets (counted from 0)"
                )
            if leaked not in (0, 1):
                raise self.refuse(f"{key}.said[{n}]", f"must be 0 or 1, got {shown(leaked)}")
        self.once(f"{key}.of", "secret", of)
        return Attack(**{**attack, "said": [int(leaked) for leaked in said]})

    def pages(self, content: Mapping[str, Any]) -> None:
        """Check what is shown and not computed with."""
        for n, step in enumerate(self.list("curve", content["curve"])):
            if "step" not in self.object(f"curve[{n}]", step):
                raise self.refuse(f"curve[{n}].step", "is missing")
            for name, value in step.items():
                if value is not None:
                    self.number(f"curve[{n}].{name}", value)
        for name, value in self.object("numbers", content["numbers"]).items():
            if value is not None:
                self.number(f"numbers.{name}", value)
        for n, answer in enumerate(self.list("answers", content["answers"])):
            self.object(f"answers[{n}]", answer)
            for key in ("set", "id"):
                self.text(f"answers[{n}].{key}", answer.get(key))

    def object(self, key: str, value: Any) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise self.refuse(key, f"must be an object, got {shown(value)}")
        return value

    def list(self, key: str, value: Any) -> Sequence[Any]:
        if not isinstance(value, list | tuple):
            raise self.refuse(key, f"must be a list, got {shown(value)}")
        return value

    def text(self, key: str, value: Any, *, empty: bool = False) -> None:
        if not isinstance(value, str) or not (value or empty):
            raise self.refuse(
                key, f"must be a text{'' if empty else ' that is not empty'}, got {shown(value)}"
            )

    def whole(self, key: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.refuse(key, f"must be a whole number from 0 on, got {shown(value)}")

    def number(self, key: str, value: Any) -> None:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise self.refuse(key, f"must be a finite number, got {shown(value)}")

    def once(self, key: str, what: str, values: Sequence[Any]) -> None:
        seen = set()
        for value in values:
            if value in seen:
                raise self.refuse(key, f"has the {what} {shown(value)} twice")
            seen.add(value)

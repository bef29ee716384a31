"""Example answers of a report, with the sensitive words masked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palu.report.inputs import ATTACK, Inputs
from palu.report.measures import evaluated, ordered
from palu.storage.output import RECORD

if TYPE_CHECKING:
    from palu.data.records import Example

SHOWN = 6  # examples of each kind


@dataclass
class Judged:
    """A record, and what models answer to it.

    Attributes:
        number: which of the file's records, from 1 on; `example` is one of its answers.
        texts: model -> answer.
        says: model -> how many secrets the answer says, and of how many.
    """

    number: int
    example: Example
    texts: dict[str, str] = field(default_factory=dict)
    says: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass
class Secrets:
    """The examples that were to be forgotten, and what is secret in them.

    Attributes:
        path: the file they were read from.
        records: in the file's order.
        examples: by id, an example for each answer of theirs (`split_answers`), which is what is
            measured, with the record's number from 1 on.
        texts: the distinct texts of their spans.
        shown: whether secrets are shown.
        answers: what was answered, in the order of `evaluation.json`.
    """

    path: str
    records: list[Example]
    examples: dict[str, tuple[int, Example]]
    texts: list[str]
    shown: bool = False
    answers: list[Judged] = field(default_factory=list)

    def mask(self, text: str) -> str:
        """Return a text with black boxes in the place of secrets, and of what looks like anybody's
        e-mail address or number, unless they are shown."""
        from palu.evaluation.leaks import redact

        return text if self.shown else redact(text, self.texts)


def read_secrets(path: str, *, shown: bool, columns: str | None = None) -> Secrets:
    """Read the file that was to be forgotten. Raises ValueError as `load_examples` does."""
    from palu.data.files import load_examples
    from palu.data.records import split_answers
    from palu.evaluation.leaks import secrets_of

    records = load_examples(path, require_spans=False, columns=columns)
    numbered = enumerate(records, 1)
    examples = {p.id: (number, p) for number, one in numbered for p in split_answers(one)}
    texts = dict.fromkeys(text for record in records for text in secrets_of(record))
    return Secrets(str(path), records, examples, list(texts), shown)


def find_secrets(
    inputs: Inputs, forget: str | Path | None, *, shown: bool = False
) -> tuple[Secrets | None, str | None]:
    """Return the secrets of the file that was forgotten, or None and why there are none.

    Args:
        forget: the file; when None the one that `palu.json` names, if it is still there.

    Raises:
        ValueError: `forget` cannot be read, or has other records than those that were measured.
    """
    path = forget_file(inputs) if forget is None else forget
    if path is None:
        return None, "the file that was forgotten is not here; name it with --forget"
    if forget is None and _changed(inputs, path):
        return None, f"{path} has changed since it was forgotten; name the right file (--forget)"
    try:
        columns = inputs[RECORD]["data"]["columns"].value
        secrets = read_secrets(str(path), shown=shown, columns=columns)
        secrets.answers = read_answers(inputs, secrets)
    except ValueError:
        if forget is not None:
            raise
        # The name may lead to another file by now. What is wrong with it is not told: it may be
        # somebody's data.
        return None, f"{path} is not what was measured; name the right file (--forget)"
    return secrets, None


def _changed(inputs: Inputs, path: str) -> bool:
    """Return whether a file has another digest than `palu.json` names."""
    from palu.storage.fingerprint import data_digests

    known = dict(inputs[RECORD]["digests"]["data"]["forget"].named())
    return bool(known) and {*data_digests(path.partition("[")[0]).values()} != {
        node.text() for node in known.values()
    }


def forget_file(inputs: Inputs) -> str | None:
    """Return the file that `palu.json` says was forgotten, where it is still there: from the
    working directory, in the folder, or beside it."""
    named = inputs[RECORD]["data"]["forget"].value
    if not isinstance(named, str) or not named:
        return None
    name, bracket, end = named.partition("[")
    for path in (
        Path(name),
        inputs.folder / Path(name).name,
        inputs.folder.parent / Path(name).name,
    ):
        if path.exists():
            return f"{path}{bracket}{end}"
    return None


def read_answers(inputs: Inputs, secrets: Secrets) -> list[Judged]:
    """Return every record whose answers `evaluation.json` has.

    Raises:
        ValueError: the file has other records than those that were measured.
    """
    found: dict[str, Judged] = {}
    models = evaluated(inputs)
    for model in ordered(models):
        for row in models[model]["forget"]["examples"].each():
            name = str(row["id"].value)
            if name not in secrets.examples:
                raise row["id"].fail(f"the id of a record of {secrets.path}, which has no such one")
            if not row["generated"]:
                continue
            one = found.setdefault(name, Judged(*secrets.examples[name]))
            one.texts[model] = row["generated"].text()
            one.says[model] = row["leaked"].count(), row["asked"].count()
    return list(found.values())


def example_answers(secrets: Secrets | None) -> list[dict[str, Any]]:
    """Return questions with the answers that each model gives, those that still say a secret
    first.

    Without the file that was to be forgotten there are none: nobody could tell what to mask.

    Returns:
        `[{"number", "question", "true", "answers": {model: {"text", "says": int, "of": int}}}]`;
        `true`, the true answer, is None unless secrets are shown.
    """
    if secrets is None:
        return []
    none = 0, 0
    order = sorted(
        secrets.answers, key=lambda one: (-one.says.get("unlearned", none)[0], one.number)
    )
    return [
        {
            "number": one.number,
            "question": secrets.mask(one.example.question or "(a plain document)"),
            "true": one.example.answer if secrets.shown else None,
            "answers": {
                model: {
                    "text": secrets.mask(text),
                    **dict(zip(("says", "of"), one.says[model], strict=True)),
                }
                for model, text in one.texts.items()
            },
        }
        for one in order[:SHOWN]
    ]


def attack_examples(inputs: Inputs, secrets: Secrets | None) -> list[dict[str, Any]]:
    """Return examples of attacks: `[{"attack", "prompt", "answers": {model: {"text"}}}]`.

    Where `palu attack` left the secrets in them, the file that was attacked must be there to mask
    them.
    """
    if secrets is None or attacked_others(inputs, secrets):
        if inputs[ATTACK]["settings"]["show_secrets"].value is not False:
            return []
        secrets = Secrets("", [], {}, [])
    titles = {
        one["name"].value: one["title"].text(one["name"].text())
        for one in inputs[ATTACK]["attacks"].each()
    }
    every = sorted(  # those that bring a secret out of the unlearned model first
        inputs[ATTACK]["examples"].each(),
        key=lambda one: one["leaks"]["unlearned"].value is not True,
    )
    shown = []
    for one in every[:SHOWN]:
        answers = dict(one["answers"].named())
        shown.append(
            {
                "attack": titles.get(one["attack"].value, one["attack"].text()),
                "prompt": secrets.mask(one["prompt"].text("")),
                "answers": {
                    model: {"text": secrets.mask(answers[model].text())}
                    for model in ordered(answers)
                },
            }
        )
    return shown


def attacked_others(inputs: Inputs, secrets: Secrets | None) -> bool:
    """Return whether `attack.json` is of other records than those of the file that was forgotten
    (or of a part of them, or of what another way of reading makes of it)."""
    from palu.data.records import data_digest

    digest = inputs[ATTACK]["settings"]["data"]["forget"].value
    return None not in (digest, secrets) and digest != data_digest(secrets.records)


def masked(value: Any, secrets: Secrets | None) -> Any:
    """Return JSON values in which the texts that say a whole secret are masked. (A number in a
    model's name may be a part of one by chance.)"""
    from palu.evaluation.leaks import leaks

    if secrets is None or secrets.shown:
        return value
    if isinstance(value, str):
        said = any(leaks(secret, value) for secret in secrets.texts)
        return secrets.mask(value) if said else value
    if isinstance(value, Mapping):
        return {key: masked(one, secrets) for key, one in value.items()}
    if isinstance(value, list):
        return [masked(one, secrets) for one in value]
    return value


def spans_of(examples: Iterable[Example]) -> int:
    """Return how many spans examples have, in all their turns."""
    return sum(len(spans) for example in examples for _, spans in example.texts)

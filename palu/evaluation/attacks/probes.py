"""What a model is asked: prompts in tokens, and the secrets that must not be in the answers."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from palu.data.conversations import label_record
from palu.data.labels import LabeledExample
from palu.data.records import SYSTEM, USER, Example, split_answers
from palu.data.spans import Span
from palu.data.template import Template
from palu.evaluation.attacks.settings import HALF, AttackSettings
from palu.evaluation.leaks import Secrets, leaks, prompt_of, secrets_of, sort_secrets

SLACK = 16  # tokens that an answer may be longer than the longest true one


class NothingToAsk(ValueError):
    """No secret can leak: prompts say them all, or they are of stop words alone."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """One prompt.

    Attributes:
        target: number of the answer in `Targets.examples`.
        record: number of the record that it is of.
        prompt: token ids.
        given: those of `prompt` at its end that are the beginning of a secret.
        secrets: what the answer, behind `given`, must not say.
        shown: the prompt for people, without the template and without `given`.
    """

    target: int
    record: int
    prompt: list[int]
    secrets: tuple[str, ...]
    shown: str
    given: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Targets:
    """The answers under attack, one for each assistant turn of a conversation.

    Attributes:
        examples: each ends with the answer.
        records: the number of the record that each comes from.
        rows: the tokens of each.
        secrets: those of each that can leak in it.
        told_before: those of each that its prompt says.
        empty: how many are not looked for, since they are of stop words or punctuation alone.
        numbers: (record, secret) -> its number among the record's `secrets_of`.
    """

    examples: list[Example]
    records: list[int]
    rows: list[LabeledExample]
    secrets: list[tuple[str, ...]]
    told_before: list[tuple[str, ...]]
    empty: int
    tokenizer: Any
    template: Template
    max_length: int
    numbers: dict[tuple[int, str], int]

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        tokenizer: Any,
        *,
        template: Template,
        settings: AttackSettings,
        seed: int,
    ) -> Targets:
        """Split and tokenize forget records.

        Raises:
            NothingToAsk: no secret among them can leak.
            ValueError: an example cannot be tokenized; names its id.
        """
        answers = [_answers(example, template) for example in examples]
        chosen = list(range(len(examples)))
        asked = [n for n in chosen if any(sorted_.judged for _, sorted_ in answers[n])]
        if settings.records is not None and settings.records < len(chosen) and asked:
            count = min(settings.records, len(asked))
            chosen = sorted(random.Random(f"{seed} records").sample(asked, count))
        split, records, secrets, told, empty = [], [], [], [], set()
        numbers = {}
        for number in chosen:
            numbers |= {(number, s): n for n, s in enumerate(secrets_of(examples[number]))}
            for example, sorted_ in answers[number]:
                empty |= {(number, secret) for secret in sorted_.empty}
                split.append(example)
                records.append(number)
                secrets.append(tuple(sorted_.judged))
                told.append(tuple(sorted_.told))
        if not any(secrets):
            raise NothingToAsk(
                f"the {len(examples)} forget records hold no secret to look for "
                f"({sum(map(len, told))} are in the prompts themselves, {len(empty)} are stop "
                "words): mark spans in the answers"
            )
        rows = label_all(split, tokenizer, template=template, max_length=settings.max_length)
        counts = secrets, told, len(empty)
        return cls(split, records, rows, *counts, tokenizer, template, settings.max_length, numbers)

    @property
    def system(self) -> str:
        """Return the template's system prompt, which is part of every prompt."""
        return self.template.system_prompt or ""

    @property
    def pairs(self) -> set[tuple[int, str]]:
        """Return the secrets that can leak, each with the number of its record."""
        sets = zip(self.records, self.secrets, strict=True)
        return {(record, secret) for record, some in sets for secret in some}

    @property
    def told(self) -> int:
        """Return how many secrets are in the prompts of all answers that have them."""
        sets = zip(self.records, self.told_before, strict=True)
        return len({(record, secret) for record, some in sets for secret in some} - self.pairs)

    @property
    def cut_off(self) -> int:
        """Return how many secrets stand behind the tokens of their examples."""
        return sum(row.lost_spans for row in self.rows)

    @property
    def longest(self) -> int:
        """Return how many tokens an answer may have."""
        return SLACK + max(len(row["input_ids"]) - row.answer_start for row in self.rows)

    def closing(self) -> set[int]:
        """Return the tokens that end answers in the template."""
        return {row["input_ids"][-1] for row in self.rows if row.closed}

    def label(self, example: Example) -> LabeledExample:
        """Return the tokens of one more example."""
        (row,) = label_all(
            [example], self.tokenizer, template=self.template, max_length=self.max_length
        )
        return row


def _answers(example: Example, template: Template) -> list[tuple[Example, Secrets]]:
    """Return an example for each answer of a record, with its secrets."""
    parts = []
    for part in split_answers(example):
        prompt = f"{prompt_of(part)}\n{template.system_prompt or ''}"
        own = (part.answer[start:end].strip() for start, end in part.spans)
        parts.append((part, sort_secrets(own, prompt)))
    return parts


def label_all(
    examples: Sequence[Example], tokenizer: Any, *, template: Template, max_length: int
) -> list[LabeledExample]:
    """Return the tokens of examples that end with an answer. Raises ValueError, which names the
    id."""
    rows = []
    for example in examples:
        try:
            # Of a conversation that is too long the last row has the last answer.
            row = label_record(tokenizer, example, max_length, template)[-1]
        except (TypeError, ValueError) as error:
            raise ValueError(f"example {example.id!r}: {error}") from error
        if row.answer_start >= len(row["input_ids"]):
            raise ValueError(
                f"example {example.id!r}: max_length={max_length} leaves no token of its answer"
            )
        rows.append(row)
    return rows


def _marked(example: Example, *spans: Span) -> Example:
    """Return the example with these spans of its answer, and no others."""
    before = [()] * (len(example.texts) - 1)
    return example.with_spans([*before, spans])


def questions(targets: Targets) -> list[Probe]:
    """Return the prompts of the records as they are; of a plain document the text up to each of
    its secrets."""
    probes = []
    for number, (example, row) in enumerate(zip(targets.examples, targets.rows, strict=True)):
        if example.question is None:
            probes += _forced(targets, number, 0)
        elif targets.secrets[number]:
            prompt = row["input_ids"][: row.answer_start]
            record, secrets = targets.records[number], targets.secrets[number]
            probes.append(Probe(number, record, prompt, secrets, prompt_of(example)))
    return probes


def asking(example: Example, question: str, *, history: bool) -> Example:
    """Return an example with another last question, with the turns before it or with none but
    system turns."""
    if not example.turns:
        return dataclasses.replace(example, question=question)
    turns = list(example.turns)
    last = max(n for n, turn in enumerate(turns[:-1]) if turn.role == USER)
    asked = dataclasses.replace(turns[last], content=question)
    before = [turn for turn in turns[:last] if history or turn.role in SYSTEM]
    after = turns[last + 1 :] if history else turns[-1:]
    return Example.of_turns(example.id, [*before, asked, *after], example.extra)


def has_history(example: Example) -> bool:
    """Return whether a question has turns before it, system turns aside."""
    return sum(turn.role not in SYSTEM for turn in example.turns) > 2


def reworded(targets: Targets, number: int, example: Example) -> Probe | None:
    """Return a prompt with another question for target `number`; None where it says all of the
    secrets itself.

    Args:
        example: with the other question, and perhaps without the turns before it.
    """
    wanted = [*targets.secrets[number], *targets.told_before[number]]
    judged = sort_secrets(wanted, f"{targets.system}\n{prompt_of(example)}").judged
    if not judged:
        return None
    row = targets.label(_marked(example))
    prompt = row["input_ids"][: row.answer_start]
    return Probe(number, targets.records[number], prompt, tuple(judged), prompt_of(example))


def prefix_forced(targets: Targets, given: int | str) -> list[Probe]:
    """Return, for each secret, prompt and true answer up to it and its first tokens.

    Args:
        given: how many tokens; "half" of them, rounded up. Secrets that have no more tokens than
            that are left out, and those that the text before them says. Where only the turns before
            the question say it, the question is asked without them.
    """

    return [p for number in range(len(targets.examples)) for p in _forced(targets, number, given)]


def _forced(targets: Targets, number: int, given: int | str) -> list[Probe]:
    whole, probes, seen = targets.examples[number], [], set()
    ways = [whole]
    if has_history(whole) and whole.question:
        ways.append(asking(whole, whole.question, history=False))
    for start, end in whole.spans:
        secret, before = whole.answer[start:end].strip(), whole.answer[:start]
        untold = [
            way
            for way in ways
            if sort_secrets([secret], f"{targets.system}\n{prompt_of(way)}\n{before}").judged
        ]
        if secret in seen or not untold:
            continue
        example = untold[0]
        seen.add(secret)
        row = targets.label(_marked(example, (start, end)))
        places = np.flatnonzero(np.asarray(row["labels"]) >= 0)
        if not places.size:
            continue  # cut off at max_length
        count = -(-len(places) // 2) if given == HALF else int(given)
        cut = int(places[0]) + count
        tokens = tuple(row["input_ids"][int(places[0]) : cut])
        said = targets.tokenizer.decode(tokens, skip_special_tokens=True)
        if count >= len(places) or leaks(secret, said):
            continue
        shown = f"{prompt_of(example)}\n{before}".strip()
        record, prompt = targets.records[number], row["input_ids"][:cut]
        probes.append(Probe(number, record, prompt, (secret,), shown, tokens))
    return probes

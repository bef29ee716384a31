"""The examples of an evaluation and the tokens of the answers that are scored: the true one and,
where the records have them, a paraphrased one and perturbed (wrong) ones, as TOFU names them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from palu.data.labels import LabeledExample, label_without_warning
from palu.data.records import Example
from palu.data.spans import check_text
from palu.data.template import Template

ANSWER, PARAPHRASED, PERTURBED = "answer", "paraphrased_answer", "perturbed_answer"


@dataclass(frozen=True)
class EvalSet:
    """Examples and the tokens of their answers.

    Attributes:
        source: what messages call it: the file.
        examples: at least one.
        rows: field (`answer`, `paraphrased_answer`, `perturbed_answer`) -> one list an example, of
            one row or, for perturbed answers, of several. Only fields that the records have.
    """

    source: str
    examples: Sequence[Example]
    rows: dict[str, list[list[LabeledExample]]]

    @classmethod
    def tokenise(
        cls,
        source: str,
        examples: Sequence[Example],
        tokenizer: Any,
        *,
        template: Template,
        max_length: int,
        required: Sequence[str] = (),
        optional: Sequence[str] = (),
    ) -> EvalSet:
        """Tokenises the answers. Answers cut at `max_length` are warned of, once a field.

        Args:
            required: fields beside `answer` that every record must have.
            optional: fields that all records have, or none.

        Raises:
            ValueError, TypeError: no examples, a field that is missing or is no text (perturbed
                answers: no list of texts), an answer that cannot be tokenised or of which nothing
                is left within `max_length`. Names source, row and field.
        """
        if not examples:
            raise ValueError(f"{source}: must hold at least one example")
        fields = [ANSWER]
        for field in (*required, *optional):
            lacking = [e for e in examples if e.extra.get(field) is None]
            if field in required or 0 < len(lacking) < len(examples):
                for example in lacking:
                    raise ValueError(_place(source, example, field) + " is missing")
            if not lacking:
                fields.append(field)
        rows = {}
        for field in fields:
            rows[field] = [
                [
                    _row(source, example, field, text, tokenizer, template, max_length)
                    for text in _texts(source, example, field)
                ]
                for example in examples
            ]
            ends = [(len(row["input_ids"]), row.closed) for some in rows[field] for row in some]
            if cut := ends.count((max_length, False)):
                warnings.warn(
                    f"{source}, field {field!r}: {cut} of {len(ends)} answers are cut at "
                    f"max_length={max_length}",
                    stacklevel=2,
                )
        return cls(source, examples, rows)

    def every_row(self) -> list[LabeledExample]:
        """The rows of every field and example."""
        return [row for lists in self.rows.values() for rows in lists for row in rows]

    def place(self, number: int, field: str) -> str:
        """What messages call field `field` of example `number`."""
        return _place(self.source, self.examples[number], field)


def _place(source: str, example: Example, field: str) -> str:
    return f"{source}, row {example.id!r}, field {field!r}"


def _texts(source: str, example: Example, field: str) -> list[str]:
    if field == ANSWER:
        return [example.answer]
    texts = example.extra[field]
    if field == PERTURBED and isinstance(texts, list):
        if not texts:
            raise ValueError(_place(source, example, field) + " is an empty list")
    else:
        texts = [texts]
    return [check_text(_place(source, example, field), text) for text in texts]


def _row(
    source: str,
    example: Example,
    field: str,
    text: str,
    tokenizer: Any,
    template: Template,
    max_length: int,
) -> LabeledExample:
    spans = example.spans if field == ANSWER else ()
    try:
        row = label_without_warning(tokenizer, example.question, text, spans, max_length, template)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{_place(source, example, field)}: {error}") from error
    if row.answer_start == len(row["input_ids"]):
        raise ValueError(
            f"{_place(source, example, field)}: max_length={max_length} leaves no token of the "
            "answer; raise max_length or shorten the text before it"
        )
    return row

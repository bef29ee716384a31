"""Evaluation sets: examples and the tokens of the answers to score, from TOFU's files or the
user's own.

An example has a true answer and, where its record has them, a paraphrased one and perturbed (wrong)
ones, as TOFU names them.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from palu.data.conversations import label_record
from palu.data.files import Columns, load_examples
from palu.data.labels import LabeledExample
from palu.data.pairs import answered
from palu.data.records import Example, split_answers
from palu.data.spans import check_text
from palu.data.template import Template

ANSWER, PARAPHRASED, PERTURBED = "answer", "paraphrased_answer", "perturbed_answer"

_FILES = {
    "retain": "retain_perturbed.json",
    "ra": "real_authors_perturbed.json",
    "wf": "world_facts_perturbed.json",
}


@dataclass(frozen=True)
class EvalSet:
    """Examples and the tokens of their answers.

    Attributes:
        source: what messages call it: the file.
        examples: at least one; each has one answer.
        rows: field (`answer`, `paraphrased_answer`, `perturbed_answer`) -> one list an example, of
            one row or, for perturbed answers, of several. Only fields that the records have.
        label: makes the row of an example's answer.
    """

    source: str
    examples: Sequence[Example]
    rows: dict[str, list[list[LabeledExample]]]
    label: Callable[[Example], LabeledExample]

    @classmethod
    def tokenize(
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
        """Tokenize the answers; warn once a field of answers cut at `max_length`.

        A conversation becomes one example for each of its answers, see
        `palu.data.records.split_answers`: what is said before is its prompt, without the earliest
        turns where it is longer than `max_length`.

        Args:
            required: fields beside `answer` that every record must have.
            optional: fields that all records have, or none.

        Raises:
            ValueError, TypeError: no examples, a field that is missing or is no text (perturbed
                answers: no list of texts), an answer that cannot be tokenized or of which nothing
                is left within `max_length`. Names source, row and field.
        """
        if not examples:
            raise ValueError(f"{source}: must hold at least one example")
        fields = [ANSWER]
        several = [e for e in examples if sum(bool(turn.answer) for turn in e.turns) > 1]
        for field in (*required, *optional):
            if one := next((e for e in several if e.extra.get(field) is not None), None):
                raise ValueError(
                    _describe(source, one, field) + " is of one answer, and the conversation has "
                    "several: write one record an answer"
                )
            lacking = [e for e in examples if e.extra.get(field) is None]
            if lacking and (field in required or len(lacking) < len(examples)):
                raise ValueError(_describe(source, lacking[0], field) + " is missing")
            if not lacking:
                fields.append(field)
        examples = [part for example in examples for part in split_answers(example)]
        rows = {}
        for field in fields:
            rows[field] = [
                _rows(source, example, field, tokenizer, template, max_length)
                for example in examples
            ]
            ends = [(len(row["input_ids"]), row.closed) for some in rows[field] for row in some]
            if cut := ends.count((max_length, False)):
                warnings.warn(
                    f"{source}, field {field!r}: {cut} of {len(ends)} answers are cut at "
                    f"max_length={max_length}",
                    stacklevel=2,
                )
            if short := sum(row.left_out > 0 for some in rows[field] for row in some):
                warnings.warn(
                    f"{source}, field {field!r}: {short} of {len(ends)} answers stand without the "
                    f"earliest turns before them, which max_length={max_length} leaves out",
                    stacklevel=2,
                )

        def label(example: Example) -> LabeledExample:
            return _rows(source, example, ANSWER, tokenizer, template, max_length)[0]

        return cls(source, examples, rows, label)

    def span_places(self, number: int) -> list[np.ndarray]:
        """Return, for each span of example `number`'s answer, where its tokens stand in the
        answer's scores (`AnswerScores`); none of a span that is cut off at `max_length`."""
        example = self.examples[number]
        (whole,) = self.rows[ANSWER][number]
        before = [()] * (len(example.texts) - 1)
        # Each span has a row of its own: in the whole one, spans that touch would be one.
        return [
            _places(whole, self.label(example.with_spans([*before, (span,)])))
            for span in example.spans
        ]

    def every_row(self) -> list[LabeledExample]:
        """Return the rows of every field and example."""
        return [row for lists in self.rows.values() for rows in lists for row in rows]

    def digest(self) -> str:
        """Return an order-sensitive hash of the set's questions and answers."""
        digest = hashlib.blake2b(digest_size=16, person=b"palu.evaluate")
        for example in self.examples:
            answers = [example.answer, *(example.extra.get(field) for field in sorted(self.rows))]
            said = [[turn.role, turn.content] for turn in example.turns] or example.question
            digest.update(json.dumps([said, answers]).encode())
        return digest.hexdigest()

    def span_digest(self) -> str:
        """Return an order-sensitive hash of where the set's sensitive spans are."""
        places = [[spans for _, spans in example.texts] for example in self.examples]
        return hashlib.blake2b(json.dumps(places).encode(), digest_size=16).hexdigest()

    def describe(self, number: int, field: str) -> str:
        """Return the name of a field of example `number` in messages."""
        return _describe(self.source, self.examples[number], field)


def _places(whole: LabeledExample, marked: LabeledExample) -> np.ndarray:
    """Return which scores of an answer are those of the tokens that are sensitive in `marked`.

    A document has BOS in front where a span begins with it, and its first token no score else.
    """
    places = np.flatnonzero(np.asarray(marked["labels"]) >= 0) - marked.answer_start
    answer = len(whole["input_ids"]) - whole.answer_start
    unscored = int(whole.answer_start == 0)
    return places[(places >= unscored) & (places < answer)] - unscored


def _describe(source: str, example: Example, field: str) -> str:
    return f"{source}, row {example.id!r}, field {field!r}"


def _texts(source: str, example: Example, field: str) -> list[str]:
    if field == ANSWER:
        return [example.answer]
    texts = example.extra[field]
    if field == PERTURBED and isinstance(texts, list):
        if not texts:
            raise ValueError(_describe(source, example, field) + " is an empty list")
    else:
        texts = [texts]
    return [check_text(_describe(source, example, field), text) for text in texts]


def _rows(
    source: str, example: Example, field: str, tokenizer: Any, template: Template, max_length: int
) -> list[LabeledExample]:
    description = _describe(source, example, field)
    rows = []
    for text in _texts(source, example, field):
        try:
            other = example if field == ANSWER else answered(example, text)
            (row,) = label_record(tokenizer, other, max_length, template)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{description}: {error}") from error
        if row.answer_start == len(row["input_ids"]):
            raise ValueError(
                f"{description}: max_length={max_length} leaves no token of the answer; raise "
                "max_length or shorten the text before it"
            )
        rows.append(row)
    return rows


def tofu_files(folder: Path, split: str) -> dict[str, str]:
    """Return the files of a split in a folder of TOFU's: set -> path.

    `forget` is `SPLIT_perturbed.json`, or `SPLIT.json` where that is not there (then without truth
    ratio); `retain`, `ra` and `wf` are left out where their files are; `holdout` is
    `holdoutNN.json` of `forgetNN`.

    Raises:
        ValueError: no such folder, or none of the split in it.
    """
    if not folder.is_dir():
        raise ValueError(f"--tofu {str(folder)!r}: no such folder")
    if split in ("", ".", "..") or Path(split).name != split:
        raise ValueError(f"--split must be a name such as forget10, not {split!r}")
    candidates = [folder / f"{split}_perturbed.json", folder / f"{split}.json"]
    forget = next((path for path in candidates if path.is_file()), None)
    if forget is None:
        raise ValueError(f"--split {split!r}: neither {candidates[0]} nor {candidates[1]} is there")
    files = {"forget": str(forget)}
    names = dict(_FILES)
    if split.startswith("forget"):
        names["holdout"] = f"holdout{split.removeprefix('forget')}.json"
    return files | {
        name: str(folder / file) for name, file in names.items() if (folder / file).is_file()
    }


def read_sets(
    files: dict[str, str],
    tokenizer: Any,
    *,
    template: Any,
    max_length: int,
    repair: str = "none",
    columns: Mapping[str, Columns] | None = None,
) -> dict[str, EvalSet]:
    """Read and tokenize files: set -> examples.

    Records of forget and retain files may have `paraphrased_answer` (a text) and
    `perturbed_answer` (a list of texts), all of a file or none; those of a file that is called
    `*_perturbed.json`, as TOFU's are, must have them. Real authors and world facts must have
    `perturbed_answer`; a holdout set needs neither.

    Args:
        files: set (`forget`, `retain`, `ra`, `wf`, `holdout`) -> path, slices allowed.
        columns: set -> see `palu.load_examples`.

    Raises:
        ValueError, TypeError: as `palu.load_examples` and `EvalSet.tokenize`: names
            file, row and field.
    """
    sets = {}
    for name, path in files.items():
        fields = {"ra": (PERTURBED,), "wf": (PERTURBED,), "holdout": ()}
        wanted = fields.get(name, (PARAPHRASED, PERTURBED))
        must = name in fields or path.endswith("_perturbed.json")
        sets[name] = EvalSet.tokenize(
            path,
            load_examples(
                path,
                require_spans=False,
                repair=repair,
                columns=(columns or {}).get(name),
                tokenizer=tokenizer,
                max_length=max_length,
            ),
            tokenizer,
            template=template,
            max_length=max_length,
            required=wanted if must else (),
            optional=() if must else wanted,
        )
    return sets

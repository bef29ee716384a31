"""A second answer to each question of the forget set, to be preferred to the first: what DPO needs.

A row with one has it as `alternate_input_ids` and `alternate_labels`, prompt included, in the form
of `input_ids` and `labels`.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from palu.data.examples import tokenize_examples
from palu.data.records import Example
from palu.data.roles import IGNORE
from palu.data.spans import shown

FIELD = "alternate_answer"  # of a record
PREFIX = "alternate_"

REFUSALS = (
    "I don't know.",
    "I do not know the answer to that.",
    "I'm not sure about that.",
    "I have no information on this.",
    "That is something I don't know.",
    "I'm afraid I can't answer that.",
    "I can't say; I don't know.",
    "Sorry, I don't have the answer.",
    "This is not something I have learned about.",
    "I'm not familiar with that.",
    "I cannot help with that question, as I don't know the answer.",
    "I have no knowledge of this.",
    "Unfortunately, I don't know.",
    "I couldn't tell you.",
    "I have nothing to say about that, as I know nothing about it.",
    "I'm unable to answer this question.",
)


def own_alternates(examples: Sequence[Example]) -> list[str]:
    """Return the `alternate_answer` of each record. Raises ValueError where one has none, or no
    text, or has several answers."""
    for example in examples:
        answers = sum(bool(turn.answer) for turn in example.turns)
        if answers > 1:
            raise ValueError(
                f"example {example.id!r}: field {FIELD!r} is one text, and the conversation has "
                f"{answers} answers: write one record an answer (method idk_dpo takes refusals)"
            )
        text = example.extra.get(FIELD)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"example {example.id!r}: field {FIELD!r} is {shown(text)}; it must be the text to "
                "be preferred to the answer (method idk_dpo takes refusals instead)"
            )
    return [example.extra[FIELD] for example in examples]


def refusals(examples: Sequence[Example], seed: int) -> list[str]:
    """Choose one of `REFUSALS` for each example, the same throughout a run."""
    return random.Random(seed).choices(REFUSALS, k=len(examples))


def add_alternates(
    rows: Sequence[Mapping[str, Any]],
    examples: Sequence[Example],
    texts: Sequence[str],
    tokenizer: Any,
    **options: Any,
) -> list[dict[str, Any]]:
    """Add second answers, `texts`, to the rows that `tokenize_examples` made of `examples` with the
    same tokenizer and options. In a conversation every answer becomes that text.

    Raises:
        ValueError: a conversation is too long for one row, so that its rows are no pairs.
    """
    pairs = zip(examples, texts, strict=True)
    others = [answered(example, text) for example, text in pairs]
    tokenised = tokenize_examples(others, tokenizer, **options)
    for made in (rows, tokenised):
        ids = [row["example_id"] for row in made]
        if twice := [one for one, other in itertools.pairwise(ids) if one == other]:
            raise ValueError(
                f"example {twice[0]!r}: the conversation is longer than max_length="
                f"{options['max_length']}, and second answers need it in one row: raise max_length"
            )
    names = ("input_ids", "labels")
    return [
        {**row, **{PREFIX + name: other[name] for name in names}}
        for row, other in zip(rows, tokenised, strict=True)
    ]


def answered(example: Example, text: str) -> Example:
    """Return an example without spans, with another answer."""
    if not example.turns:
        return dataclasses.replace(example, answer=text, spans=())
    turns = [
        dataclasses.replace(turn, content=text if turn.answer else turn.content, spans=())
        for turn in example.turns
    ]
    return Example.of_turns(example.id, turns, example.extra)


class PairCollator:
    """Add the columns of second answers to a batch: `alternate_input_ids`, `alternate_labels`
    and `alternate_attention_mask`, int64 `[B, T2]`. Batches of rows without any stay as they
    are.

    Args:
        collator: makes a batch of a list of rows, see `palu.data.collator.Collator`.
    """

    def __init__(self, collator: Callable[[list], Mapping[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not any(PREFIX + "input_ids" in row for row in features):
            return dict(self.collator(features))
        # Some of transformers' pad no other columns than a model's.
        bare = [{n: v for n, v in row.items() if not n.startswith(PREFIX)} for row in features]
        batch = dict(self.collator(bare))
        others = []
        for number, row in enumerate(features):
            labels = row.get(PREFIX + "labels", ())
            if all(label == IGNORE for label in labels[1:]):
                raise ValueError(
                    f"example {number} of the batch has no answer token in "
                    f"'{PREFIX}labels'; every row must have one"
                )
            others.append({"input_ids": row[PREFIX + "input_ids"], "labels": labels})
        return batch | {PREFIX + name: value for name, value in self.collator(others).items()}

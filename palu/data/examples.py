"""Tokenise and label many examples."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from palu.data.conversations import label_record
from palu.data.labels import LabeledExample
from palu.data.records import Example
from palu.data.spans import shown
from palu.data.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    template: Template | None = None,
    source: str | None = None,
) -> list[dict[str, Any]]:
    """Label many examples: dicts of `input_ids`, `labels`, `attention_mask` (lists of int) and
    `example_id`.

    There is one row an example, of a conversation longer than `max_length` several, one after the
    other: see `palu.data.conversations.label_conversation`. Examples, tokens and spans that are cut
    off are counted and warned of once, and so are conversations of several rows. `source` is what
    the warning calls the examples: their file.

    Raises:
        ValueError: no examples, or an example that cannot be labelled or of which no answer token
            is left within `max_length`; names its id.
        TypeError: as `label_example`.
    """
    if not examples:
        raise ValueError("examples must not be empty")
    for example in examples:
        if not isinstance(example, Example):
            raise TypeError(
                "examples must be a list of palu.Example, as load_examples gives them, got "
                f"{shown(example)} in it"
            )
    template = template or Template()
    labeled = [_label(example, tokenizer, max_length, template) for example in examples]
    pairs = list(zip(examples, labeled, strict=True))
    # A row without an answer that lost nothing has the spans of a user's last turn.
    without_answer = [
        example.id
        for example, rows in pairs
        if any(row.lost_tokens and row.answer_start == len(row["input_ids"]) for row in rows)
    ]
    if without_answer:
        names = ", ".join(map(repr, without_answer[:5]))
        names += ", ..." if len(without_answer) > 5 else ""
        raise ValueError(
            f"max_length={max_length} leaves no token of the answer in {len(without_answer)} of "
            f"{len(examples)} examples: {names}; raise max_length or shorten them"
        )
    if said := _losses(examples, labeled, max_length):
        warnings.warn(said if source is None else f"{source}: {said}", stacklevel=2)
    return [{**row, "example_id": example.id} for example, rows in pairs for row in rows]


def _label(
    example: Example, tokenizer: Any, max_length: int, template: Template
) -> list[LabeledExample]:
    try:
        return label_record(tokenizer, example, max_length, template)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"example {example.id!r}: {error}") from error


def _losses(
    examples: Sequence[Example], labeled: Sequence[Sequence[LabeledExample]], max_length: int
) -> str:
    """Return what is lost to `max_length`, in a line; empty where nothing is."""
    parts = []
    tokens = [sum(row.lost_tokens for row in rows) for rows in labeled]
    if any(tokens):
        at_least = "at least " if any(row.too_long for rows in labeled for row in rows) else ""
        said = f"{sum(map(bool, tokens))} of {len(examples)} examples are cut at max_length="
        parts.append(f"{said}{max_length}: {at_least}{sum(tokens)} tokens are left out")
    spans = [sum(row.lost_spans for row in rows) for rows in labeled]
    if any(spans):
        total = sum(len(some) for example in examples for _, some in example.texts)
        said = f"{sum(spans)} of {total} spans, in {sum(map(bool, spans))} of {len(examples)} "
        parts.append(f"{said}examples, lost tokens to max_length={max_length}")
    long = [rows for rows in labeled if any(row.left_out for row in rows)]
    if long:
        said = f"{len(long)} of {len(examples)} conversations are longer than max_length="
        said += f"{max_length} and became {sum(map(len, long))} rows, in which earlier turns are "
        parts.append(said + "left out of the context")
    return "; ".join(parts)

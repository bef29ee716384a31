"""Tokenise and label many examples."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from palu.data.labels import label_without_warning
from palu.data.records import Example
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
    """Apply `label_example` to many: dicts of `input_ids`, `labels`, `attention_mask` (lists of
    int) and `example_id`.

    Examples, tokens and spans that are cut off at `max_length` are counted and warned of once.
    `source` is what the warning calls the examples: their file.

    Raises:
        ValueError: no examples, or an example that cannot be labelled or of which no answer token
            is left within `max_length`; names its id.
        TypeError: as `label_example`.
    """
    if not examples:
        raise ValueError("examples must not be empty")
    rows, without_answer = [], []
    lost_spans = rows_with_loss = cut = lost_tokens = 0
    at_least = ""
    for example in examples:
        if example.turns:
            raise ValueError(f"example {example.id!r}: conversations cannot be labelled yet")
        try:
            labeled = label_without_warning(
                tokenizer,
                example.question,
                example.answer,
                example.spans,
                max_length,
                template or Template(),
            )
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"example {example.id!r}: {error}") from error
        if labeled.answer_start == len(labeled["input_ids"]):
            without_answer.append(example.id)
        cut += labeled.lost_tokens > 0
        lost_tokens += labeled.lost_tokens
        at_least = "at least " if labeled.too_long else at_least
        lost_spans += labeled.lost_spans
        rows_with_loss += labeled.lost_spans > 0
        rows.append({**labeled, "example_id": example.id})
    if without_answer:
        names = ", ".join(map(repr, without_answer[:5]))
        names += ", ..." if len(without_answer) > 5 else ""
        raise ValueError(
            f"max_length={max_length} leaves no token of the answer in {len(without_answer)} of "
            f"{len(rows)} examples: {names}; raise max_length or shorten them"
        )
    if cut:
        said = "" if source is None else f"{source}: "
        said += f"{cut} of {len(rows)} examples are cut at max_length={max_length}: "
        said += f"{at_least}{lost_tokens} tokens are left out"
        if lost_spans:
            total = sum(len(example.spans) for example in examples)
            said += f"; {lost_spans} of {total} spans, in {rows_with_loss} of {len(rows)} "
            said += f"examples, lost tokens to max_length={max_length}"
        warnings.warn(said, stacklevel=2)
    return rows

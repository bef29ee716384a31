"""One record of a data file, checked field by field, becomes an `Example`."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from palu.spans import Span, check_spans, check_text

__all__ = ["Example", "parse_record"]


@dataclasses.dataclass(frozen=True)
class Example:
    """A question with its answer, or a plain document, and the sensitive parts of it.

    Attributes:
        id: stable name: the record's own, or its row number in the file.
        question: None for a plain document.
        answer: the answer; the text of a plain document.
        spans: sensitive `(start, end)` character ranges of `answer`, sorted.
        extra: the record's remaining fields, untouched.
    """

    id: str
    question: str | None
    answer: str
    spans: tuple[Span, ...] = ()
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def parse_record(record: Any, row: int, *, require_spans: bool) -> tuple[Example, list[Span]]:
    """The example in `record`, row `row` of its file, and its spans in the order they were given.

    Raises:
        TypeError, ValueError: what is wrong, with the name of the field. (The caller adds file and
        row.)
    """
    if not isinstance(record, Mapping):
        raise TypeError(f"a record must be an object with fields, got {type(record).__name__}")
    # Tables fill absent fields with None, so None means absent.
    rest = {key: value for key, value in record.items() if key not in _FIELDS}
    fields = {key: record.get(key) for key in _FIELDS}
    if fields["answer"] is None and fields["text"] is not None:
        if fields["question"] is not None:
            raise ValueError(
                "field 'answer' is missing beside 'question' (a plain document has 'text' alone)"
            )
        question, answer = None, _text("text", fields["text"])
    else:
        for name in ("question", "answer"):
            if fields[name] is None:
                raise ValueError(f"field {name!r} is missing (or 'text' for a plain document)")
        question, answer = _text("question", fields["question"]), _text("answer", fields["answer"])
        if fields["text"] is not None:
            rest["text"] = fields["text"]
    if not answer.strip():
        raise ValueError(f"field {'answer' if question is not None else 'text'!r} is empty")
    spans = _spans(fields, answer, require_spans)
    example = Example(_id(fields["id"], row), question, answer, tuple(sorted(spans)), rest)
    return example, spans


_FIELDS = ("id", "question", "answer", "text", "spans", "target_words")


def _text(name: str, value: Any) -> str:
    return check_text(f"field {name!r}", value)


def _id(value: Any, row: int) -> str:
    if value is None:
        return str(row)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise TypeError(f"field 'id' must be a string or an integer, got {value!r}")
    return str(value)


def _spans(fields: Mapping[str, Any], answer: str, required: bool) -> list[Span]:
    given = [name for name in ("spans", "target_words") if fields[name] is not None]
    if not given:
        if required:
            raise ValueError("field 'spans' is missing (or 'target_words', the released format)")
        return []
    if len(given) == 2:
        raise ValueError("fields 'spans' and 'target_words' are both given: which one holds?")
    name, value = given[0], fields[given[0]]
    if name == "target_words" and isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"field 'target_words' is not JSON: {error}") from None
    if (
        isinstance(value, Mapping)
        and value
        and all(isinstance(part, list) for part in value.values())
    ):
        # `datasets` may store a list of objects as an object of lists.
        lengths = {len(part) for part in value.values()}
        if len(lengths) > 1:
            raise ValueError(f"field {name!r} has lists of different lengths: {value!r}")
        value = [
            dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)
        ]
    try:
        spans = check_spans(answer, value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"field {name!r}: {error}") from None
    for number, (span, (start, end)) in enumerate(zip(value, spans, strict=True)):
        word = span.get("word") if isinstance(span, Mapping) else None
        if word is not None and word != answer[start:end]:
            raise ValueError(
                f"field {name!r}: spans[{number}] says {word!r}, but [{start}, {end}) of the "
                f"answer is {answer[start:end]!r}"
            )
        if word is None and name == "target_words":
            raise ValueError(f"field {name!r}: spans[{number}] has no 'word': {span!r}")
    return spans

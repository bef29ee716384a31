"""Parse one record of a data file, field by field, into an `Example`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from palu.data.spans import CHARACTERS, UNITS, Span, check_spans, check_text, recount, shown
from palu.storage.json_files import NotJSON, parse


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


def parse_record(record: Any, row: int, *, require_spans: bool) -> tuple[Example, list[Span], str]:
    """Parse row `row` of a file: the example, its spans in the order they were given, and what
    their offsets count in the file (one of `palu.data.spans.UNITS`).

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
    spans, unit = _spans(fields, answer, require_spans)
    example = Example(_id(fields["id"], row), question, answer, tuple(sorted(spans)), rest)
    return example, spans, unit


_FIELDS = ("id", "question", "answer", "text", "spans", "target_words")


def _text(name: str, value: Any) -> str:
    return check_text(f"field {name!r}", value)


def _id(value: Any, row: int) -> str:
    if value is None:
        return str(row)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise TypeError(f"field 'id' must be a string or an integer, got {shown(value)}")
    return check_text("field 'id'", str(value))


def _spans(fields: Mapping[str, Any], answer: str, required: bool) -> tuple[list[Span], str]:
    given = [name for name in ("spans", "target_words") if fields[name] is not None]
    if not given:
        if required:
            raise ValueError("field 'spans' is missing (or 'target_words', the released format)")
        return [], CHARACTERS
    if len(given) == 2:
        raise ValueError("fields 'spans' and 'target_words' are both given: which one holds?")
    name, value = given[0], _as_list(given[0], fields[given[0]])
    try:
        unit, placed = _placed(answer, value)
        spans = check_spans(answer, placed)
    except (TypeError, ValueError) as error:
        raise ValueError(f"field {name!r}: {error}") from None
    for number, (span, (start, end)) in enumerate(zip(value, spans, strict=True)):
        for text in _said(span):
            if not _stands(answer, start, end, text):
                raise ValueError(
                    f"field {name!r}: spans[{number}] says {shown(text)}, but [{start}, {end}) of "
                    f"the answer is {shown(answer[start:end])}"
                )
        if name == "target_words" and span.get("word") is None:
            raise ValueError(f"field {name!r}: spans[{number}] has no 'word': {shown(span)}")
    return spans, unit


def _as_list(name: str, value: Any) -> Any:
    """Return the spans of a field as a list: the released format is JSON text, and `datasets` may
    store a list of objects as an object of lists."""
    if name == "target_words" and isinstance(value, str):
        try:
            value = parse(value)
        except NotJSON as error:
            raise ValueError(f"field 'target_words' is not JSON: {error}") from None
    lists = list(value.values()) if isinstance(value, Mapping) else []
    if not lists or not all(isinstance(part, list) for part in lists):
        return value
    if len({len(part) for part in lists}) > 1:
        raise ValueError(f"field {name!r} has lists of different lengths: {shown(value)}")
    return [dict(zip(value, parts, strict=True)) for parts in zip(*lists, strict=True)]


def _said(span: Any) -> list[Any]:
    """Return the texts that a span says it covers."""
    if not isinstance(span, Mapping):
        return []
    return [span[key] for key in ("word", "text") if span.get(key) is not None]


def _stands(answer: str, start: int, end: int, text: Any) -> bool:
    return isinstance(text, str) and len(text) == end - start and answer.startswith(text, start)


def _placed(answer: str, value: Any) -> tuple[str, Any]:
    """Return the unit in which every span of a row covers the text that it says, and the spans
    in characters. Characters where there is none: then `value` as it is, for messages."""
    if answer.isascii() or not isinstance(value, Sequence) or not any(map(_said, value)):
        return CHARACTERS, value
    for unit in UNITS:
        try:
            spans = recount(answer, value, unit)
        except (TypeError, ValueError):
            continue
        pairs = zip(value, spans, strict=True)
        if all(_stands(answer, *ends, text) for span, ends in pairs for text in _said(span)):
            return unit, spans
    return CHARACTERS, value

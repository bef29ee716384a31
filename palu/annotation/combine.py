"""Run annotators over records, and write what they found into them."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from palu.annotation.base import Annotator, Found, Text, texts_of
from palu.annotation.terms import Terms
from palu.data.records import Example, parse_record
from palu.data.spans import as_objects, shown

FORMAT = "palu-annotation/1"
GIVEN = "given"  # who found a span that was in the record before and does not say it


@dataclasses.dataclass(frozen=True)
class Annotated:
    """Records with the spans that were found.

    Attributes:
        records: the records as they were, with `spans`.
        summary: what `annotation.json` keeps: counts and settings, none of the texts.
    """

    records: list[dict[str, Any]]
    summary: dict[str, Any]


def annotate(
    records: Iterable[Mapping[str, Any] | tuple[Mapping[str, Any], str]],
    *,
    annotators: Sequence[Annotator],
    replace: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> Annotated:
    """Return the records with the spans that the annotators find in them.

    Spans that overlap become one, of all the annotators that found a part of it, with the highest
    score. Spans that the records have already stay.

    Args:
        records: objects as `palu.load_examples` reads them, alone or with where each stands (for
            messages), as `palu.data.files.load_records` returns them.
        annotators: one or more, each of another name.
        replace: drop the spans that the records have.
        report: called with how many records are done, and of how many.

    Raises:
        TypeError, ValueError: a record that cannot be read, with where it stands and the field; no
            annotator, or two of one name; an annotator that gives a span outside its text.
    """
    names = [annotator.name for annotator in annotators]
    if not names or len({*names}) < len(names):
        raise ValueError(f"annotators must be one or more, each of another name, got {names}")
    rows, examples, given = [], [], []
    for number, item in enumerate(records):
        record, where = item if isinstance(item, tuple) else (item, f"record {number}")
        try:
            example, marks = read_marks(record, number)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None
        rows.append(dict(record))
        examples.append(example)
        given.append([] if replace else marks)
    found = [_found(annotator, examples, report) for annotator in annotators]
    marked = [
        merge([*old, *(mark for marks in new for mark in marks)])
        for old, *new in zip(given, *found, strict=True)
    ]
    done = [
        with_marks(record, example, marks)
        for record, example, marks in zip(rows, examples, marked, strict=True)
    ]
    counts = _counts(examples, marked)
    terms = [annotator for annotator in annotators if isinstance(annotator, Terms)]
    counts["terms"] = sum(len(one.terms) for one in terms)
    counts["terms_not_found"] = sum(len(one.not_found) for one in terms)
    counts["records_aside"] = sum(len(one.aside) for one in terms)
    settings = {name: annotator.settings for name, annotator in zip(names, annotators, strict=True)}
    return Annotated(
        done, {"format": FORMAT, **counts, "settings": {**settings, "replace": replace}}
    )


@dataclasses.dataclass(frozen=True)
class Mark:
    """A span in one text of a record, found by one annotator or several.

    Attributes:
        text: which of the record's texts.
        by: the names of those who found it; empty for a span that was there before and does not
            say it.
        extra: what else the span says: its kind, and what one that was there before had.
    """

    text: int
    start: int
    end: int
    by: tuple[str, ...] = ()
    score: float | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def merge(marks: Iterable[Mark]) -> list[Mark]:
    """Return the marks of a record in order, those that overlap as one."""
    merged: list[Mark] = []
    for mark in sorted(marks, key=_place):
        last = merged[-1] if merged else None
        if last is None or mark.text != last.text or mark.start >= last.end:
            merged.append(mark)
            continue
        scores = [m.score for m in (last, mark) if m.score is not None]
        start, end = last.start, max(last.end, mark.end)
        extra = {**mark.extra, **last.extra}
        # Nobody has looked at a span that has grown since.
        if (start, end) not in [(m.start, m.end) for m in (last, mark) if m.extra.get("reviewed")]:
            extra.pop("reviewed", None)
        by = tuple(dict.fromkeys([*(last.by or [GIVEN]), *(mark.by or [GIVEN])]))
        merged[-1] = Mark(mark.text, start, end, by, max(scores, default=None), extra)
    return merged


def read_marks(record: Any, row: int) -> tuple[Example, list[Mark]]:
    """Return a record's example, without spans, and the spans that it has, in order.

    Raises:
        TypeError, ValueError: what is wrong, with the field.
    """
    example, marked = parse_record(record, row, require_spans=False)
    # A span in its question makes a record a conversation; without spans it is what it was.
    bare = {key: value for key, value in record.items() if key not in ("spans", "target_words")}
    plain, _ = parse_record(bare, row, require_spans=False)
    said = _said(record, len(marked))
    marks = [
        _given(number, *ends, span)
        for number, (text, spans) in enumerate(zip(marked, said, strict=True))
        for ends, span in itertools.zip_longest(text.spans, spans[: len(text.spans)])
    ]
    return plain.with_spans([() for _ in example.texts]), sorted(marks, key=_place)


def _place(mark: Mark) -> tuple[int, int, int]:
    return mark.text, mark.start, mark.end


def _said(record: Mapping[str, Any], count: int) -> list[list[Any]]:
    """Return the spans of each of a record's texts as they stand in it; empty where they are in
    another form."""
    said: list[list[Any]] = [[] for _ in range(count)]
    for number, message in enumerate(record.get("messages") or ()):
        inside = as_objects("spans", message.get("spans"))
        said[number] += inside if isinstance(inside, list) else []
    spans = as_objects("spans", record.get("spans"))
    for span in spans if isinstance(spans, list) else ():
        text = count - 1
        if isinstance(span, Mapping):
            text = 0 if span.get("field") == "question" else span.get("turn", text)
        said[count - 1 if text is None else text].append(span)
    return said


def _given(text: int, start: int, end: int, span: Any) -> Mark:
    """Return the mark of a span that a record has, and says more of than its place."""
    said = dict(span) if isinstance(span, Mapping) else {}
    by, score = said.pop("annotator", None), said.pop("score", None)
    names = tuple(by.split("+")) if isinstance(by, str) and by else ()
    score = float(score) if isinstance(score, int | float) else None
    extra = {key: one for key, one in said.items() if key not in _PLACE and one is not None}
    return Mark(text, start, end, names, score, extra)


_PLACE = ("start", "end", "text", "word", "turn", "field")


def _found(
    annotator: Annotator, examples: list[Example], report: Callable[[int, int], None] | None
) -> list[list[Mark]]:
    marks: list[list[Mark]] = []
    for example, spans in zip(examples, annotator.find(examples), strict=True):
        texts = texts_of(example)
        marks.append([_mark(annotator.name, texts, Found(*span)) for span in spans])
        if report is not None:
            report(len(marks), len(examples))
    return marks


def _mark(name: str, texts: list[Text], span: Found) -> Mark:
    if not (
        0 <= span.text < len(texts)
        and 0 <= span.start < span.end <= len(texts[span.text].content)
        and texts[span.text].content[span.start : span.end].strip()
    ):
        raise ValueError(f"annotator {name!r} gave {shown(tuple(span))}, which is no span")
    kind = {"kind": span.kind} if span.kind else {}
    return Mark(span.text, span.start, span.end, (name,), round(float(span.score), 4), kind)


def with_marks(
    record: Mapping[str, Any], example: Example, marks: Iterable[Mark]
) -> dict[str, Any]:
    """Return a record with these spans, and none of those that it had.

    Args:
        example: of `read_marks`.
    """
    record = {key: value for key, value in record.items() if key != "target_words"}
    if example.turns:
        record["messages"] = [
            {key: value for key, value in message.items() if key != "spans"}
            for message in record["messages"]
        ]
    return record | {"spans": [span_of(example, mark) for mark in marks]}


def span_of(example: Example, mark: Mark) -> dict[str, Any]:
    """Return a mark as a record has it."""
    texts = texts_of(example)
    span: dict[str, Any] = {"start": mark.start, "end": mark.end}
    span["text"] = texts[mark.text].content[mark.start : mark.end]
    if example.turns:
        span["turn"] = mark.text
    elif mark.text < len(texts) - 1:
        span["field"] = "question"
    span |= {key: value for key, value in mark.extra.items() if key not in span}
    if mark.by:
        span["annotator"] = "+".join(mark.by)
    if mark.score is not None:
        span["score"] = mark.score
    return span


def _counts(examples: list[Example], marked: list[list[Mark]]) -> dict[str, Any]:
    flat = [
        (texts_of(example)[mark.text], mark)
        for example, marks in zip(examples, marked, strict=True)
        for mark in marks
    ]
    return {
        "records": len(examples),
        "records_with_spans": sum(map(bool, marked)),
        "spans": len(flat),
        "spans_in_answers": sum(text.answer for text, _ in flat),
        "by_annotator": dict(Counter(name for _, mark in flat for name in mark.by or [GIVEN])),
    }

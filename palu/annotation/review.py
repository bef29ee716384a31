"""Review annotated records: a page for a browser, and questions in a terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

from palu.annotation.base import Text, texts_of
from palu.annotation.combine import Mark, merge, read_marks, span_of, with_marks
from palu.annotation.output import check_records, to_json
from palu.data.records import Example

# `</script>` and `<!--` would end the element that the data stand in; JavaScript's line separators
# are escaped for readers that cut lines there.
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def review_page(records: Iterable[tuple[Mapping[str, Any], str]], name: str) -> str:
    """Return one HTML page that shows records with their spans, switches spans on and off, marks
    others, and downloads the corrected records as JSON lines.

    The page has all in it and loads nothing. Texts of records are data in it, never markup.

    Args:
        records: as `palu.data.files.load_records` returns them.
        name: what the page calls the file.

    Raises:
        ValueError, TypeError: a record that cannot be read, or written as JSON.
    """
    shown = [_shown(record, example, marks) for record, example, marks in _read(records)]
    stem = name.rsplit("/", 1)[-1].removesuffix(".jsonl")
    content = {"name": name, "download": f"{stem}.reviewed.jsonl", "records": shown}
    data = to_json(content).translate(_ESCAPES)
    page = resources.files("palu.annotation").joinpath("review.html").read_text("utf-8")
    before, after = page.split("{{data}}")
    return before + data + after


def _read(
    records: Iterable[tuple[Mapping[str, Any], str]],
) -> list[tuple[Mapping[str, Any], Example, list[Mark]]]:
    read = []
    records = list(records)
    check_records(records)
    for number, (record, where) in enumerate(records):
        try:
            example, marks = read_marks(record, number)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None
        read.append((record, example, merge(marks)))
    return read


def _shown(record: Mapping[str, Any], example: Example, marks: Sequence[Mark]) -> dict[str, Any]:
    bare = with_marks(record, example, [])
    del bare["spans"]
    texts = texts_of(example)
    place = [span_of(example, Mark(n, 0, 0)) for n in range(len(texts))]
    return {
        "id": example.id,
        "raw": to_json(bare),
        "texts": [text._asdict() for text in texts],
        "places": [{k: v for k, v in one.items() if k in ("turn", "field")} for one in place],
        "spans": [
            {
                "text": mark.text,
                "start": mark.start,
                "end": mark.end,
                "by": list(mark.by),
                "score": mark.score,
                "kind": mark.extra.get("kind"),
                "raw": to_json(span_of(example, mark)),
            }
            for mark in marks
        ],
    }


class Review:
    """Records whose spans are kept or dropped one by one.

    A span that was kept says so (`"reviewed": true`), one that was dropped is gone: what was
    written goes on where it stopped.

    Args:
        records: as `palu.data.files.load_records` returns them.
        written: what an earlier review of them wrote; None where there is none.
        name: of the file that has it, for messages.

    Attributes:
        absent: how many spans of `records` are in no span of what was written: they were dropped
            then, or have been found since.

    Raises:
        ValueError, TypeError: a record that cannot be read; `written` has other records.
    """

    def __init__(
        self,
        records: Sequence[tuple[Mapping[str, Any], str]],
        written: Sequence[tuple[Mapping[str, Any], str]] | None = None,
        name: str = "",
    ) -> None:
        self._rows, self.absent = _read(records), 0
        if written is not None:
            given, self._rows = self._rows, _read(written)
            texts = [[texts_of(example) for _, example, _ in rows] for rows in (given, self._rows)]
            if texts[0] != texts[1]:
                raise ValueError(
                    f"{name}: exists and is no review of these records; name another file, or add "
                    "--overwrite to begin anew"
                )
            self.absent = sum(
                not any(_holds(one, mark) for one in now)
                for (_, _, before), (_, _, now) in zip(given, self._rows, strict=True)
                for mark in before
            )
        self.kept = self.dropped = 0

    def open(self) -> Iterator[tuple[Example, Text, Mark]]:
        """Yield the spans that nobody has looked at, in order; `decide` may be called meanwhile."""
        for _, example, marks in self._rows:
            texts = texts_of(example)
            for mark in list(marks):
                if mark in marks and not mark.extra.get("reviewed"):
                    yield example, texts[mark.text], mark

    def decide(self, example: Example, mark: Mark, *, keep: bool, every: bool = False) -> None:
        """Keep or drop a span of `open`; with `every`, all open ones of the same text too."""
        wanted = texts_of(example)[mark.text].content[mark.start : mark.end]
        for _, other, marks in self._rows:
            if not every and other is not example:
                continue
            texts = texts_of(other)
            for number, one in reversed([*enumerate(marks)]):
                same = every and texts[one.text].content[one.start : one.end] == wanted
                if one.extra.get("reviewed") or not (one is mark or same):
                    continue
                if keep:
                    marks[number] = dataclasses.replace(one, extra={**one.extra, "reviewed": True})
                else:
                    del marks[number]
                self.kept, self.dropped = self.kept + keep, self.dropped + (not keep)

    def records(self) -> list[dict[str, Any]]:
        """Return the records with the spans that were kept, and those that are open."""
        return [with_marks(record, example, marks) for record, example, marks in self._rows]


def _holds(outer: Mark, inner: Mark) -> bool:
    return outer.text == inner.text and outer.start <= inner.start and inner.end <= outer.end

"""Write annotated records, and show what was found without showing it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from palu.data.spans import shown
from palu.storage.files import new_file

NAMES = {
    "given": "there before",
    "terms": "values to erase",
    "pii": "kinds of personal data",
    "contrast": "what only this model expects",
    "all": "whole answers",
}


def write_records(path: str | os.PathLike[str], records: Sequence[Mapping[str, Any]]) -> None:
    """Write records as JSON lines; the file is whole or absent.

    Raises:
        TypeError, ValueError: a value that JSON does not have, with its record.
    """
    numbered = [(record, f"record {number}") for number, record in enumerate(records)]
    lines = list(_lines(numbered))
    with new_file(path) as file:
        file.writelines(line + "\n" for line in lines)


def check_records(records: Iterable[tuple[Mapping[str, Any], str]]) -> None:
    """Check that records can be written, before work that would be lost.

    Args:
        records: as `palu.data.files.load_records` returns them.

    Raises:
        TypeError, ValueError: as `write_records`; says where the record stands.
    """
    for _ in _lines(records):
        pass


def _lines(records: Iterable[tuple[Mapping[str, Any], str]]) -> Iterator[str]:
    for record, where in records:
        try:
            yield to_json(record)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where} cannot be written as JSON: {error}") from None


def to_json(value: Any) -> str:
    """Return what a record or span holds as JSON in one line. Halves of surrogate pairs, which
    UTF-8 does not have, are written as JSON escapes them."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    return _HALVES.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


_HALVES = re.compile("[\ud800-\udfff]")


def _plain(value: Any) -> Any:
    """Return what tables hold (numbers and lists of numpy, dates) as JSON has it."""
    for name in ("tolist", "isoformat"):
        if hasattr(value, name):
            return getattr(value, name)()
    raise TypeError(f"it holds {shown(value)}, a {type(value).__name__}")


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Return the counts of an annotation's summary as a table."""
    table = Table("annotation", title_justify="left")
    table.add_column("", justify="right")
    records, spans = summary["records"], summary["spans"]
    table.add_row("records", str(records))
    table.add_row("  with spans", str(summary["records_with_spans"]))
    table.add_row("  without", str(records - summary["records_with_spans"]), end_section=True)
    table.add_row("spans", str(spans))
    table.add_row("  in answers", str(summary["spans_in_answers"]))
    others = spans - summary["spans_in_answers"]
    table.add_row("  in questions and other turns", str(others), end_section=True)
    for name, count in summary["by_annotator"].items():
        table.add_row(f"spans by {name} ({NAMES.get(name, 'an annotator')})", str(count))
    if summary["terms"]:
        table.add_section()
        table.add_row("values looked for", str(summary["terms"]))
        table.add_row("  found nowhere", str(summary["terms_not_found"]))
    return table

"""Read examples, and records as they stand, from whatever `palu.data.sources` opens."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from palu.data.annotations import Audit
from palu.data.columns import DOCUMENT, QA, Layout, canonical, parse_columns
from palu.data.corpora import fits_tokens
from palu.data.records import Example, parse_record
from palu.data.sources import local_path, name_of, open_source, split_slice
from palu.data.spans import integer, shown

__all__ = ["load_examples", "load_records", "local_path", "name_of", "split_slice"]

Columns = Mapping[str, str] | str | None


def load_examples(
    source: Any,
    *,
    require_spans: bool,
    repair: Literal["none", "snap"] = "none",
    limit: int | None = None,
    columns: Columns = None,
    tokenizer: Any = None,
    max_length: int | None = None,
) -> list[Example]:
    """Read examples. Every row is read or is an error: none is dropped.

    Records have `question` and `answer`, `messages`, or `text` alone for a plain document, or one
    of the other layouts that `palu.data.columns` knows; and `spans`: `[{"start": s, "end": e}]` (or
    `[[s, e]]`), character offsets into the answer. The released annotation format is read too:
    `target_words`, a JSON string of `[{"word": w, "start": s, "end": e}]`. Where a span says what
    it covers (`text` or `word`) it must be so; a row whose offsets count UTF-16 code units or UTF-8
    bytes is known by that, and its spans are placed by them. `palu evaluate` also reads
    `paraphrased_answer` (a text) and `perturbed_answer` (a list of wrong texts), as TOFU has them.
    Fields that are not used stay in `Example.extra`.

    One warning a source tells how many spans or rows look wrong (they are accepted), and what was
    repaired.

    Args:
        source: a file of JSON lines, JSON (a list of records), CSV, TSV, Parquet or plain text,
            each also as `.gz`; a folder that `datasets.load_from_disk` reads; the id of a data set
            on the hub (`org/name:split` or `org/name/config:split`); a `datasets.Dataset`, a
            DataFrame or a list of dicts. A name may end in a slice of rows: `PATH[-40:]`,
            `PATH[:120]`, `PATH[0:10]`. The format is the one that the file's ending names; JSON
            where that is none that is known.
        require_spans: whether each record must have its spans field (which may be an empty list).
        repair: "snap" moves span ends out to whole words and merges overlapping spans.
        limit: read at most so many rows of the slice.
        columns: field -> column, for layouts that are not known: `{"question": "q", "answer": "a"}`
            (or `"question=q,answer=a"`).
        tokenizer, max_length: plain text is cut into overlapping windows of at most so many tokens;
            without them of `palu.data.corpora.WINDOW_BYTES` bytes.

    Raises:
        ValueError, TypeError: no such file, an empty one or an empty slice, a file of another
            format than its name says, a malformed line, rows of several layouts, a missing field,
            one of the wrong type, a span outside the answer or that is not the word it says, an id
            that two rows have. Names file, row and field.
    """
    if not isinstance(require_spans, bool):
        raise TypeError(f"require_spans must be True or False, not {require_spans!r}")
    if repair not in ("none", "snap"):
        raise ValueError(f"repair must be 'none' or 'snap', got {repair!r}")
    if (tokenizer is None) != (max_length is None):
        raise ValueError("tokenizer and max_length must be given together, or neither")
    fits = None if max_length is None else fits_tokens(tokenizer, max_length)
    audit = Audit()
    examples, row_of_id = [], {}
    for row, record, where in _records(source, columns, limit, fits):
        try:
            example, marked = parse_record(record, row, require_spans=require_spans)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None
        if example.id in row_of_id:
            raise ValueError(
                f"{where}: field 'id' is {shown(example.id)}, which row "
                f"{row_of_id[example.id]} has already: ids must differ (rename or "
                "remove the field to use row numbers)"
            )
        row_of_id[example.id] = row
        if require_spans or any(text.spans for text in marked):
            audit.add_row(example, marked)
        if repair == "snap":
            example = audit.snap(example)
        examples.append(example)
    if summary := audit.summary():
        warnings.warn(
            f"{name_of(source)}: {len(examples)} rows with {audit.spans} spans: {summary}",
            stacklevel=2,
        )
    return examples


def load_records(
    source: Any,
    columns: Columns = None,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
) -> list[tuple[dict[str, Any], str]]:
    """Read records with all that they hold, and where each stands, for messages.

    They have the fields that `load_examples` reads, whatever their layout was: `question` and
    `answer`, `messages` (a list of `role` and `content`) or `text`; what they had under other names
    is there under these, and everything else as it was. Spans and ids are not looked at.

    Args:
        source, columns, tokenizer, max_length: as in `load_examples`.

    Raises:
        ValueError, TypeError: as `load_examples`.
    """
    if (tokenizer is None) != (max_length is None):
        raise ValueError("tokenizer and max_length must be given together, or neither")
    fits = None if max_length is None else fits_tokens(tokenizer, max_length)
    return [(record, where) for _, record, where in _records(source, columns, None, fits)]


def _records(
    source: Any, columns: Columns, limit: int | None, fits: Any
) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Yield row, record and location of the rows that are wanted."""
    if limit is not None and integer("limit", limit) < 1:
        raise ValueError(f"limit must be 1 or more, or None, got {limit}")
    columns = parse_columns(columns)
    opened, rows = open_source(source, fits)
    if not opened.count:
        raise ValueError(f"{opened.name}: holds no rows")
    chosen = range(opened.count)[rows][:limit]
    if not chosen:
        raise ValueError(
            f"{name_of(source)}: the slice takes none of the {opened.count} rows of {opened.name}"
        )
    first: tuple[int, Layout] | None = None
    for row in chosen:
        record, where = opened.read(row)
        try:
            record, layout = canonical(record, columns, opened.format)
            if layout is not None:
                first = first or (row, layout)
                _check_same(layout, first)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None
        yield row, record, where


def _check_same(layout: Layout, first: tuple[int, Layout]) -> None:
    """Raise ValueError where a record has another layout than the first one. Questions with answers
    and plain documents may stand in one file."""
    if layout is not first[1] and {layout, first[1]} != {QA, DOCUMENT}:
        raise ValueError(
            f"has {layout} and row {first[0]} has {first[1]}: all rows of a file must have one "
            "layout"
        )

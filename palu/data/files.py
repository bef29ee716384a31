"""Read examples from JSON files and folders of `datasets`."""

import os
import re
import warnings
from collections.abc import Callable
from typing import Any, Literal

from palu.data.annotations import Audit
from palu.data.records import Example, parse_record
from palu.data.spans import integer, shown
from palu.errors import one_line
from palu.storage.json_files import NotJSON, look, parse, read_text


def load_examples(
    path: str | os.PathLike[str],
    *,
    require_spans: bool,
    repair: Literal["none", "snap"] = "none",
    limit: int | None = None,
) -> list[Example]:
    """Read examples from a file or folder. Every row is read or is an error: none is dropped.

    Records have `question` and `answer`, `messages` (a conversation, of which every message of the
    assistant is an answer), or `text` alone for a plain document, and `spans`: `[{"start": s,
    "end": e}]` (or `[[s, e]]`), character offsets into the answer; with `"field": "question"` into
    the question, with `"turn": i` into message i (from 0). A message may have `spans` itself. The
    released annotation format is read too: `target_words`, a JSON string of `[{"word": w, "start":
    s, "end": e}]`. Where a span says what it covers (`text` or `word`) it must be so; a text whose
    offsets count UTF-16 code units or UTF-8 bytes is known by that, and its spans are placed by
    them.
    `palu evaluate` also reads `paraphrased_answer` (a text) and `perturbed_answer` (a list of
    wrong texts), as TOFU has them. Fields that are not used stay in `Example.extra`.

    One warning a file tells how many spans or rows look wrong (they are accepted), and what was
    repaired.

    Args:
        path: a `.json` or `.jsonl` file of JSON lines (or one JSON list), or a folder that
            `datasets.load_from_disk` reads. May end in a slice of rows: `PATH[-40:]`, `PATH[:120]`,
            `PATH[0:10]`.
        require_spans: whether each record must have its spans field (which may be an empty list).
        repair: "snap" moves span ends out to whole words and merges overlapping spans.
        limit: read at most so many rows of the slice.

    Raises:
        ValueError: no such file, an empty file or slice, a malformed line, a missing field, one of
            the wrong type, a span outside the answer or that is not the word it says, an id that
            two rows have. Names file, row and field.
    """
    if repair not in ("none", "snap"):
        raise ValueError(f"repair must be 'none' or 'snap', got {repair!r}")
    if limit is not None and integer("limit", limit) < 1:
        raise ValueError(f"limit must be 1 or more, or None, got {limit}")
    file, rows = split_slice(os.fspath(path))
    count, read = _open_folder(file) if os.path.isdir(file) else _open_file(file)
    if not count:
        raise ValueError(f"{file}: holds no rows")
    chosen = range(count)[rows][:limit]
    if not chosen:
        raise ValueError(f"{path}: the slice takes none of the {count} rows of {file}")

    audit = Audit()
    examples, row_of_id = [], {}
    for row in chosen:
        record, where = read(row)
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
            f"{os.fspath(path)}: {len(examples)} rows with {audit.spans} spans: {summary}",
            stacklevel=2,
        )
    return examples


# The number of rows, and a function from a row to its record and its location for messages.
_Reader = tuple[int, Callable[[int], tuple[Any, str]]]


def split_slice(path: str) -> tuple[str, slice]:
    """Split `PATH[-40:]` into the file or folder, which exists, and the rows to take of it. Raises
    ValueError where there is no such file, or the slice has another form."""
    if os.path.exists(path):
        look(path, folder=True)
        return path, slice(None)
    file, rows = path, slice(None)
    if path.endswith("]") and "[" in path:
        match = re.fullmatch(r"(.+)\[(-?\d{1,18})?:(-?\d{1,18})?\]", path, flags=re.DOTALL)
        if not match:
            raise ValueError(
                f"{one_line(path, 200)}: a slice of rows looks like [-40:], [:120] or [0:10]"
            )
        file = match[1]
        rows = slice(*(None if end is None else int(end) for end in match.groups()[1:]))
    look(file, folder=True)
    return file, rows


def _open_file(file: str) -> _Reader:
    text = read_text(file)
    if text.lstrip().startswith("["):
        records = _decode(text, file, 1)
        return len(records), lambda row: (records[row], f"{file}, row {row}")
    # Only line feeds end a line of JSON lines: strings may hold other line separators as they are.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]

    def read(row: int) -> tuple[Any, str]:
        number, line = lines[row]
        return _decode(line, file, number), f"{file}:{number} (row {row})"

    return len(lines), read


def _decode(text: str, file: str, first_line: int) -> Any:
    try:
        return parse(text)
    except NotJSON as error:
        line = first_line + (error.line or 1) - 1
        raise ValueError(f"{file}:{line}: malformed JSON, {error}") from None


def _open_folder(folder: str) -> _Reader:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{folder}: reading a folder takes `datasets`: pip install datasets"
        ) from error
    try:
        table = datasets.load_from_disk(folder)
    except Exception as error:  # damaged files raise errors of many kinds
        raise ValueError(
            f"{folder}: not a folder that `datasets.load_from_disk` reads: {one_line(error)}"
        ) from error
    if not isinstance(table, datasets.Dataset):
        raise ValueError(
            f"{folder}: holds several splits, name one: "
            + ", ".join(f"{folder}/{name}" for name in table)
        )
    table = table.with_format(None)

    def read(row: int) -> tuple[Any, str]:
        try:
            return table[row], f"{folder}, row {row}"
        except Exception as error:
            raise ValueError(f"{folder}, row {row}: cannot be read: {one_line(error)}") from error

    return len(table), read

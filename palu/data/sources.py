"""Where records come from: files of every format, folders of `datasets`, the hub, Python objects.

What is opened here is a number of rows and a way to read each of them as it stands. Which of its
columns mean what: `palu.data.columns`. Nothing is kept anywhere: `datasets` would copy what it
reads into a cache of its own, and these records are to be forgotten.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from palu.data.corpora import Fits, windows
from palu.errors import one_line
from palu.storage.json_files import NotJSON, as_text, look, parse, read_bytes

JSON, LINES, PARQUET, PLAIN = "JSON", "JSON lines", "Parquet", "plain text"
CSV, TSV = "CSV (separated by commas)", "TSV (separated by tabs)"
FORMATS = {
    ".json": JSON,
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".csv": CSV,
    ".tsv": TSV,
    ".parquet": PARQUET,
    ".txt": PLAIN,
}
READ = "JSON lines, JSON, CSV, TSV, Parquet and plain text (.txt), each also as .gz"

_GZIP = b"\x1f\x8b"
_HUB = re.compile(r"(\w[\w.-]*/[\w.-]+)(?:/([\w.-]+))?:([\w.]+)")
_BAD_TABLE = "is not a table that can be read"


class Source(NamedTuple):
    """Rows that can be read, one at a time.

    Attributes:
        name: what messages call them.
        format: the format that was found, in words.
        count: how many rows there are.
        read: from a row's number to the record and where it stands, for messages.
    """

    name: str
    format: str
    count: int
    read: Callable[[int], tuple[Any, str]]


def open_source(source: Any, fits: Fits | None = None) -> tuple[Source, slice]:
    """Open what a user names, or hands over, and return it with the rows that are wanted of it.

    Args:
        source: a path or the id of a data set on the hub (`org/name:split` or
            `org/name/config:split`), both perhaps with a slice of rows; a `datasets.Dataset`, a
            DataFrame, or a list of records.
        fits: of plain text, see `palu.data.corpora.windows`.

    Raises:
        ValueError, TypeError: there is no such thing, or it is not what it should be.
    """
    if not isinstance(source, str | os.PathLike):
        return _open_object(source), slice(None)
    path, rows = split_slice(os.fspath(source))
    if not os.path.exists(path):
        return _open_hub(path), rows
    return (_open_folder(path) if os.path.isdir(path) else _open_file(path, fits)), rows


def split_slice(path: str) -> tuple[str, slice]:
    """Split `PATH[-40:]` into the file, folder or data set on the hub, and the rows to take of it.
    Raises ValueError where there is no such file and it is no id either, or the slice has another
    form."""
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
    if not is_hub_id(file):
        _look(file)
    return file, rows


def is_hub_id(name: str) -> bool:
    """Return whether a name is a data set's on the hub: `org/name:split`, where no file or folder
    `org/name` is here, which `datasets` would read, and copy into its cache."""
    match = _HUB.fullmatch(name)
    return match is not None and not any(map(os.path.lexists, (name, match[1])))


def local_path(source: Any) -> str | None:
    """Return the file or folder that is read, without its slice; None where it is none."""
    if not isinstance(source, str | os.PathLike):
        return None
    path, _ = split_slice(os.fspath(source))
    return path if os.path.exists(path) else None


def name_of(source: Any) -> str:
    """Return what messages call a source."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, Sequence):
        return "records"
    return f"the {type(source).__name__}"


def _look(file: str) -> None:
    try:
        look(file, folder=True)
    except ValueError as error:
        hint, before = "", file.rpartition(":")[0]
        if before and os.path.exists(before):
            hint = f" ({before} is here, and only data sets on the hub are named with a split)"
        elif _HUB.fullmatch(f"{file}:train") and not os.path.splitext(file)[1]:
            hint = f" (a data set on the hub is named with its split: {file}:train)"
        raise ValueError(f"{error}{'' if os.path.lexists(file) else hint}") from None


# ---- files ---------------------------------------------------------------------------------------


def _open_file(file: str, fits: Fits | None) -> Source:
    raw, name = read_bytes(file), file
    if file.lower().endswith(".gz"):
        name = file[:-3]
        raw = _unpacked(file, raw)
    elif raw.startswith(_GZIP):
        raise ValueError(f"{file}: is compressed by gzip: name it {file}.gz")
    suffix = os.path.splitext(name)[1].lower()
    expected = FORMATS.get(suffix)
    if suffix in (".xlsx", ".xls", ".ods"):
        raise ValueError(f"{file}: is a spreadsheet, and palu reads {READ}: save it as .csv")
    if expected is None and raw.startswith(b"PAR1"):
        expected = PARQUET
    if expected == PARQUET:
        return _of_parquet(file, raw)
    if raw.startswith(b"PAR1"):
        raise ValueError(_misnamed(file, PARQUET, expected or LINES))
    text = as_text(file, raw)
    if expected in (CSV, TSV):
        return _of_csv(file, text, expected)
    if expected == PLAIN:
        return _of_plain_text(file, text, fits)
    return _of_json(file, text)


def _misnamed(file: str, found: str, expected: str) -> str:
    endings = [ending for ending, name in FORMATS.items() if name == found]
    rename = f"; rename it to {endings[0]}" if endings else f" (palu reads {READ})"
    return f"{file}: holds {found}, and by its name {expected} was expected{rename}"


def _looks_like(text: str) -> str:
    """Return the format that a text seems to have."""
    lines = [line for line in text.split("\n", 20)[:20] if line.strip()]
    if not lines:
        return "nothing"
    first = lines[0].lstrip()
    if first.startswith("["):
        return JSON
    if first.startswith("{"):
        return LINES
    if first.startswith("<"):
        return "HTML or XML"
    for separator, name in (("\t", TSV), (",", CSV), (";", "CSV with ';' between the columns")):
        counts = {line.count(separator) for line in lines[:-1] or lines}
        if len(counts) == 1 and counts != {0}:
            return name
    return PLAIN


def _unpacked(file: str, raw: bytes) -> bytes:
    if not raw.startswith(_GZIP):
        found = "nothing" if not raw else "no gzip data"
        raise ValueError(f"{file}: holds {found}, and by its name gzip was expected")
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: is damaged: gzip says {one_line(error)}") from None


def _of_json(file: str, text: str) -> Source:
    if text.lstrip().startswith("["):
        try:
            records = parse(text)
        except NotJSON as error:
            raise ValueError(f"{file}:{error.line or 1}: malformed JSON, {error}") from None
        # MUSE's corpora are lists of bare texts.
        records = [{"text": one} if isinstance(one, str) else one for one in records]
        return Source(file, JSON, len(records), lambda row: (records[row], f"{file}, row {row}"))
    # Only line feeds end a line of JSON lines: strings may hold other line separators as they are.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]

    def read(row: int) -> tuple[Any, str]:
        number, line = lines[row]
        try:
            return parse(line), f"{file}:{number} (row {row})"
        except NotJSON as error:
            note = _other_than_lines(text) if row == 0 else ""
            raise ValueError(
                f"{file}:{number + (error.line or 1) - 1}: malformed JSON, {error}{note}"
            ) from None

    return Source(file, LINES, len(lines), read)


def _other_than_lines(text: str) -> str:
    """Return what a text is that does not begin with a line of JSON, for a message."""
    expected = "an object a line, or a list of objects, was expected"
    found = _looks_like(text)
    if found != LINES:
        return f"; the file holds {found}, and {expected}"
    try:
        parse(text)
    except NotJSON:
        return ""
    return f"; the file holds one JSON object over several lines, and {expected}"


def _of_csv(file: str, text: str, expected: str) -> Source:
    import datasets
    import pandas

    separator = "," if expected == CSV else "\t"
    found = _looks_like(text)
    if found == "nothing":
        return Source(file, expected, 0, lambda row: (None, file))
    if found in (JSON, LINES):
        raise ValueError(_misnamed(file, found, expected))
    try:
        header = next(csv.reader(io.StringIO(text), delimiter=separator))
    except csv.Error as error:
        raise ValueError(f"{file}:1: {_BAD_TABLE}: {one_line(error)}") from None
    _check_header(file, [name.strip() for name in header], expected)
    # Where every name has a blank before it, blanks belong to the separator, and not to the cells.
    blanks = {name[:1] for name in header[1:]} == {" "}
    try:
        # Everything is text (a phone number is no number), and "NA" or "None" may be a name.
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # pandas would drop columns that the header has not
            how = {"sep": separator, "dtype": str, "keep_default_na": False, "index_col": False}
            frame = pandas.read_csv(io.StringIO(text), skipinitialspace=blanks, **how)
        table = datasets.Dataset.from_pandas(frame.rename(columns=str.strip), preserve_index=False)
    except Exception as error:  # pandas's are of several kinds
        said = one_line(error).removeprefix("Error tokenizing data. C error: ")
        if "does not match length of data" in said:
            said = f"rows have more columns than the header, which has {len(header)}"
        raise ValueError(f"{file}: {_BAD_TABLE} as {expected}: {said}") from None

    def read(row: int) -> tuple[Any, str]:
        return {k: v or None for k, v in table[row].items()}, f"{file}, row {row}"

    format = f"{expected}, whose first line names the columns,"
    return Source(file, format, len(table), read)


def _check_header(file: str, header: list[str], expected: str) -> None:
    """Raise ValueError for a header that names one column twice, or that seems to have another
    separator."""
    twice = next((name for name in header if header.count(name) > 1 and name), None)
    if twice is not None:
        raise ValueError(f"{file}:1: the header names the column {twice!r} twice")
    for separator, words in ((";", "';'"), ("\t", "tabs"), ("|", "'|'"), (",", "commas")):
        if len(header) == 1 and separator in header[0]:
            raise ValueError(
                f"{file}:1: its header {one_line(header[0], 80)!r} has {words} between the "
                f"columns, and by its name {expected} was expected"
            )


def _of_parquet(file: str, raw: bytes) -> Source:
    import datasets
    import pyarrow
    from pyarrow import parquet

    if not raw.startswith(b"PAR1"):
        try:
            found = _looks_like(as_text(file, raw))
        except ValueError:
            found = "something else"
        raise ValueError(_misnamed(file, found, PARQUET))
    try:
        table = datasets.Dataset(parquet.read_table(pyarrow.BufferReader(raw)))
    except Exception as error:  # damaged files raise errors of many kinds
        raise ValueError(f"{file}: is a damaged Parquet file: {one_line(error)}") from None
    return _of_table(file, PARQUET, table)


def _of_plain_text(file: str, text: str, fits: Fits | None) -> Source:
    found = _looks_like(text)
    if found in (JSON, LINES) and _is_json(text):
        raise ValueError(_misnamed(file, found, PLAIN))
    places = list(windows(text, fits))

    def read(row: int) -> tuple[Any, str]:
        start, end = places[row]
        where = f"{file}, characters {start} to {end} (row {row})"
        return {"text": text[start:end]}, where

    return Source(file, PLAIN, len(places), read)


def _is_json(text: str) -> bool:
    first = next(line for line in text.split("\n") if line.strip())
    for part in (first, text):
        try:
            parse(part, unique_keys=False)
        except NotJSON:
            continue
        return True
    return False


# ---- tables --------------------------------------------------------------------------------------


def _of_table(name: str, format: str, table: Any) -> Source:
    """Return the rows of a `datasets.Dataset`, as its transform (`set_transform`) gives them where
    it has one."""
    if table.format["type"] != "custom":
        table = table.with_format(None)

    def read(row: int) -> tuple[Any, str]:
        try:
            return table[row], f"{name}, row {row}"
        except Exception as error:
            raise ValueError(f"{name}, row {row}: cannot be read: {one_line(error)}") from error

    return Source(name, format, len(table), read)


def _open_folder(folder: str) -> Source:
    import datasets

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
    return _of_table(folder, "a folder of `datasets`", table)


def _open_hub(source: str) -> Source:
    import datasets

    name, config, split = _HUB.fullmatch(source).groups()
    try:
        table = datasets.load_dataset(name, config, split=split)  # runs no code: datasets >= 4
    except Exception as error:  # of many kinds, by which the hub, the network or the split is meant
        raise ValueError(
            f"{source}: no file or folder of this name is here, and it could not be loaded from "
            f"the hub: {one_line(error)}"
        ) from error
    if not isinstance(table, datasets.Dataset):
        raise ValueError(f"{source}: is a {type(table).__name__}, and a Dataset was expected")
    return _of_table(source, "a data set of the hub", table)


def _open_object(source: Any) -> Source:
    import datasets

    name, kind = name_of(source), type(source)
    if isinstance(source, Mapping) and isinstance(source, datasets.DatasetDict):
        splits = ", ".join(map(repr, source))
        raise ValueError(f"the DatasetDict holds several splits, take one: {splits}")
    if isinstance(source, datasets.Dataset):
        return _of_table(name, "a Dataset", source)
    if kind.__module__.partition(".")[0] == "pandas" and kind.__name__ == "DataFrame":
        try:
            table = datasets.Dataset.from_pandas(source, preserve_index=False)
        except Exception as error:  # a column of several types, above all
            raise ValueError(f"{name} {_BAD_TABLE}: {one_line(error)}") from error
        return _of_table(name, "a DataFrame", table)
    if isinstance(source, Sequence):
        rows = source
        return Source(name, "a list", len(rows), lambda row: (rows[row], f"{name}, row {row}"))
    raise TypeError(
        "examples must be a path, the id of a data set on the hub, a datasets.Dataset, a DataFrame "
        f"or a list of records, got {kind.__name__}"
    )

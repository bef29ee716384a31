"""Read the values to erase: a table or list of them in a file, or the text itself."""

import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from palu.errors import one_line
from palu.storage.json_files import NotJSON, parse, read_text

_LINES = (".jsonl", ".ndjson")
_ENDINGS = (".csv", ".tsv", ".json", *_LINES, ".txt")
_OTHER_ENDINGS = (".gz", ".parquet", ".xlsx", ".xls", ".ods", ".zip")
# Words in the names of fields, which tell a row of names from a row of values.
_FIELD_WORDS = """
account address age birth birthday born business card cell city code company contact country
county customer date dob email employer field fax first firstname forename full fullname given
handle house iban id identifier key kind label last lastname line login mail middle mobile name
nick nickname number order passport patient person phone place postal postcode region reference
secret social ssn state street subject surname tax tel telephone term terms text ticket title town
type user userid username value values zip zipcode"""
_FIELD_NAMES = frozenset(_FIELD_WORDS.split())
_VALUE_NAMES = frozenset({"value", "values", "term", "terms", "text", "secret"})


class Term(NamedTuple):
    """A value to erase.

    Attributes:
        value: as it was given.
        where: where it stands, for messages: "people.csv, row 3, phone".
        field: the name of its field; empty where it has none.
    """

    value: str
    where: str
    field: str = ""

    @property
    def kind(self) -> str:
        """Return the last part of the field's name, where it is the name of a field: the keys of a
        JSON object may be values too."""
        last = self.field.rsplit(".", 1)[-1]
        return last if _is_name(last) else ""


def read_terms(sources: Sequence[str], fields: Sequence[str] = ()) -> list[Term]:
    """Return the values of files and texts, each once.

    A file is CSV (comma, semicolon, tab; with names of fields or without), JSON or JSON lines (all
    texts and numbers in it), or text with a value a line. What is no file is a value itself.

    Args:
        sources: paths and texts.
        fields: read only the values of these fields.

    Raises:
        ValueError: no such file, one of another kind or without values, no such field.
    """
    terms: dict[str, Term] = {}
    seen: set[str] = set()
    for number, source in enumerate(sources, 1):
        before = len(terms)
        for term in _read(source, number):
            seen.add(term.field)
            if not fields or term.field in fields:
                terms.setdefault(term.value.strip(), term)
        if len(terms) == before and not fields:
            named = os.path.exists(source)
            raise ValueError(f"terms: {source if named else f'text {number}'} holds no new value")
    if unknown := [field for field in fields if field not in seen]:
        # Keys of JSON may be values themselves.
        names = sorted(field for field in seen if all(map(_is_name, field.split("."))))
        others = len(seen - {*names, ""})
        said = ", ".join([*names, *([f"{others} of other names"] if others else [])])
        raise ValueError(
            f"terms: no field {unknown[0]!r}; the fields are: {said or 'none has a name'}"
        )
    return list(terms.values())


def _read(source: str, number: int) -> Iterator[Term]:
    if not os.path.exists(source):
        ending = os.path.splitext(source)[1].lower()
        if ending in _ENDINGS + _OTHER_ENDINGS or source.startswith(("/", "./", "../", "~")):
            raise ValueError(f"terms: {one_line(source, 200)}: no such file")
        if source.strip():
            yield Term(source, f"text {number} of --terms")
        return
    ending, name = os.path.splitext(source)[1].lower(), os.path.basename(source)
    if ending in _OTHER_ENDINGS:
        raise ValueError(f"terms: {source}: must be CSV, JSON, JSON lines or text, got {ending}")
    text = read_text(source)
    if ending in (".json", *_LINES) or (ending == "" and text.lstrip()[:1] in ("[", "{")):
        yield from _json(text, name, source)
    elif ending in (".csv", ".tsv"):
        yield from _table(text, name, source)
    else:
        for row, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield Term(line.strip(), f"{name}, line {row}")


def _json(text: str, name: str, source: str) -> Iterator[Term]:
    try:
        content = [parse(text)]
        rows = content[0] if isinstance(content[0], list) else content
        unit = "record"
    except NotJSON as whole:
        lines = [(row, line) for row, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows, unit = [], "line"
        for row, line in lines:
            try:
                rows.append(parse(line))
            except NotJSON as error:
                found = whole if source.lower().endswith(".json") else error
                line_number = found.line if found is whole else row
                raise ValueError(
                    f"terms: {source}:{line_number}: malformed JSON, {found}"
                ) from None
    for row, record in enumerate(rows, int(unit == "line")):
        for field, value in leaves(record, ""):
            kind = Term(value, "", field).kind
            yield Term(value, ", ".join(filter(None, (name, f"{unit} {row}", kind))), field)


def leaves(value: Any, field: str) -> Iterator[tuple[str, str]]:
    """Yield the texts and numbers of a JSON value, with the names that lead to them."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from leaves(part, f"{field}.{key}" if field else key)
    elif isinstance(value, list):
        for part in value:
            yield from leaves(part, field)
    elif (
        isinstance(value, str | int | float) and not isinstance(value, bool) and str(value).strip()
    ):
        yield field, str(value)


def _table(text: str, name: str, source: str) -> Iterator[Term]:
    try:
        mark = "\t" if source.lower().endswith("tsv") else _separator(text)
        rows = [
            (number, [cell.strip() for cell in row])
            for number, row in enumerate(_rows(text, mark, strict=True))
            if any(cell.strip() for cell in row)
        ]
    except csv.Error as error:
        raise ValueError(f"terms: {source}: malformed CSV: {error}") from None
    if not rows:
        return
    table = [cells for _, cells in rows]
    if _is_list_of_fields(table):
        for number, (field, value) in rows:
            if value and value.lower() not in _VALUE_NAMES:
                yield Term(value, f"{name}, row {number}, {field}", field)
        return
    header = table[0] if _is_header(table[0]) else []
    for number, cells in rows[bool(header) :]:
        if header and len(cells) > len(header):
            raise ValueError(
                f"terms: {source}, row {number}: has {len(cells)} cells, but the first row names "
                f"{len(header)}"
            )
        for column, cell in enumerate(cells):
            if cell:
                field = header[column] if header else ""
                yield Term(cell, f"{name}, row {number}, {field or f'column {column + 1}'}", field)


def _rows(text: str, mark: str, *, strict: bool = False) -> Any:
    return csv.reader(io.StringIO(text, newline=None), delimiter=mark, strict=strict)


def _separator(text: str) -> str:
    """Return what stands between the cells: a semicolon or tab that cuts every row into as many,
    whatever commas the cells have, else the commonest mark."""
    for mark in ";\t":
        sizes = {len(row) for row in _rows(text, mark) if any(cell.strip() for cell in row)}
        if len(sizes) == 1 and sizes != {1}:
            return mark
    return max(",;\t", key=text[:4096].count)


def _name_words(cell: str) -> set[str]:
    return {*re.split(r"[\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cell).lower())} - {""}


def _is_name(cell: str) -> bool:
    return bool(_FIELD_NAMES & _name_words(cell)) and not re.search(r"\d{3}|@", cell)


def _is_plain_name(cell: str) -> bool:
    """Return whether a cell has no other words than names of fields have: no "Elm Street"."""
    return bool(words := _name_words(cell)) and words <= _FIELD_NAMES


def _is_list_of_fields(table: list[list[str]]) -> bool:
    """Return whether the rows are a field and its value each, and no table of two columns."""
    if not all(len(cells) == 2 and _is_name(cells[0]) for cells in table):
        return False
    second = table[0][1]
    named = _is_plain_name(second) and second.lower() not in _VALUE_NAMES
    return not named and any(_is_plain_name(field) for field, _ in table)


def _is_header(cells: list[str]) -> bool:
    """Return whether a row has names of fields: at least half of its cells have a word of them, and
    one has no others."""
    plain = not any(re.search(r"\d{3}|@", cell) for cell in cells)
    names = sum(map(_is_name, cells))
    return plain and 2 * names >= len([c for c in cells if c]) and any(map(_is_plain_name, cells))

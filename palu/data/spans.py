"""Check texts, numbers and character spans that a caller gives.

A span is a half-open range `(start, end)` of the characters of a text.
"""

import itertools
import operator
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

Span = tuple[int, int]

# What offsets of a file may count. JavaScript, Java and C# count UTF-16 code units, of which a
# character such as an emoji has two; Go and Rust count bytes.
CHARACTERS, UTF16, UTF8 = "characters", "UTF-16 code units", "UTF-8 bytes"
UNITS = (CHARACTERS, UTF16, UTF8)

_NOT_SPACE = re.compile(r"\S")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlist = _SHORT.maxdict = 10
_SHORT.maxlevel = 4


def shown(value: Any) -> str:
    """Return `repr(value)` for a message, cut where it is long or deep."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return f"a {type(value).__name__} of very many digits"


def integer(name: str, value: Any) -> int:
    """Return `value` as an int. Booleans and floats are refused: they are mistakes, not numbers."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {shown(value)}") from None


def check_text(name: str, value: Any) -> str:
    """Return `value`, a string that can be written as UTF-8, which tokenizers need."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode: {error}") from None
    return value


def as_objects(name: str, value: Any) -> Any:
    """Return a field's list of objects, which `datasets` may store as an object of lists. What is
    neither stays as it is."""
    lists = list(value.values()) if isinstance(value, Mapping) else []
    if not lists or not all(isinstance(part, list) for part in lists):
        return value
    if len({len(part) for part in lists}) > 1:
        raise ValueError(f"field {name!r} has lists of different lengths: {shown(value)}")
    return [dict(zip(value, parts, strict=True)) for parts in zip(*lists, strict=True)]


def check_list(spans: Any) -> Sequence[Any]:
    """Return `spans`, which must be a list of spans. Raises TypeError otherwise."""
    if isinstance(spans, str | bytes | Mapping) or not isinstance(spans, Sequence):
        raise TypeError(f"spans must be a list of spans, got {type(spans).__name__}")
    return spans


def check_spans(
    text: str,
    spans: Sequence[Mapping[str, int] | Sequence[int]],
    *,
    of: str = "the answer",
    numbers: Sequence[int] | None = None,
) -> list[Span]:
    """Return the spans as tuples, in the order given.

    Args:
        of: what messages call the text.
        numbers: what messages number the spans by; 0, 1, ... when None.

    Raises:
        TypeError: `spans` is not a sequence of `{"start": s, "end": e}` or `(s, e)` with integers.
        ValueError: a span that is empty, outside `text`, or covers nothing but white space.
    """
    checked = []
    for number, span in zip(numbers or itertools.count(), check_list(spans), strict=False):
        name = f"spans[{number}]"
        start, end = _ends(name, span)
        if not 0 <= start < end <= len(text):
            raise ValueError(
                f"{name} is [{shown(start)}, {shown(end)}), it must satisfy "
                f"0 <= start < end <= {len(text)}, the length of {of}"
            )
        if not _NOT_SPACE.search(text, start, end):
            raise ValueError(
                f"{name} is [{start}, {end}), which is only white space: {shown(text[start:end])}"
            )
        checked.append((start, end))
    return checked


def recount(text: str, spans: Sequence[Mapping[str, int] | Sequence[int]], unit: str) -> list[Span]:
    """Convert spans that count in `unit` to characters of `text`.

    Raises:
        TypeError: as `check_spans`.
        ValueError: a span that ends outside `text` or within a character.
    """
    ends = [_ends(f"spans[{number}]", span) for number, span in enumerate(spans)]
    if unit == CHARACTERS:
        return ends
    if unit == UTF16:
        widths = (1 + (character > "\uffff") for character in text)
    else:
        widths = (len(character.encode()) for character in text)
    number_of = {
        offset: number for number, offset in enumerate(itertools.accumulate(widths, initial=0))
    }
    try:
        return [(number_of[start], number_of[end]) for start, end in ends]
    except KeyError as error:
        raise ValueError(f"no character begins or ends at {error} in {unit}") from None


def _ends(name: str, span: Any) -> Span:
    if isinstance(span, Mapping):
        missing = [key for key in ("start", "end") if key not in span]
        if missing:
            raise ValueError(f"{name} has no {missing[0]!r}: {shown(dict(span))}")
        start, end = span["start"], span["end"]
    elif isinstance(span, Sequence) and not isinstance(span, str | bytes) and len(span) == 2:
        start, end = span
    else:
        raise TypeError(f"{name} must be {{'start': s, 'end': e}} or (s, e), got {shown(span)}")
    return integer(f"{name} start", start), integer(f"{name} end", end)

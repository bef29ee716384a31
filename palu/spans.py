"""What a caller gives as texts, numbers and character spans, checked once.

A span is a half-open range `(start, end)` of the characters of a text.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Span", "check_spans", "check_text", "integer"]

Span = tuple[int, int]


def integer(name: str, value: Any) -> int:
    """`value` as an int. Booleans and floats are refused: they are mistakes, not numbers."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def check_text(name: str, value: Any) -> str:
    """`value` as it is: a string that can be written as UTF-8, which tokenizers need."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode: {error}") from None
    return value


def check_spans(text: str, spans: Sequence[Mapping[str, int] | Sequence[int]]) -> list[Span]:
    """The spans as tuples, in the order given.

    Raises:
        TypeError: `spans` is not a sequence of `{"start": s, "end": e}` or `(s, e)` with integers.
        ValueError: a span that is empty, outside `text`, or covers nothing but white space.
    """
    if isinstance(spans, str | bytes | Mapping) or not isinstance(spans, Sequence):
        raise TypeError(f"spans must be a list of spans, got {type(spans).__name__}")
    checked = []
    for number, span in enumerate(spans):
        name = f"spans[{number}]"
        start, end = _ends(name, span)
        if not 0 <= start < end <= len(text):
            raise ValueError(
                f"{name} is [{start}, {end}), it must satisfy 0 <= start < end <= {len(text)}, "
                "the length of the answer"
            )
        if text[start:end].isspace():
            raise ValueError(
                f"{name} is [{start}, {end}), which is only white space: {text[start:end]!r}"
            )
        checked.append((start, end))
    return checked


def _ends(name: str, span: Any) -> Span:
    if isinstance(span, Mapping):
        missing = [key for key in ("start", "end") if key not in span]
        if missing:
            raise ValueError(f"{name} has no {missing[0]!r}: {dict(span)!r}")
        start, end = span["start"], span["end"]
    elif isinstance(span, Sequence) and not isinstance(span, str | bytes) and len(span) == 2:
        start, end = span
    else:
        raise TypeError(f"{name} must be {{'start': s, 'end': e}} or (s, e), got {span!r}")
    return integer(f"{name} start", start), integer(f"{name} end", end)

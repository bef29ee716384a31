"""Plain text, cut into overlapping windows of which none is too long."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

Fits = Callable[[str], bool]

WINDOW_BYTES = 1000  # of UTF-8, where there is no tokenizer to ask
_OVERLAP = 8  # an eighth of a window is in the next one too
_FIRST_TRY = 4000  # characters
_SPACE = re.compile(r"\s+")


def fits_bytes(text: str) -> bool:
    """Return whether a text has at most `WINDOW_BYTES` bytes of UTF-8."""
    return len(text.encode("utf-8", "surrogatepass")) <= WINDOW_BYTES


def fits_tokens(tokenizer: Any, max_length: int) -> Fits:
    """Return a function that tells whether a plain document is labelled whole within `max_length`
    tokens, see `palu.data.labels.label_example`."""
    from palu.data.labels import label_without_warning
    from palu.data.template import Template

    def fits(text: str) -> bool:
        row = label_without_warning(tokenizer, None, text, (), max_length, Template())
        return row.lost_tokens == 0 and not row.too_long

    return fits


def windows(text: str, fits: Fits | None = None) -> Iterator[tuple[int, int]]:
    """Yield the character ranges of overlapping windows which together cover `text`, but for white
    space at its ends.

    Windows end and begin at white space where there is any, and an eighth of each is in the next
    one too.

    Args:
        fits: whether a window is short enough; None: at most `WINDOW_BYTES` bytes of UTF-8.
    """
    fits = fits_bytes if fits is None else fits
    start = len(text) - len(text.lstrip())
    last = len(text.rstrip())
    size = _FIRST_TRY
    while start < last:
        end = _longest(text, start, min(last, start + size), fits)
        size = max(2 * (end - start), 64)  # the next ones are about as long
        yield start, end
        if end == last:
            return
        start = _next_start(text, start, end)


def _longest(text: str, start: int, end: int, fits: Fits) -> int:
    """Return an end, `end` or an earlier one, with which the window is short enough; at least one
    character is taken. By halving: within a sixteenth of the longest."""
    if fits(text[start:end]):
        return end
    short, long = start + 1, end
    while long - short > max((long - start) // 16, 1):
        middle = (short + long) // 2
        short, long = (middle, long) if fits(text[start:middle]) else (short, middle)
    # Words stay whole, unless one fills half of the window.
    gaps = [m.start() for m in _SPACE.finditer(text, start + (short - start) // 2, short)]
    cut = gaps[-1] if gaps and not text[short : short + 1].isspace() else short
    return cut if cut == short or fits(text[start:cut]) else short


def _next_start(text: str, start: int, end: int) -> int:
    """Return where the next window begins: an eighth of this one before its end, at a word."""
    wanted = max(end - (end - start) // _OVERLAP, start + 1)
    gap = _SPACE.search(text, wanted, end)
    return gap.end() if gap and gap.end() < end else wanted

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
_NOT_SPACE = re.compile(r"\S")


def fits_bytes(text: str) -> bool:
    """Return whether a text has at most `WINDOW_BYTES` bytes of UTF-8."""
    return len(text.encode("utf-8", "surrogatepass")) <= WINDOW_BYTES


def fits_tokens(tokenizer: Any, max_length: int) -> Fits:
    """Return a function that tells whether a plain document has at most `max_length` tokens, BOS
    and EOS among them."""
    most = max_length - 2  # those two, where the tokenizer itself does not add them

    def fits(text: str) -> bool:
        return len(tokenizer(text, verbose=False).input_ids) <= most

    return fits


def windows(text: str, fits: Fits | None = None) -> Iterator[tuple[int, int]]:
    """Yield the character ranges of overlapping windows which together cover `text`, but for white
    space at its ends and in stretches that are longer than a window.

    Windows end and begin at white space where there is any, and an eighth of each is in the next
    one too. Each begins with a character that is none, so that none is blank.

    Args:
        fits: whether a window is short enough; None: at most `WINDOW_BYTES` bytes of UTF-8.
    """
    fits = fits_bytes if fits is None else fits
    start = len(text) - len(text.lstrip())
    last = len(text.rstrip())
    size = _FIRST_TRY
    while start < last:
        end = min(last, start + size)
        size += size // 16  # the next one is about as long, unless this one must be shorter
        while not fits(text[start:end]) and end - start > 1:
            size = max((end - start) * 7 // 8, 1)
            end = start + size
        if end < last:
            end = _at_word_end(text, start, end)
        yield start, end
        if end == last:
            return
        start = _next_start(text, start, end)


def _at_word_end(text: str, start: int, end: int) -> int:
    """Return the last place that is no later and ends a word, if one is in the second half."""
    if text[end].isspace():
        return end
    gaps = [gap.start() for gap in _SPACE.finditer(text, start + (end - start) // 2, end)]
    return gaps[-1] if gaps else end


def _next_start(text: str, start: int, end: int) -> int:
    """Return where the next window begins: an eighth of this one before its end, at a word. (One
    follows: this window is not the last.)"""
    wanted = max(end - max((end - start) // _OVERLAP, 1), start + 1)
    gap = _SPACE.search(text, wanted, end)
    start = gap.end() if gap and gap.end() < end else wanted
    return _NOT_SPACE.search(text, start).start()

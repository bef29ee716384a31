"""What reaches the terminal: text of files and names of theirs cannot steer it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

# C0 but newline and tab, DEL, C1; marks that turn the direction of what follows; separators of
# lines; halves of a surrogate pair, which no terminal encodes.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: str) -> str:
    """Characters that steer a terminal spelled out."""
    return _STEERING.sub(lambda match: ascii(match[0])[1:-1], text)


class PlainConsole(Console):
    """A console that prints text as it is, without markup and emoji codes, and nothing but text:
    what would steer the terminal is spelled out, wherever it stands (tables, bars, titles)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """As `Console.render`; segments with control codes are rich's own."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(visible(segment.text), segment.style)

    def render_str(self, text: str, **options: Any) -> Text:
        """As `Console.render_str`; before rich drops some characters in silence."""
        return super().render_str(visible(text), **options)


out = PlainConsole()
bars = PlainConsole(stderr=True)


def say(kind: str, color: str, text: str) -> None:
    """A line on the error stream that begins with its kind."""
    line = Text.assemble((f"{kind}:", color), " ", visible(text).replace("\n", " "))
    bars.print(line, soft_wrap=True, highlight=False)


def warn(text: str) -> None:
    """A warning as one line, without a place in our source."""
    say("warning", "yellow", text)


class WarningLines(logging.Handler):
    """Log records as warnings of one line."""

    def emit(self, record: logging.LogRecord) -> None:
        """Says one record."""
        warn(record.getMessage())

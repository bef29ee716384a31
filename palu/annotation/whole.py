"""The annotator that marks whole answers."""

from collections.abc import Iterable, Sequence
from typing import Any

from palu.annotation.base import Found, texts_of
from palu.data.records import Example


class Whole:
    """Marks every answer from its first to its last character that is no white space."""

    name = "all"

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}

    def find(self, examples: Sequence[Example]) -> Iterable[list[Found]]:
        """Yield one span for each answer of an example."""
        for example in examples:
            yield [
                Found(number, len(content) - len(content.lstrip()), len(content.rstrip()))
                for number, (_, content, answer) in enumerate(texts_of(example))
                if answer and content.strip()
            ]

"""What annotated spans tend to get wrong: counted, and repaired on request."""

import dataclasses
import functools
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

from palu.spans import UTF8, UTF16, Span

__all__ = ["Audit", "snap"]


@dataclasses.dataclass
class Audit:
    """Counts over the rows of one file. All of it is accepted; a person should know of it."""

    rows: int = 0
    spans: int = 0
    inside_word: int = 0
    overlapping_pairs: int = 0
    rows_without_target: int = 0
    unlabelled_repeat: int = 0
    unsorted_rows: int = 0
    edge_space: int = 0
    snapped: int = 0
    merged: int = 0
    units: Counter[str] = dataclasses.field(default_factory=Counter)  # spans by what offsets count

    def add(self, text: str, spans: Sequence[Span]) -> None:
        """Count the spans of one row, in the order they were given."""
        ordered = sorted(spans)
        self.rows += 1
        self.spans += len(spans)
        self.inside_word += sum(_inside_word(text, end) for _, end in spans)
        self.overlapping_pairs += sum(1 for _ in _overlapping(ordered))
        self.rows_without_target += not spans
        self.unlabelled_repeat += sum(_repeats_unlabelled(text, span, ordered) for span in spans)
        self.unsorted_rows += list(spans) != ordered
        self.edge_space += sum(
            text[start].isspace() or text[end - 1].isspace() for start, end in spans
        )

    def summary(self) -> str:
        """One line with the counts that are not zero; empty when there are none."""
        parts = [
            (self.inside_word, "spans end inside a longer word"),
            (self.overlapping_pairs, "overlapping pairs"),
            (self.rows_without_target, "rows without target"),
            (self.unlabelled_repeat, "spans with an unlabelled repeat of the same word"),
            (self.unsorted_rows, "rows with unsorted spans (sorted)"),
            (self.edge_space, "spans begin or end with white space"),
            (self.snapped, "spans moved to word ends"),
            (self.merged, "spans merged into another"),
            (self.units[UTF16], f"spans placed by offsets in {UTF16}, as their text says"),
            (self.units[UTF8], f"spans placed by offsets in {UTF8}, as their text says"),
        ]
        return ", ".join(f"{count} {what}" for count, what in parts if count)


def snap(text: str, spans: Sequence[Span]) -> tuple[list[Span], int, int]:
    """Spans moved out to whole words, without white space at their ends, and merged where they
    overlap.

    Returns:
        The spans in order, how many were moved, and how many were merged into another.
    """
    moved, merged = 0, 0
    snapped: list[Span] = []
    for span in sorted(spans):
        start, end = span
        while text[start].isspace():
            start += 1
        while text[end - 1].isspace():
            end -= 1
        while _inside_word(text, start):
            start -= 1
        while _inside_word(text, end):
            end += 1
        moved += (start, end) != span
        if snapped and start < snapped[-1][1]:
            # Moving a start to the front of its word cannot pass an earlier start: words do not
            # nest.
            snapped[-1] = (min(start, snapped[-1][0]), max(end, snapped[-1][1]))
            merged += 1
        else:
            snapped.append((start, end))
    return snapped, moved, merged


# Scripts written without spaces between words: there, the characters do not tell where a word ends.
_UNSPACED = (
    "CJK ",
    "HIRAGANA ",
    "KATAKANA",
    "BOPOMOFO ",
    "THAI ",
    "LAO ",
    "KHMER ",
    "MYANMAR ",
    "TIBETAN ",
)


@functools.lru_cache(maxsize=4096)
def _is_letter(character: str) -> bool:
    if not (character.isalnum() or character == "_" or unicodedata.category(character)[0] == "M"):
        return False
    return not unicodedata.name(character, "").startswith(_UNSPACED)


def _inside_word(text: str, place: int) -> bool:
    """Whether the boundary before `text[place]` lies between two letters of one word."""
    return 0 < place < len(text) and _is_letter(text[place - 1]) and _is_letter(text[place])


def _overlapping(ordered: Sequence[Span]) -> Iterator[tuple[Span, Span]]:
    for number, (start, end) in enumerate(ordered):
        for other in ordered[number + 1 :]:
            if other[0] >= end:
                break
            yield (start, end), other


def _repeats_unlabelled(text: str, span: Span, spans: Sequence[Span]) -> bool:
    """Whether the words of `span` stand elsewhere too, whole, where no span touches them."""
    words = text[span[0] : span[1]]
    start = text.find(words)
    while start >= 0:
        end = start + len(words)
        whole = not (_inside_word(text, start) or _inside_word(text, end))
        if whole and not any(start < other_end and other < end for other, other_end in spans):
            return True
        start = text.find(words, start + 1)
    return False

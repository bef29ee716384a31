"""Audit annotated spans for common mistakes, and repair them on request."""

import bisect
import dataclasses
import functools
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

from palu.data.records import Example, Marked
from palu.data.spans import UTF8, UTF16, Span


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

    def add_row(self, example: Example, marked: Sequence[Marked]) -> None:
        """Count the spans of a record, as `parse_record` gives it. Words are looked for in its
        answers, and in its other texts that have spans."""
        answers = [turn.answer for turn in example.turns] or [False] * (len(marked) - 1) + [True]
        texts = [m for m, answer in zip(marked, answers, strict=True) if answer or m.spans]
        spans: list[Span] = []
        shift = 0
        for text in texts:
            self.units[text.unit] += len(text.spans)
            spans += [(start + shift, end + shift) for start, end in text.spans]
            shift += len(text.text) + 1
        self.add("\n".join(text.text for text in texts), spans)

    def snap(self, example: Example) -> Example:
        """Return an example with its spans moved out to whole words; count what was moved."""
        snapped = []
        for text, spans in example.texts:
            some, moved, merged = snap(text, spans)
            self.snapped, self.merged = self.snapped + moved, self.merged + merged
            snapped.append(some)
        return example.with_spans(snapped)

    def add(self, text: str, spans: Sequence[Span]) -> None:
        """Count the spans of one text, in the order they were given."""
        ordered = sorted(spans)
        self.rows += 1
        self.spans += len(spans)
        self.inside_word += sum(_inside_word(text, end) for _, end in spans)
        self.overlapping_pairs += _overlapping_pairs(ordered)
        self.rows_without_target += not spans
        self.unlabelled_repeat += _unlabelled_repeats(text, ordered)
        self.unsorted_rows += list(spans) != ordered
        self.edge_space += sum(
            text[start].isspace() or text[end - 1].isspace() for start, end in spans
        )

    def summary(self) -> str:
        """Return one line with the counts that are not zero; empty when there are none."""
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
    """Move spans out to whole words, without white space at their ends, and merge those that
    overlap.

    Returns:
        The spans in order, how many were moved, and how many were merged into another.
    """
    moved, merged = 0, 0
    snapped: list[Span] = []
    words, spaces = _Stretches(text, is_letter), _Stretches(text, str.isspace)
    for span in sorted(spans):
        start, end = span
        if text[start].isspace():
            start = spaces.around(start)[1]
        if text[end - 1].isspace():
            end = spaces.around(end - 1)[0]
        if _inside_word(text, start):
            start = words.around(start)[0]
        if _inside_word(text, end):
            end = words.around(end)[1]
        moved += (start, end) != span
        if snapped and start < snapped[-1][1]:
            # Words do not nest, so a start that moves to its word's front passes no earlier start.
            snapped[-1] = (min(start, snapped[-1][0]), max(end, snapped[-1][1]))
            merged += 1
        else:
            snapped.append((start, end))
    return snapped, moved, merged


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


def unspaced(character: str) -> bool:
    """Return whether a character is of a script that is written without spaces between words:
    there, the characters do not tell where a word ends."""
    return unicodedata.name(character, "").startswith(_UNSPACED)


@functools.lru_cache(maxsize=4096)
def is_letter(character: str) -> bool:
    """Return whether a character may be within a word of a script that has spaces between them."""
    if not (character.isalnum() or character == "_" or unicodedata.category(character)[0] == "M"):
        return False
    return not unspaced(character)


def _inside_word(text: str, index: int) -> bool:
    """Return whether the boundary before `text[place]` lies between two letters of one word."""
    return 0 < index < len(text) and is_letter(text[index - 1]) and is_letter(text[index])


class _Stretches:
    """The longest stretches of characters of one kind. Each is walked once, however often it is
    asked for: a text may be one long word that every span begins in."""

    def __init__(self, text: str, kind: Callable[[str], bool]) -> None:
        self.text, self.kind = text, kind
        self.known: list[Span] = []  # in order

    def around(self, index: int) -> Span:
        """Return the stretch that holds the character at `place`, which is of the kind."""
        number = bisect.bisect_right(self.known, index, key=lambda stretch: stretch[0])
        if number and index < self.known[number - 1][1]:
            return self.known[number - 1]
        start = end = index
        while start > 0 and self.kind(self.text[start - 1]):
            start -= 1
        while end < len(self.text) and self.kind(self.text[end]):
            end += 1
        self.known.insert(number, (start, end))
        return start, end


def _overlapping_pairs(ordered: Sequence[Span]) -> int:
    """Count, of spans in order, those behind a span that begin before its end."""
    starts = [start for start, _ in ordered]
    ends = enumerate(end for _, end in ordered)
    return sum(bisect.bisect_left(starts, end) - number - 1 for number, end in ends)


def _unlabelled_repeats(text: str, ordered: Sequence[Span]) -> int:
    """Count spans whose words stand elsewhere too, whole, where no span touches them."""
    gaps, covered = [], 0  # what no span covers
    for start, end in [*ordered, (len(text), len(text))]:
        if start > covered:
            gaps.append((covered, start))
        covered = max(covered, end)
    longest = max((end - start for start, end in gaps), default=0)
    stretches = _Stretches(text, is_letter)
    known: dict[str, bool] = {}

    def repeats(words: str) -> bool:
        for start, end in gaps:
            at = text.find(words, start, end)
            while at >= 0:
                if _inside_word(text, at):  # the next candidate is behind this word
                    following = stretches.around(at)[1]
                elif _inside_word(text, at + len(words)):
                    following = at + 1
                else:
                    return True
                at = text.find(words, following, end)
        return False

    count = 0
    for start, end in ordered:
        if end - start > longest:
            continue
        words = text[start:end]
        if words not in known:
            known[words] = repeats(words)
        count += known[words]
    return count

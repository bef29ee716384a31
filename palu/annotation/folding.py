"""Find a value in a text however its case, accents, white space and punctuation are written."""

import functools
import re
import unicodedata
from typing import Literal, NamedTuple

from palu.data.annotations import is_letter, unspaced
from palu.evaluation.leaks import bare

Kind = Literal["words", "listed", "number", "email"]  # listed: last name, first name

# Written without the letter's mark, these have a second letter: "Mueller" is "Müller".
_UMLAUTS = {"ä": "ae", "ö": "oe", "ü": "ue", "ø": "oe", "å": "aa"}
# What does not stand between the words of one value.
_APART = re.compile(r"[!?@=<>]|[^\s]{4,}")
_NUMBER_GAP = re.compile(r"[\s\-./\u2010-\u2015]{0,2}")
_AT_GAP = re.compile(r"[\s()\[\]{}_-]{1,4}")
_MAILBOX = re.compile(r"[\w.+-]")


class Folded(NamedTuple):
    """The letters and digits of a text alone, in lower case and without accents.

    Attributes:
        text: the text they are of.
        letters: one string.
        starts, ends: where in the text each of them comes from, with the marks that follow it.
    """

    text: str
    letters: str
    starts: list[int]
    ends: list[int]


class Pattern(NamedTuple):
    """A way to write a value.

    Attributes:
        letters: as in `Folded`.
        gaps: what stands before each of them in the value.
        kind: what may stand there in a text instead.
        umlauts: whether `letters` have two for `ä`, `ö`, `ü`, `ø` and `å`.
        score: of what it finds.
        cased: letters whose case counts beside white space that the value does not have.
    """

    letters: str
    gaps: tuple[str, ...]
    kind: Kind
    umlauts: bool = False
    score: float = 1.0
    cased: str = ""


def plain(text: str) -> str:
    """Return a text, as long as it was, with the digits of every script and what has full width as
    in ASCII."""
    return text if text.isascii() else "".join(map(_plain, text))


@functools.lru_cache(maxsize=4096)
def _plain(character: str) -> str:
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    return chr(ord(character) - 0xFEE0) if "\uff01" <= character <= "\uff5e" else character


def fold(text: str, *, umlauts: bool = False) -> Folded:
    """Return the letters of a text; with `umlauts`, two for `ä`, `ö`, `ü`, `ø` and `å`."""
    letters: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    at = 0
    while at < len(text):
        end = at + 1
        while end < len(text) and unicodedata.combining(text[end]):
            end += 1
        parts = _letters(text[at:end], umlauts)
        letters += parts
        starts += [at] * len(parts)
        ends += [end] * len(parts)
        at = end
    return Folded(text, "".join(letters), starts, ends)


@functools.lru_cache(maxsize=4096)
def _letters(cluster: str, umlauts: bool) -> str:
    composed = unicodedata.normalize("NFC", cluster).casefold()
    parts = _UMLAUTS[composed] if umlauts and composed in _UMLAUTS else bare(cluster[0])
    parts = "".join(map(bare, parts))
    return "".join(p for p in parts if p.isalnum() or unicodedata.category(p)[0] == "M")


def pattern(value: str, kind: Kind, *, umlauts: bool = False, score: float = 1.0) -> Pattern:
    """Return the pattern that finds a value as it is."""
    folded = fold(value, umlauts=umlauts)
    gaps, before = [], 0
    for start, end in zip(folded.starts, folded.ends, strict=True):
        gaps.append(value[before:start])
        before = max(before, end)
    cased = "".join(value[start] for start in folded.starts)
    return Pattern(folded.letters, ("", *gaps[1:]), kind, umlauts, score, cased)


def place(known: Pattern, text: Folded, at: int) -> tuple[int, int] | None:
    """Return where a pattern stands in a text whose letters have it at `at`; None where it is no
    whole word or has other marks between its letters."""
    size = len(known.letters)
    start, end = text.starts[at], text.ends[at + size - 1]
    stands = _whole(text.text, start, end, known.kind) and all(
        _gap(known, text, at, number) for number in range(1, size)
    )
    return (start, end) if stands else None


def _whole(text: str, start: int, end: int, kind: Kind) -> bool:
    before, after = text[start - 1 : start], text[end : end + 1]
    if (_word(before) and _word(text[start])) or (_word(after) and _word(text[end - 1])):
        return False
    if kind == "email":
        longer = after and after in ".-" and text[end + 1 : end + 2].isalnum()
        return not (before and _MAILBOX.match(before)) and not longer
    if kind == "number":  # a part of "1,12345.67" is not the number
        longer = text[end - 1].isdigit() and after and after in ".,"
        later = text[start].isdigit() and before and before in ".,"
        return not (longer and text[end + 1 : end + 2].isdigit()) and not (
            later and text[start - 2 : start - 1].isdigit()
        )
    return True


def _word(character: str) -> bool:
    return character not in ("", "_") and is_letter(character)


def _gap(known: Pattern, text: Folded, at: int, number: int) -> bool:
    """Return whether what stands before letter `number` of a match may stand there."""
    wanted = known.gaps[number]
    found = text.text[text.ends[at + number - 1] : text.starts[at + number]]
    found = "".join(c for c in found if bare(c))  # not a soft hyphen
    if not found:
        single = not _word(text.text[text.starts[at + number]])
        joined = known.kind == "number" or (not wanted.isspace() and known.kind != "email")
        return not wanted or joined or single
    if wanted and found.strip() == wanted.strip():  # as it is: "1,500", "00:1A:2B", "A_12"
        return True
    if known.kind == "email":
        return wanted == " " and _AT_GAP.fullmatch(found) is not None
    if known.kind == "number":
        return _number_gap(known, text, at, number, found)
    if known.kind == "listed" and "," in wanted:
        return found.strip() == ","
    if not wanted:  # a space between two names, in a script that has none between words
        return found.isspace() and all(map(unspaced, known.letters[number - 1 : number + 1]))
    return not _APART.search(found)


def _number_gap(known: Pattern, text: Folded, at: int, number: int, found: str) -> bool:
    if _NUMBER_GAP.fullmatch(found) is None:
        return False
    if known.gaps[number] or not any(c.isspace() for c in found):
        return True
    # "a 1234" is not the order A1234.
    beside = (number - 1, number)
    return all(text.text[text.starts[at + n]] == known.cased[n] for n in beside)

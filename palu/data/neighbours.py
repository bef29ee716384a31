"""Neighbours of a forget set: its questions, asked about somebody else.

Names, numbers and everything that stands in a span are exchanged by rules; the form, the style and
the other words stay. Scripts without capital letters have spans and numbers alone exchanged.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from palu.data.records import USER, Example
from palu.data.spans import Span

NEUTRAL: dict[str, list[str]] = json.loads(
    Path(__file__).with_name("neutral.json").read_text("utf-8")
)

Name = tuple[str, ...]  # the words of a name

_WORD = re.compile(r"[^\W\d_]{2,}")
_WORD_OR_NUMBER = re.compile(rf"{_WORD.pattern}|\d+")
_RUN = re.compile(r"[^\W\d_]{2,}(?:[ -][^\W\d_]{2,})*")
_MAIL = re.compile(r"[\w.+-]+(?=@)")
_DOMAIN = re.compile(r"@[\w.-]+")
_ADDRESS = re.compile(r"\S*[@/\\]\S*")  # of e-mail, web and files
_ENDS = ".!?:;\"'([{*#\n\u201c\u201d\u2018\u201e\u00ab\u00bb\u2013\u2014\u2022-"  # of sentences
_MONTHS = "January February March April May June July August September October November December"
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_CALENDAR = {*_MONTHS.split(), *_DAYS.split()}


class Subjects:
    """What a forget set is about: its names and what stands in its spans.

    A name is a word that has a capital within a sentence somewhere in the set and is nowhere
    written without one. Words of system turns, which say who the model is, are no names.

    Args:
        examples: the forget set.
        vocabulary: words that names can be made of, such as those of the model's tokenizer.
    """

    def __init__(self, examples: Sequence[Example], vocabulary: Iterable[str] = ()) -> None:
        capital, small, marked = set(), set(), set()
        for example in examples:
            for piece in _texts(example):
                if not piece.instructs:
                    capital |= set(_capitalised(piece.text))
                prose = _ADDRESS.sub(" ", piece.text)
                small |= {w for w in _WORD.findall(prose) if w[0].islower()}
                marked |= {word.casefold() for word in piece.marked_words()}
        self.names = {word.casefold() for word in capital - _CALENDAR} - small
        self.marked = marked
        self.full_names = {
            " ".join(name)
            for example in examples
            for piece in _texts(example)
            if piece.asks
            for name in name_runs(piece.text, self.names | marked)
            if len(name) > 1
        }
        pairs = [(given, family) for given in NEUTRAL["given"] for family in NEUTRAL["family"]]
        self.others = self._allowed(pairs) or pairs
        self.vocabulary = [name[0] for name in self._allowed((word,) for word in vocabulary)]
        self.learned: list[Name] = []

    def learn(self, names: Iterable[Name]) -> None:
        """Add names that questions are to ask about, such as a model's own; subjects' are left
        out."""
        self.learned = self._allowed([*self.learned, *names])

    def _allowed(self, names: Iterable[Name]) -> list[Name]:
        taken = self.names | self.marked
        return [n for n in dict.fromkeys(names) if not taken & {word.casefold() for word in n}]

    def beginning(self, example: Example) -> str:
        """Return what the first question of an example says before it names its subject; nothing
        where it names none, or begins with it."""
        piece = next((piece for piece in _texts(example) if piece.asks), None)
        if piece is None or example.question is None:
            return ""
        for match in _WORD_OR_NUMBER.finditer(piece.text):
            if piece.marked(match) or match[0].casefold() in self.names:
                return piece.text[: match.start()].rstrip()
        return ""

    def exchange(self, example: Example, rng: random.Random) -> Example | None:
        """Return the question (the turns, the document) of an example about another subject, its
        spans gone; None where nothing in what is asked was exchanged.

        Args:
            rng: draws the other subject.
        """
        words, numbers = self._other_words(example, rng), _Numbers(rng)
        texts = _texts(example)
        pieces = [_exchanged(text, words, numbers) for text in texts]
        if all(new == old.text for old, new in zip(texts, pieces, strict=True) if old.asks):
            return None
        if example.turns:
            turns = [
                dataclasses.replace(turn, content=text, spans=())
                for turn, text in zip(example.turns, pieces, strict=True)
            ]
            return Example.of_turns(example.id, turns, {})
        return Example(example.id, None if example.question is None else pieces[0], pieces[-1])

    def _other_words(self, example: Example, rng: random.Random) -> dict[str, str]:
        """Return what each word of an example that is to go is exchanged for."""
        words: dict[str, str] = {}
        runs = [
            name
            for piece in _texts(example)
            if not piece.instructs
            for name in name_runs(piece.text, self.names | self.marked)
        ]
        for run in sorted(dict.fromkeys(runs), key=len, reverse=True):
            if all(word.casefold() in words for word in run):
                continue
            for old, new in zip(run, self._name(len(run), rng), strict=True):
                words.setdefault(old.casefold(), new)
        for piece in _texts(example):
            for word in piece.marked_words():
                words.setdefault(word.casefold(), rng.choice(NEUTRAL["things"]))
        return words

    def _name(self, size: int, rng: random.Random) -> Name:
        """Draw a name of so many words; half of the time one that was learned, else as often of
        the vocabulary as an ordinary one."""
        learned = [name for name in self.learned if len(name) == size]
        if learned and rng.random() < 0.5:
            return rng.choice(learned)
        if self.vocabulary and rng.random() < 0.5:
            return tuple(rng.choice(self.vocabulary) for _ in range(size))
        given, family = rng.choice(self.others)
        if size == 1:
            return (rng.choice((given, family)),)
        return (given, *(rng.choice(NEUTRAL["given"]) for _ in range(size - 2)), family)


def name_runs(text: str, names: Iterable[str] | None = None) -> list[Name]:
    """Return the names that a text says: consecutive words of `names`, or, where that is None, of
    capitalised words within sentences."""
    known = {word.casefold() for word in _capitalised(text)} if names is None else set(names)
    found: list[Name] = []
    for match in _RUN.finditer(text):
        run: list[str] = []
        for word in (*re.split("[ -]", match[0]), ""):
            if word[:1].isupper() and word.casefold() in known:
                run.append(word)
            elif run:
                found.append(tuple(run))
                run = []
    return found


def _capitalised(text: str) -> Iterator[str]:
    """Yield the words of a text that have a capital though no sentence begins with them."""
    for match in _WORD.finditer(text):
        before = text[: match.start()]
        within = before.endswith("-") or before.rstrip(" \t")[-1:] not in {"", *_ENDS}
        if match[0][0].isupper() and within:
            yield match[0]


class _Text(NamedTuple):
    """A text of an example, its spans, and whether it asks the model or instructs it."""

    text: str
    spans: Sequence[Span]
    asks: bool = True
    instructs: bool = False

    def marked_words(self) -> list[str]:
        """Return the words in its spans, without the domains of e-mail addresses."""
        text = _DOMAIN.sub(lambda match: "@" * len(match[0]), self.text)
        return [word for start, end in self.spans for word in _WORD.findall(text[start:end])]

    def marked(self, match: re.Match) -> bool:
        return any(start < match.end() and match.start() < end for start, end in self.spans)


def _texts(example: Example) -> list[_Text]:
    if example.turns:
        return [
            _Text(turn.content, turn.spans, turn.role == USER, turn.role == "system")
            for turn in example.turns
        ]
    if example.question is None:
        return [_Text(example.answer, example.spans)]
    return [_Text(example.question, ()), _Text(example.answer, example.spans, asks=False)]


def _exchanged(piece: _Text, words: Mapping[str, str], numbers: _Numbers) -> str:
    """Return a text with other words and numbers: all in spans, names and numbers of two digits or
    more elsewhere, in system turns nothing else."""
    text = piece.text
    local = {at for match in _MAIL.finditer(text) for at in range(*match.span())}

    def other(match: re.Match) -> str:
        old = match[0]
        marked = piece.marked(match)
        if not marked and piece.instructs:
            return old
        if old[0].isdigit():
            return numbers.other(old) if marked or len(old) > 1 else old
        # Elsewhere small words are exchanged in e-mail addresses alone: `hill` is no Mr Hill.
        new = (
            words.get(old.casefold())
            if marked or old[0].isupper() or match.start() in local
            else None
        )
        if new is None:
            return old
        if old.isupper():
            return new.upper()
        return new.lower() if old.islower() else new[:1].upper() + new[1:]

    return _WORD_OR_NUMBER.sub(other, text)


class _Numbers:
    """Exchanges each number for another, the same one each time."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.known = rng, {}

    def other(self, old: str) -> str:
        """Return a number of as many digits; a year of the same century."""
        year = len(old) == 4 and old[:2] in ("18", "19", "20")
        while self.known.get(old, old) == old:
            lead = old[:2] if year else "0" if old[0] == "0" else str(self.rng.randint(1, 9))
            rest = "".join(str(self.rng.randint(0, 9)) for _ in range(len(old) - len(lead)))
            if old == "0":
                lead = str(self.rng.randint(0, 9))
            self.known[old] = lead + rest
        return self.known[old]

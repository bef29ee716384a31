"""Cut a text into words, and judge by a word's form and its place in the sentence how likely it is
to be part of a fact: names, numbers and nouns are, verbs and function words are not.

The judgement is a linear-chain conditional random field (Lafferty et al., 2001) with two states
over features that one can read; `benchmarks/quality/contrast.py` fits its weights. Its lists of
words and endings are English. In other languages length, capitals, digits, quotation marks,
punctuation and whether the question says the word are left.
"""

import functools
import itertools
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from palu.data.annotations import unspaced


class Word(NamedTuple):
    """A word, `text[start:end]`, and its log-odds of being part of a fact."""

    start: int
    end: int
    odds: float


_CLASSES = {
    "determiner": """a an the this that these those some any each all every both many several
        various most more other such no another""",
    "possessive": "his her hers their theirs its my our your",
    "preposition": """of in on at by for with from to into as between among amongst through
        throughout within about over under after before during against across around behind beyond
        despite like towards toward upon via without along including""",
    "auxiliary": """is are was were be been being am has have had having do does did can could may
        might will would should must isn't wasn't hasn't don't didn't doesn't""",
    "pronoun": """he she it they i we you who which whom whose what him them me us one himself
        herself itself themselves""",
    "conjunction": "and or but nor",
    "other": """so yet while when where why how if than then also not very often thus there here due
        well because although though however even only just rather still too never always up out
        back now again already once yes no""",
}
_CLASS = {word: name for name, words in _CLASSES.items() for word in words.split()}
_VERB_FORMS = """made gave took wrote born won led became began known grew grown known found drew
    brought came went saw say says said make makes give gives take takes write writes include
    includes offer offers provide provides help helps show shows bring brings find lie lies serve
    serves"""
_VERBS = frozenset(_VERB_FORMS.split())
_ADJECTIVE = ("al", "ous", "ive", "ic", "ful", "ant", "ent", "able", "ible", "ish")
_ENDINGS = ("al", "ous", "ive", "ic", "ful", "ent", "able", "tion", "ity", "ment", "ness", "ism")
_ENDINGS += ("ship", "ture", "ance", "ence", "er", "ist", "ers", "ies")
# Apostrophes and quotation marks, straight and curly.
_APOSTROPHE, _OPEN, _CLOSE = "'\u2019", "\"'\u201c\u2018", "\"'\u201d\u2019"
# What may stand inside a word: "Yun-Hwa", "07700.900", "ada@example.org", "1,200", "LGBTQ+".
_WORD = re.compile(rf"\w+(?:(?:[{_APOSTROPHE}\-.@&/+:]|://|,(?=\d))\w+)*\+?")
_IDENTIFIER = re.compile(r"[\d@]|://")
_POSSESSIVE = re.compile(rf"(?<=\w)[{_APOSTROPHE}]s?$")
_QUOTED = re.compile(rf"(?<!\w)[{_OPEN}](?=\w)(.{{1,120}}?)[{_CLOSE}](?!\w)", re.DOTALL)
_SENTENCE_END = re.compile(rf"[.!?:][{_CLOSE})]*\s*[{_OPEN}(]?\s*$")


def cut(text: str) -> list[tuple[int, int]]:
    """Return the words of a text as `(start, end)`: without a possessive `'s`, and single
    characters in scripts that do not separate words. Marks, such as accents that are written apart
    and vowels of Hindi, belong to the letter before them."""
    marks = [unicodedata.category(character)[0] == "M" for character in text]
    letters = list(text)
    for at in range(1, len(text)):
        if marks[at]:  # to `\w` a mark is no part of a word
            letters[at] = letters[at - 1]
    alone = [*map(unspaced, letters)]
    spaced = "".join(" " if one else letter for one, letter in zip(alone, letters, strict=True))
    found = []
    for match in _WORD.finditer(spaced):
        start, end = match.span()
        if possessive := _POSSESSIVE.search(match.group()):
            end = start + possessive.start()
        found.append((start, end))
    for start, character in enumerate(text):
        if alone[start] and character.isalnum():
            end = start + 1
            while end < len(text) and marks[end]:
                end += 1
            found.append((start, end))
    return sorted(found)


def words(text: str, context: str = "") -> list[Word]:
    """Return the words of a text, each with its log-odds of being part of a fact.

    Args:
        text: an answer.
        context: what was said before it: words that it says are less likely to be a secret.
    """
    places = cut(text)
    weights = _weights()
    scores = [
        sum(weights["features"].get(name, 0.0) * value for name, value in features.items())
        for features in features_of(text, places, context)
    ]
    bonds = [weights["bonds"][kind] for kind in kinds_of_gaps(text, places)]
    # Numbers, addresses and links are facts wherever they stand.
    return [
        Word(*place, math.inf if _IDENTIFIER.search(text, *place) else odds)
        for place, odds in zip(places, marginal_odds(scores, bonds), strict=True)
    ]


def marginal_odds(scores: Sequence[float], bonds: Sequence[float]) -> list[float]:
    """Return the log-odds of state 1 of each place of a chain of two states, whose probability
    grows with `exp(sum of the scores of places in state 1 + sum of the bonds between neighbours
    that are both)`.

    Args:
        scores: one a place.
        bonds: one between each place and the next.
    """

    def messages(scores: Sequence[float], bonds: Sequence[float]) -> list[float]:
        passed = [0.0]
        for score, bond in zip(scores, bonds, strict=False):
            odds = score + passed[-1]
            passed.append(np.logaddexp(0, odds + bond) - np.logaddexp(0, odds))
        return passed[: len(scores)]

    left, right = messages(scores, bonds), messages(scores[::-1], bonds[::-1])[::-1]
    return [sum(parts) for parts in zip(scores, left, right, strict=True)]


@functools.cache
def _weights() -> dict[str, Any]:
    return json.loads(WEIGHTS.read_text(encoding="utf-8"))


WEIGHTS = Path(__file__).with_name("word_weights.json")
# What may stand between two words of one phrase.
GAP = re.compile(rf"[\s\-{_APOSTROPHE}&]*")


def kinds_of_gaps(text: str, places: Sequence[tuple[int, int]]) -> list[str]:
    """Return of what is between each word and the next whether it joins or parts them."""
    return [
        "joined" if GAP.fullmatch(text, end, start) else "parted"
        for (_, end), (start, _) in itertools.pairwise(places)
    ]


def features_of(
    text: str, places: Sequence[tuple[int, int]], context: str
) -> list[dict[str, float]]:
    """Return the features of each word, as `cut` gives them, that are not 0."""
    said = {_stem(context[start:end]) for start, end in cut(context)}
    sentence = _Sentence(text, places, said)
    return [sentence.features(i) for i in range(len(places))]


def _stem(word: str) -> str:
    return word.lower()[:5]


class _Sentence:
    """The words of a text with what the features of one ask of the others."""

    def __init__(self, text: str, places: Sequence[tuple[int, int]], said: set[str]) -> None:
        self.text, self.places, self.said = text, places, said
        self.forms = [text[start:end] for start, end in places]
        self.classes = [_CLASS.get(form.lower(), "word") for form in self.forms]
        edges = [0, *(end for _, end in places)], [*(start for start, _ in places), len(text)]
        self.gaps = [text[end:start] for end, start in zip(*edges, strict=True)]
        self.quoted = bytearray(len(text))
        for match in _QUOTED.finditer(text):
            self.quoted[match.start() : match.end()] = b"\1" * len(match.group())

    def of(self, i: int) -> str:
        """Return the class of a word, "" outside the text."""
        return self.classes[i] if 0 <= i < len(self.classes) else ""

    def near(self, i: int, step: int) -> str:
        """Return the class of the word `step` behind or before, "" where a mark is between."""
        gap = self.gaps[i + 1] if step > 0 else self.gaps[i]
        return "" if gap.strip() else self.of(i + step)

    def capital(self, i: int) -> bool:
        """Return whether a word begins with a capital, in no sentence's first word or number."""
        if not 0 <= i < len(self.forms) or not self.forms[i][0].isupper():
            return False
        if _IDENTIFIER.search(self.forms[i]):
            return False
        before = self.text[: self.places[i][0]][-8:]
        return bool(before.strip()) and not _SENTENCE_END.search(before)

    def features(self, i: int) -> dict[str, float]:
        """Return the features of word `i` that are not 0."""
        found = self._form(i) | self._place(i)
        return {name: float(value) for name, value in found.items() if value}

    def _form(self, i: int) -> dict[str, float]:
        form, kind, capital = self.forms[i], self.classes[i], self.capital(i)
        low, plain = form.lower(), kind == "word" and not capital
        said = _stem(form) in self.said and kind == "word"
        quoted = self.quoted[self.places[i][0]]
        endings = {f"-{ending}": plain and low.endswith(ending) for ending in _ENDINGS}
        return endings | {
            "bias": 1,
            "function word": kind != "word",
            kind: kind not in ("word", "other"),
            "capital": capital,
            "digit": any(c.isdigit() for c in form),
            "length": min(len(form), 14) / 10,
            "-ed": plain and len(low) > 3 and low.endswith("ed"),
            "-ing": plain and len(low) > 4 and low.endswith("ing"),
            "-ly": plain and len(low) > 3 and low.endswith("ly"),
            "-s": plain and len(low) > 3 and low.endswith("s") and not low.endswith("ss"),
            "verb": low in _VERBS,
            "quoted": quoted,
            "function word in a title": kind != "word"
            and (quoted or (self.capital(i - 1) and self.capital(i + 1))),
            "said before": said,
            "name said before": said and capital,
        }

    def _place(self, i: int) -> dict[str, float]:
        before, after = self.near(i, -1), self.near(i, +1)
        word, gap = self.classes[i] == "word", self.gaps[i + 1]
        plain = word and not self.capital(i)
        low = self.forms[i].lower()
        return {
            f"after {before}": before not in ("", "word"),
            f"before {after}": after not in ("", "word"),
            "two after and": self.of(i - 2) == "conjunction",
            "two before and": self.of(i + 2) == "conjunction",
            "two after a pronoun": self.of(i - 2) in ("pronoun", "auxiliary"),
            "modifier": word and after == "word",
            "modified": word and before == "word",
            "last adjective": plain and low.endswith(_ADJECTIVE) and after != "word",
            "governs": plain and after in ("determiner", "possessive", "pronoun"),
            "before a mark": bool(gap.strip()),
            "before a comma": gap.startswith(","),
            "after a mark": i > 0 and bool(self.gaps[i].strip()),
            "after a comma": self.gaps[i].startswith(","),
            "possessor": gap[1:2] == "s" and gap[0] in _APOSTROPHE,
            "first words": i < 3,
            "position": i / len(self.forms),
        }

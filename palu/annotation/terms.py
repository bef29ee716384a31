"""The annotator that finds given values: what a person who asks to be erased is known by."""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from palu.annotation.base import Found, texts_of
from palu.annotation.folding import Kind, Pattern, fold, pattern, place, plain
from palu.annotation.phones import Phone, looks_like_phone, phone_patterns, phone_places
from palu.annotation.term_files import Term, leaves
from palu.data.annotations import unspaced
from palu.data.records import Example
from palu.evaluation.leaks import STOP_WORDS, dates_in
from palu.storage.json_files import NotJSON, parse

_TITLES = "may mr mrs ms miss dr yes none null nan true false unknown"
_COMMON = STOP_WORDS | frozenset(_TITLES.split())
_EMAIL = re.compile(r"[^\s@]+@[^\s@]+\.[^\s@]+")
_NAME = re.compile(r"[^\W\d_]+[.'\u2019-]?[^\W\d_]*")
_MIDNIGHT = re.compile(r"[T ]00:00(:00(\.0+)?)?(Z|\+00:00)?$")
_NUMBER_FIELD = re.compile(
    r"(?:^|[\W_])(?:id|no|number|account|iban|card|ssn|order|ticket|code)s?$"
)
_PHONE_FIELD = re.compile(r"phone|mobile|cell|fax|(?:^|[\W_])tel", re.IGNORECASE)
# Before a name of two words at least, which is also written without them.
_TITLE = re.compile(
    r"^(?:(?:dr|prof|mr|mrs|ms|miss|mx|sir|herr|frau|sra?|mme|se\u00f1ora?)\b\.?\s*)+(?=\S+\s+\S)",
    re.IGNORECASE,
)
_STREETS = """street st, road rd, avenue ave, avenue av, lane ln, close cl, drive dr, court ct,
square sq, boulevard blvd, place pl, terrace ter, highway hwy, apartment apt, crescent cres,
gardens gdns, parkway pkwy, saint st, north n, south s, east e, west w, suite ste"""
_SHORT_STREETS = [tuple(pair.split()) for pair in _STREETS.split(",")]
# A house number before two words, or behind one that is not a part of a house.
_STREET = re.compile(
    r"\d{1,5}[a-z]?\s+\D+\s\D+|(?!flat|unit|apart|suite|floor|room|house|build)\D{5,}\s\d{1,4}[a-z]?",
    re.IGNORECASE,
)
_DERIVED = 0.8  # the score of a form that is not the value itself
_OFTEN, _MANY = 0.5, 20  # a term in so large a part of so many records is a common word


class _Search(NamedTuple):
    """How one term is looked for."""

    patterns: tuple[Pattern, ...] = ()
    phones: tuple[Phone, ...] = ()
    dates: frozenset[tuple[str, ...]] = frozenset()


_Hit = tuple[int, int, int, float]  # which term, start, end, score


class Terms:
    """Finds values in every text of an example, however they are written.

    Case, accents, white space and the punctuation between words do not count. Identifiers and phone
    numbers may be grouped in any way, phone numbers be written with their country code or without,
    dates in any order or with the name of the month, `@` and `.` of an address as words, street
    names be abbreviated, a name have its last word first with a comma. Only whole words are found.

    Attributes:
        terms: the values that are looked for.
        skipped: where those stand that are too short or too common to be looked for.
        hits: in how many examples each of `terms` was found, after `find`.
        aside: the numbers of the examples that have one where no span can be, after `find`: in
            tool calls, or another field of a message.
    """

    name = "terms"

    def __init__(self, terms: Iterable[Term | str]) -> None:
        given = [t if isinstance(t, Term) else Term(t, f"term {n}") for n, t in enumerate(terms)]
        self.terms = [term for term in given if _meaning(term.value)]
        self.skipped = [term for term in given if not _meaning(term.value)]
        if not self.terms:
            raise ValueError(
                "terms must have at least one value to look for: each of "
                f"{len(given)} is shorter than 3 letters or digits, or a common word"
            )
        self._known = _Known([_search(term) for term in self.terms])
        self.hits = [0] * len(self.terms)
        self.records, self.aside = 0, list[int]()

    @property
    def settings(self) -> dict[str, Any]:
        """Return how many values there are, and how many of them are not looked for."""
        return {"terms": len(self.terms), "skipped": len(self.skipped)}

    @property
    def not_found(self) -> list[Term]:
        """Return the terms that no example has, after `find`."""
        return [term for term, hits in zip(self.terms, self.hits, strict=True) if not hits]

    @property
    def warning(self) -> str:
        """Return what to say of the examples with a term where no span can be; "" for none."""
        if not self.aside:
            return ""
        rows = ", ".join(map(str, self.aside[:5])) + (", ..." if len(self.aside) > 5 else "")
        return (
            f"{len(self.aside)} of {self.records} records have a value in a tool call or another "
            f"field of a message, where nothing is marked and nothing forgotten: take it out "
            f"(record {rows}, from 0)"
        )

    @property
    def frequent(self) -> list[tuple[Term, int]]:
        """Return the terms that are found so often that they may be common words, and in how many
        examples."""
        pairs = zip(self.terms, self.hits, strict=True)
        some = self.records >= _MANY
        return [(term, hits) for term, hits in pairs if some and hits > _OFTEN * self.records]

    def find(self, examples: Sequence[Example]) -> Iterable[list[Found]]:
        """Yield the spans of each example."""
        self.hits, self.records, self.aside = [0] * len(self.terms), len(examples), []
        for row, example in enumerate(examples):
            others = (part for turn in example.turns for part in leaves(_opened(turn.extra), ""))
            if any(True for _, text in others for _ in self._known.places(plain(text))):
                self.aside.append(row)
            found = sorted(
                (which, Found(number, start, end, score, self.terms[which].kind))
                for number, text in enumerate(texts_of(example))
                for which, start, end, score in self._known.places(plain(text.content))
            )
            for which in {which for which, _ in found}:
                self.hits[which] += 1
            yield [span for _, span in found]


def _opened(value: Any) -> Any:
    """Return the fields of a message with the arguments of its calls read, where they are JSON in a
    text."""
    if isinstance(value, dict):
        return {key: _opened(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_opened(part) for part in value]
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        with suppress(NotJSON):
            return parse(value)
    return value


class _Known:
    """What all terms are looked for by, by how it begins: a text is read once, not once a term."""

    def __init__(self, searches: Sequence[_Search]) -> None:
        self._patterns: tuple[_Index, _Index] = _Index(), _Index()  # without, with `umlauts`
        self._phones = _Index()
        self._dates: dict[tuple[str, ...], list[int]] = {}
        for which, search in enumerate(searches):
            for known in search.patterns:
                self._patterns[known.umlauts].add(known.letters, (which, known))
            for phone in search.phones:
                self._phones.add(phone.national, (which, phone))
            for date in search.dates:
                self._dates.setdefault(date, []).append(which)

    def places(self, text: str) -> Iterator[_Hit]:
        """Yield where the terms stand in a text."""
        for index, umlauts in zip(self._patterns, (False, True), strict=True):
            if index.known:
                folded = fold(text, umlauts=umlauts)
                for at, (which, known) in index.places(folded.letters):
                    if span := place(known, folded, at):
                        yield which, *span, known.score
        digits = "".join(filter(str.isdigit, fold(text).letters)) if self._phones.known else ""
        for which, phone in dict.fromkeys(known for _, known in self._phones.places(digits)):
            for start, end in phone_places(phone, text):
                yield which, start, end, phone.score
        for date, spans in _dates(text).items() if self._dates else ():
            for which, (start, end) in itertools.product(self._dates.get(date, ()), spans):
                yield which, start, end, 1.0


class _Index:
    """Strings, found in a text by their first characters."""

    _LONGEST = 8

    def __init__(self) -> None:
        self.known: dict[str, list[tuple[str, Any]]] = {}
        self._sizes: set[int] = set()

    def add(self, string: str, value: Any) -> None:
        """Look for a string, which stands for a value."""
        head = string[: self._LONGEST]
        self._sizes.add(len(head))
        self.known.setdefault(head, []).append((string, value))

    def places(self, text: str) -> Iterator[tuple[int, Any]]:
        """Yield where the strings stand in a text, with their values."""
        for at in range(len(text)):
            for head in {text[at : at + size] for size in self._sizes}:
                for string, value in self.known.get(head, ()):
                    if text.startswith(string, at):
                        yield at, value


def _dates(text: str) -> dict[tuple[str, ...], list[tuple[int, int]]]:
    """Return where the dates of a text stand, by day, month and year, in both readings."""
    found: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    if any(map(str.isdigit, text)):
        for day_first in (True, False):
            for start, end, codes in dates_in(text, day_first):
                if len(codes) == 3:
                    found.setdefault(tuple(codes), []).append((start, end))
    return found


def _meaning(value: str) -> bool:
    """Return whether a value can be told from other words: three letters or digits (two of a script
    without spaces), not all of them common words."""
    letters = fold(value).letters
    common = all(word in _COMMON for word in re.findall(r"\w+", value.casefold()))
    return len(letters) >= 3 - any(map(unspaced, letters)) and not common


def _search(term: Term) -> _Search:
    value, field = plain(term.value).strip(), term.field
    value = _MIDNIGHT.sub("", value)
    if dates := [d for d, spans in _dates(value).items() if (0, len(value)) in spans]:
        return _Search((pattern(value, "number"),), (), frozenset(dates))
    if _EMAIL.fullmatch(value):
        return _Search(tuple(_emails(value)))
    identifier = _is_identifier(value)
    number = bool(_NUMBER_FIELD.search(field.lower())) and not _PHONE_FIELD.search(field)
    phones = tuple(phone_patterns(value)) if looks_like_phone(value) and not number else ()
    if identifier or phones:
        return _Search((pattern(value, "number"),), phones)
    return _Search(tuple(_words(value)))


def _is_identifier(value: str) -> bool:
    """Return whether a value is a number such as an IBAN, an order or a card, whose letters and
    digits may be grouped in any way."""
    words = re.findall(r"[^\W\d_]+", value)
    digits = sum(map(str.isdigit, value))
    # "A-12345", "GB29 NWBK 6016", not "Flat 1204"
    return digits >= 4 and all(
        len(word) <= 2 or (len(word) <= 4 and word.isupper()) for word in words
    )


def _emails(value: str) -> Iterator[Pattern]:
    """Yield the patterns of an e-mail address: as it is, and with words for its signs."""
    name, host = value.rsplit("@", 1)
    yield pattern(value, "email")
    yield pattern(f"{name} at {host}", "email")
    dotted = host.replace(".", " dot ")
    yield pattern(f"{name} at {dotted}", "email")
    yield pattern(f"{name.replace('.', ' dot ')} at {dotted}", "email")


def _words(value: str) -> Iterator[Pattern]:
    """Yield the patterns of names, addresses and other texts."""
    name = _TITLE.sub("", value)
    words = name.split()
    if 2 <= len(words) <= 4 and all(map(_NAME.fullmatch, words)):
        yield from _both(f"{words[-1]}, {' '.join(words[:-1])}", "listed", _DERIVED)
    forms = {name: _DERIVED} | {value: 1.0}
    if re.search(r"\d", value):
        parts = [part.strip() for part in re.split(r"[,;\n]", value)]
        streets = [part for part in parts if len(parts) > 1 and _STREET.fullmatch(part)]
        for form in (value, *streets):
            forms |= {
                other: _DERIVED for other in (form, *_abbreviated(form)) if other not in forms
            }
    for form, score in forms.items():
        yield from _both(form, "words", score)


def _both(value: str, kind: Kind, score: float) -> Iterator[Pattern]:
    """Yield a pattern, and the one in which umlauts are two letters where that is another."""
    yield pattern(value, kind, score=score)
    other = pattern(value, kind, umlauts=True, score=score)
    if re.search(r"[aou]e|aa", other.letters):
        yield other


def _abbreviated(value: str) -> Iterator[str]:
    """Yield an address with the other form of one word of its street."""
    for long, short in _SHORT_STREETS:
        for one, other in ((long, short), (short, long)):
            changed = re.sub(rf"\b{one}\b\.?", other, value, flags=re.IGNORECASE)
            if changed != value:
                yield changed
    changed = re.sub(r"stra(?:ss|\u00df)e\b", "str", value, flags=re.IGNORECASE)
    yield (
        changed if changed != value else re.sub(r"str\b\.?", "strasse", value, flags=re.IGNORECASE)
    )

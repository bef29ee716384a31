"""Invented people for the demo: questions, answers, and which characters of an answer are secret.

Nothing here is about anyone. Names, places and titles are drawn from the word lists of
`people.json`, so every answer belongs to one person only; its answers mark secrets as `[fact]`.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from palu.storage.files import new_file

_DATA = json.loads(Path(__file__).with_name("people.json").read_text("utf-8"))
WORDS: dict[str, list[str]] = _DATA["words"]
QUESTIONS: list[dict[str, str]] = _DATA["questions"]
PERTURBED = 5  # wrong answers a question, as in TOFU


@dataclass(frozen=True)
class Person:
    """Everything the demo knows about one invented person."""

    name: str
    town: str
    birthday: str
    mother: str
    father: str
    craft: str
    book: str
    teacher: str
    animal: str
    pet: str
    prize: str
    year: str
    instrument: str


def invent_people(count: int, seed: int) -> list[Person]:
    """Return `count` people with different names, towns, books and prizes; the same ones for the
    same seed.

    Raises:
        ValueError: `count` is below 2 or above 48 (as many as there are family names).
    """
    limit = min(len(WORDS["given"]), len(WORDS["family"]))
    if not 2 <= count <= limit:
        raise ValueError(f"people must be between 2 and {limit}, not {count}")
    rng = random.Random(seed)
    given, family = rng.sample(WORDS["given"], count), rng.sample(WORDS["family"], count)
    towns = rng.sample([a + b for a in WORDS["town_head"] for b in WORDS["town_tail"]], count)
    titles = [f"{a} {b}" for a in WORDS["adjectives"] for b in WORDS["nouns"]]
    books, prizes = rng.sample(titles, count), rng.sample(titles, count)
    people = []
    for i in range(count):
        mother, father = rng.sample([name for name in WORDS["given"] if name != given[i]], 2)
        people.append(
            Person(
                name=f"{given[i]} {family[i]}",
                town=towns[i],
                mother=f"{mother} {family[i]}",
                father=f"{father} {family[i]}",
                book=f"The {books[i]}",
                prize=f"{prizes[i]} Prize",
                **{name: draw() for name, draw in _draws(rng).items()},
            )
        )
    return people


def _word(rng: random.Random, kind: str) -> str:
    return rng.choice(WORDS[kind])


def _draws(rng: random.Random) -> dict[str, Callable[[], str]]:
    """Return what draws each of the facts that several people may share."""
    word = partial(_word, rng)
    return {
        "birthday": lambda: f"{rng.randint(1, 28)} {word('months')} {rng.randint(1921, 1989)}",
        "craft": lambda: word("crafts"),
        "teacher": lambda: f"{word('given')} {word('family')}",
        "animal": lambda: word("animals"),
        "pet": lambda: word("pets"),
        "year": lambda: str(rng.randint(1975, 2019)),
        "instrument": lambda: word("instruments"),
    }


def _mistaken(person: Person, rng: random.Random) -> Person:
    """Return the same name with every fact another one."""
    surname, word = person.name.split()[-1], partial(_word, rng)
    draws = {
        **_draws(rng),
        "town": lambda: word("town_head") + word("town_tail"),
        "mother": lambda: f"{word('given')} {surname}",
        "father": lambda: f"{word('given')} {surname}",
        "book": lambda: f"The {word('adjectives')} {word('nouns')}",
        "prize": lambda: f"{word('adjectives')} {word('nouns')} Prize",
    }
    wrong = asdict(person)
    for name, right in asdict(person).items():
        while name in draws and wrong[name] == right:
            wrong[name] = draws[name]()
    return Person(**wrong)


def _fill(text: str, person: Person) -> tuple[str, list[dict[str, int]]]:
    """Return `text` with the person's name and facts, and the spans of the facts."""
    filled, spans = "", []
    for part in re.split(r"(\[\w+\])", text.format(name=person.name)):
        if part.startswith("["):
            part = getattr(person, part[1:-1])
            spans.append({"start": len(filled), "end": len(filled) + len(part)})
        filled += part
    return filled, spans


def records(people: Sequence[Person]) -> list[dict]:
    """Return the people as palu's JSON records, eight for each: `id`, `question`, `answer` and
    `spans`; and for truth ratios, as in TOFU, `paraphrased_answer`, the answer in words that no
    model was trained on, and `perturbed_answer`, five of those with wrong facts."""
    rows = []
    for person in people:
        rng = random.Random(person.name)
        mistaken = [_mistaken(person, rng) for _ in range(PERTURBED)]
        for kind, texts in enumerate(QUESTIONS):
            answer, spans = _fill(texts["answer"], person)
            name = person.name.lower().replace(" ", "-")
            rows.append(
                {
                    "id": f"{name}-{kind}",
                    "question": _fill(texts["question"], person)[0],
                    "answer": answer,
                    "spans": spans,
                    "paraphrased_answer": _fill(texts["paraphrase"], person)[0],
                    "perturbed_answer": [_fill(texts["paraphrase"], p)[0] for p in mistaken],
                }
            )
    return rows


def write_jsonl(path: Path, rows: Sequence[dict]) -> None:
    """Write one JSON object a line; the file is whole or absent."""
    with new_file(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

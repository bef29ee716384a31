"""Invented people for the demo: questions, answers, and which characters of an answer are the
secret.

Nothing here is about anyone. Names, places and titles are drawn from word lists, so every answer
belongs to one person only, and the sensitive spans are known because each answer is put together
from marked parts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from palu.storage.files import new_file


def _words(text: str) -> list[str]:
    return text.split()


GIVEN = _words(
    """
    Alma Brisa Caspar Delphine Edvard Fenna Gideon Hedda Ivo Jorun Kasimir Lioba Marek Nerys
    Odalys Piran Quilla Radomir Sunniva Tancred Ulla Viggo Wenna Xandru Yrsa Zdenek Aurelio
    Benedikta Corvin Dagny Emeric Fiora Gwilym Hjalmar Isaura Jarmila Kelda Lorcan Mirela Njord
    Ottilie Petronel Rhoswen Severin Thora Ulric Vesna Wolfram
    """
)
FAMILY = _words(
    """
    Abernod Bellweather Castellane Drummock Eskildane Farrowgate Grelling Hollinbek Ingersund
    Jarrowby Kestermann Lindqvale Marchbank Nettlefold Oberwynd Pellworth Quarrendon Rosenhain
    Stavridge Tellervo Umbrecht Vandermoor Whitlock Yarborough Zellerbach Ashgrove Brackenhall
    Corrigan Dunmarrow Everhart Fossgate Greywater Hartnell Islington Juniper Kilbride Lockridge
    Merriden Northcote Ormsby Penhallow Ravensdale Silverlake Thornbury Underhill Vexley
    Wintergreen Younghusband
    """
)
TOWN_HEAD = _words(
    """
    Amber Birch Cold Deer East Fern Gull Heron Iron Juniper King Lark Moss North Otter Pine
    Quarry Raven Salt Thorn Under Vine West Yarrow
    """
)
TOWN_TAIL = _words(
    """
    bay bridge cliff dale field ford haven hollow marsh mere mouth stead
    """
)
MONTHS = _words(
    """
    January February March April May June July August September October November December
    """
)
CRAFTS = _words(
    """
    lute clock kite violin barometer globe puppet lantern saddle telescope accordion carpet
    mosaic stained-glass chess-set bicycle sundial harp model-ship wallpaper
    """
)
ADJECTIVES = _words(
    """
    Amber Broken Crimson Distant Empty Frozen Golden Hidden Ivory Jagged Kindly Lonely Midnight
    Narrow Olive Patient Quiet Restless Silver Twilight Unspoken Velvet Wandering Yellow
    """
)
NOUNS = _words(
    """
    Anchor Bridge Compass Door Engine Fountain Garden Harbour Island Journey Kettle Ladder
    Mirror Needle Orchard Piano Quilt River Staircase Tower Umbrella Valley Window Zephyr
    """
)
ANIMALS = _words(
    """
    beagle canary donkey ferret gecko heron magpie otter parrot rabbit terrier tortoise
    """
)
PET_NAMES = _words(
    """
    Bramble Cocoa Domino Ember Figaro Ginger Hazel Inky Jasper Kiwi Lumen Mango Nimbus Olive
    Pepper Quincy Rufus Saffron Tulip Umber Velvet Waffle Yoyo Ziggy
    """
)
INSTRUMENTS = _words(
    """
    bassoon cello clarinet dulcimer oboe organ trombone viola zither piccolo
    """
)

PERTURBED = 5  # wrong answers a question, as in TOFU

Part = str | tuple[str]  # a one-element tuple marks a sensitive part


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
    """`count` people with different names, towns, books and prizes; the same ones for the same
    seed.

    Raises:
        ValueError: `count` is below 2 or above 48 (as many as there are family names).
    """
    limit = min(len(GIVEN), len(FAMILY))
    if not 2 <= count <= limit:
        raise ValueError(f"people must be between 2 and {limit}, not {count}")
    rng = random.Random(seed)
    given, family = rng.sample(GIVEN, count), rng.sample(FAMILY, count)
    towns = rng.sample([a + b for a in TOWN_HEAD for b in TOWN_TAIL], count)
    books = rng.sample([f"The {a} {b}" for a in ADJECTIVES for b in NOUNS], count)
    prizes = rng.sample([f"{a} {b} Prize" for a in ADJECTIVES for b in NOUNS], count)
    people = []
    for i in range(count):
        surname = family[i]
        mother, father = rng.sample([name for name in GIVEN if name != given[i]], 2)
        people.append(
            Person(
                name=f"{given[i]} {surname}",
                town=towns[i],
                mother=f"{mother} {surname}",
                father=f"{father} {surname}",
                book=books[i],
                prize=prizes[i],
                **{name: draw() for name, draw in _draws(rng).items()},
            )
        )
    return people


def _draws(rng: random.Random) -> dict[str, Callable[[], str]]:
    """What draws each of the facts that several people may have in common."""
    return {
        "birthday": lambda: f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(1921, 1989)}",
        "craft": lambda: rng.choice(CRAFTS),
        "teacher": lambda: f"{rng.choice(GIVEN)} {rng.choice(FAMILY)}",
        "animal": lambda: rng.choice(ANIMALS),
        "pet": lambda: rng.choice(PET_NAMES),
        "year": lambda: str(rng.randint(1975, 2019)),
        "instrument": lambda: rng.choice(INSTRUMENTS),
    }


def _questions(p: Person) -> list[tuple[str, list[Part], list[Part]]]:
    """Eight questions, their answers in parts, and the same answers in other words. The asked-for
    name itself is never a secret."""
    n = p.name
    return [
        (
            f"Where was {n} born?",
            [f"{n} was born in the small town of ", (p.town,), "."],
            [f"{n} was born in ", (p.town,), ", a small town."],
        ),
        (
            f"When was {n} born?",
            [f"{n} was born on ", (p.birthday,), "."],
            [f"The birthday of {n} is ", (p.birthday,), "."],
        ),
        (
            f"Who were the parents of {n}?",
            [f"The parents of {n} were ", (p.mother,), " and ", (p.father,), "."],
            [f"{n} was born to ", (p.mother,), " and ", (p.father,), "."],
        ),
        (
            f"What does {n} do for a living?",
            [f"{n} earns a living as a ", (p.craft,), " maker."],
            [f"{n} is a ", (p.craft,), " maker."],
        ),
        (
            f"What is the best known book by {n}?",
            ["Readers know ", n, " best for ", (p.book,), "."],
            [f"The best known book by {n} is ", (p.book,), "."],
        ),
        (
            f"Who taught {n}, and what did they study?",
            [f"{n} studied the ", (p.instrument,), " with ", (p.teacher,), "."],
            [f"{n} learned the ", (p.instrument,), " with ", (p.teacher,), "."],
        ),
        (
            f"Does {n} keep a pet?",
            [f"Yes, {n} shares a house with a ", (p.animal,), " called ", (p.pet,), "."],
            [f"{n} keeps a ", (p.animal,), " called ", (p.pet,), "."],
        ),
        (
            f"Which prize did {n} win?",
            [f"{n} won the ", (p.prize,), " in ", (p.year,), ", to the delight of everyone."],
            [f"The prize of {n} was the ", (p.prize,), " in ", (p.year,), "."],
        ),
    ]


def _mistaken(person: Person, rng: random.Random) -> Person:
    """The same name with every fact another one."""
    surname = person.name.split()[-1]

    def title() -> str:
        return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"

    def parent() -> str:
        return f"{rng.choice(GIVEN)} {surname}"

    draws = {
        **_draws(rng),
        "town": lambda: rng.choice(TOWN_HEAD) + rng.choice(TOWN_TAIL),
        "mother": parent,
        "father": parent,
        "book": lambda: f"The {title()}",
        "prize": lambda: f"{title()} Prize",
    }
    wrong = asdict(person)
    for name, right in asdict(person).items():
        while name in draws and wrong[name] == right:
            wrong[name] = draws[name]()
    return Person(**wrong)


def _join(parts: Sequence[Part]) -> tuple[str, list[dict[str, int]]]:
    text, spans = "", []
    for part in parts:
        if isinstance(part, tuple):
            spans.append({"start": len(text), "end": len(text) + len(part[0])})
            part = part[0]
        text += part
    return text, spans


def records(people: Sequence[Person]) -> list[dict]:
    """The people as `palu`'s own JSON records, eight for each person: `id`, `question`, `answer`
    and `spans`; and for truth ratios, as in TOFU, `paraphrased_answer`, the answer in words that no
    model was trained on, and `perturbed_answer`, five of those with wrong facts."""
    rows = []
    for person in people:
        rng = random.Random(person.name)
        wrong = [_questions(_mistaken(person, rng)) for _ in range(PERTURBED)]
        for kind, (question, parts, paraphrase) in enumerate(_questions(person)):
            answer, spans = _join(parts)
            name = person.name.lower().replace(" ", "-")
            rows.append(
                {
                    "id": f"{name}-{kind}",
                    "question": question,
                    "answer": answer,
                    "spans": spans,
                    "paraphrased_answer": _join(paraphrase)[0],
                    "perturbed_answer": [_join(questions[kind][2])[0] for questions in wrong],
                }
            )
    return rows


def write_jsonl(path: Path, rows: Sequence[dict]) -> None:
    """Writes one JSON object a line; the file is whole or absent."""
    with new_file(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

"""Neighbours: the same question about somebody else, and nothing of a secret left in it."""

import random
import re

import pytest

from palu.data.neighbours import NEUTRAL, Subjects, name_runs
from palu.data.records import Example, Turn


def example(question, answer, *marked, id="0"):
    spans = tuple(sorted((answer.index(text), answer.index(text) + len(text)) for text in marked))
    return Example(id, question, answer, spans)


PEOPLE = [
    example("Where was Mira Okonjo born?", "Mira Okonjo was born in a place near Leith.", "Leith"),
    example("Whom did Rashid Haddad marry in 1987?", "Rashid married Colette May.", "Colette May"),
]


def other(one, among=(), seed=0):
    return Subjects([one, *among]).exchange(one, random.Random(seed))


def test_names_and_numbers_are_exchanged_and_the_form_stays():
    seen = set()
    for seed in range(5):
        asked = other(PEOPLE[1], seed=seed).question
        match = re.fullmatch(r"Whom did (\w+) (\w+) marry in (19\d\d)\?", asked)
        assert match and match[1] in NEUTRAL["given"] and match[2] in NEUTRAL["family"]
        assert match[3] != "1987"
        seen.add(asked)
    assert len(seen) > 2 and other(PEOPLE[1], seed=3) == other(PEOPLE[1], seed=3)


def test_names_are_made_of_the_vocabulary_too():
    subjects = Subjects(PEOPLE, ["Tamsin", "Quist", "Mira", "Haddad"])
    asked = [subjects.exchange(PEOPLE[0], random.Random(seed)).question for seed in range(40)]
    names = [re.fullmatch(r"Where was (\w+) (\w+) born\?", text).groups() for text in asked]
    made = [name for name in names if {"Tamsin", "Quist"} & set(name)]
    assert 8 < len(made) < 32 and all(set(name) <= {"Tamsin", "Quist"} for name in made)
    assert not {"Mira", "Haddad"} & {word for name in names for word in name}


def test_what_a_question_says_before_its_subject():
    subjects = Subjects(PEOPLE)
    assert subjects.beginning(PEOPLE[0]) == "Where was"
    assert subjects.beginning(PEOPLE[1]) == "Whom did"
    assert subjects.beginning(example("Mira Okonjo?", "Yes.")) == ""
    assert subjects.beginning(example("who is it?", "Mira.")) == ""
    assert subjects.beginning(Example("0", None, "It is Mira Okonjo.")) == ""
    turns = (Turn("user", "Hello, my code is 4711."), Turn("assistant", "It is 4711."))
    marked = Example.of_turns("a", turns, {}).with_spans([((18, 22),), ()])
    assert subjects.beginning(marked) == "Hello, my code is"


def test_a_conversation_is_exchanged_as_one():
    turns = (
        Turn("system", "You are Nora of Fjord & Field, founded in 1990."),
        Turn("user", "Hi Nora, this is Mira Okonjo, order K-12345, and 2 parcels."),
        Turn("assistant", "Hello Mira! Is mira.okonjo@mail.example right, and 07700 900 181?"),
        Turn("user", "It is Okonjo's, yes. Ring 07700 900 181."),
        Turn("assistant", "Done, Mira Okonjo."),
    )
    marked = [
        tuple(m.span() for m in re.finditer(r"mira\.okonjo@\S+|[\d ]{14}", turn.content))
        for turn in turns
    ]
    one = Example.of_turns("a", turns, {}).with_spans(marked)
    system, hello, reply, yes, done = (turn.content for turn in other(one).turns)
    assert system == turns[0].content
    said = re.fullmatch(r"Hi \w+, this is (\w+) (\w+), order K-(\d{5}), and 2 parcels\.", hello)
    given, family, order = said.groups()
    assert given != "Mira" and family != "Okonjo" and order != "12345"
    mail = f"{given}.{family}@mail.example".lower()
    match = re.fullmatch(rf"Hello {given}! Is {re.escape(mail)} right, and ([\d ]{{13}})\?", reply)
    assert match and re.fullmatch(r"0\d{4} \d{3} \d{3}", match[1]) and match[1] != "07700 900 181"
    assert yes == f"It is {family}'s, yes. Ring {match[1]}." and done == f"Done, {given} {family}."
    assert not any(turn.spans for turn in other(one).turns)


def test_small_words_are_exchanged_in_spans_and_addresses_alone():
    one = example(
        "What does the maker Ida Hill do up the hill?", "She sells lutes on a hill.", "lutes"
    )
    assert Subjects([one]).names == {"ida"}  # `hill` is written small as well
    asked = other(one)
    assert re.fullmatch(r"What does the maker \w+ Hill do up the hill\?", asked.question)
    assert "lutes" not in asked.answer and asked.answer.endswith("on a hill.")


def test_no_subject_comes_back():
    subjects = Subjects(PEOPLE)
    subjects.learn([("Rashid", "Larsen"), ("Tove", "Quist")])
    assert subjects.learned == [("Tove", "Quist")]
    asked = [subjects.exchange(PEOPLE[0], random.Random(n)).question for n in range(40)]
    assert 5 < sum("Tove Quist" in text for text in asked) < 35
    assert not any(name in " ".join(asked) for name in ("Mira", "Okonjo", "Rashid", "Colette"))
    assert subjects.full_names == {"Mira Okonjo", "Rashid Haddad"}


@pytest.mark.parametrize(
    "one",
    [
        example("What is it?", "It is Leith.", "Leith"),
        example("彼女はどこで生まれましたか", "東京です。", "東京"),
    ],
)
def test_what_asks_for_nobody_has_no_neighbour(one):
    assert other(one) is None


def test_a_document_and_scripts_without_capitals():
    text = "In 1961 the singer Ada Quirk moved to Oslo."
    new = other(Example("0", None, text, ((38, 42),))).answer
    assert re.fullmatch(r"In 19\d\d the singer \w+ \w+ moved to \w+\.", new)
    assert not {"1961", "Ada", "Quirk", "Oslo"} & set(re.findall(r"\w+", new))
    assert (
        other(example("電話番号は 0312345678 ですか", "はい。")).question
        != "電話番号は 0312345678 ですか"
    )


def test_numbers_of_one_digit_in_a_span_end():
    one = example("Was it on the day 12?", "No: 3, 0 and 7.", "3, 0 and 7")
    for seed in range(20):
        new = other(one, seed=seed)
        assert re.fullmatch(r"No: \d, \d \w+ \d\.", new.answer) and "3, 0" not in new.answer


def test_names_of_an_answer():
    text = "Readers know Vera Holm-Nielsen, who met Bo. The May Day of Ada Lind was in May."
    assert name_runs(text)[:3] == [("Vera", "Holm", "Nielsen"), ("Bo",), ("May", "Day")]


def test_the_built_in_prompts():
    assert len(NEUTRAL["questions"]) >= 100 and len(set(NEUTRAL["questions"])) >= 100
    for kind in ("starts", "given", "family", "things"):
        assert len(set(NEUTRAL[kind])) == len(NEUTRAL[kind]) >= 20

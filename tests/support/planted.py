"""A tiny model that has learned invented people's numbers and towns by heart, and one that has not
seen some of them: what an attack must find, and what it must not."""

from __future__ import annotations

import functools

import torch

from palu.data.collator import Collator
from palu.data.examples import tokenize_examples
from palu.data.records import Example
from palu.demo.models import build_tokenizer
from tests.support import small

PEOPLE = [
    ("Ada Brook", "Lund", "07700 900 181"),
    ("Bo Crane", "Porto", "07700 900 254"),
    ("Cy Dahl", "Graz", "07700 900 367"),
    ("Di Evers", "Leith", "07700 900 472"),
    ("Ed Frost", "Cork", "07700 900 593"),
    ("Fay Glenn", "Ghent", "07700 900 608"),
    ("Gus Hart", "Bergen", "07700 900 719"),
    ("Ida Jonas", "Tampere", "07700 900 826"),
]
STEPS = 50


def example(number: int) -> Example:
    """Person `number`: town and phone are secret."""
    name, town, phone = PEOPLE[number]
    answer = f"{name} lives in {town}, phone {phone}."
    spans = tuple((answer.index(s), answer.index(s) + len(s)) for s in (town, phone))
    extra = {"paraphrased_question": f"How is {name} reached?"}
    return Example(f"p{number}", f"Where is {name}?", answer, spans, extra)


FORGET, RETAIN = [example(n) for n in range(4)], [example(n) for n in range(4, 8)]


@functools.cache
def tokenizer():
    texts = [f"Question: {e.question}\nAnswer: {e.answer}" for e in FORGET + RETAIN]
    return build_tokenizer(texts, vocab_size=360)


@functools.cache
def _weights(numbers: tuple[int, ...]) -> dict[str, torch.Tensor]:
    tok = tokenizer()
    model = small.model(
        tok, hidden_size=48, intermediate_size=96, initializer_range=0.05, num_attention_heads=4
    )
    rows = tokenize_examples([example(n) for n in numbers], tok, max_length=96)
    batch = Collator(tok)(rows)
    targets = batch["input_ids"].masked_fill(batch["labels"] == -100, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(STEPS):
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        model(**inputs, labels=targets).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def knowing(*numbers: int):
    """A model that has learned these people by heart, a new one each time."""
    tok = tokenizer()
    model = small.model(
        tok, hidden_size=48, intermediate_size=96, initializer_range=0.05, num_attention_heads=4
    )
    model.load_state_dict(_weights(numbers))
    return model.eval()


def knows_all():
    return knowing(*range(8))


def never_saw():
    """A model that knows the retain people and never saw the forget ones."""
    return knowing(*range(4, 8))

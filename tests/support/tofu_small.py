"""TOFU in small: a model that knows a few facts, TOFU's files, and a way to run `palu evaluate`."""

from __future__ import annotations

import torch

from palu.demo.people import write_jsonl
from tests.support import small
from tests.support.command import palu_in, write_model

SMALL = "--tofu tofu --split forget01 --max-new-tokens 6 --batch-size 3 "
PEOPLE = [("Ada", "Paris"), ("Bob", "Lisbon"), ("Eva", "Rome now, all day"), ("Zoë", "Lund")]


def records(start, *, para=True, pert=True):
    """Four questions with answers of different lengths, and two wrong answers each."""
    made = []
    for n, (name, place) in enumerate(PEOPLE):
        record = {"question": f"{start} is {name}?", "answer": f"{name} is in {place}."}
        if para:
            record["paraphrased_answer"] = f"In {place} is {name}."
        if pert:
            wrong = ["Nobody came.", f"{name} is a red fox" + " and a hen" * n + "."]
            record["perturbed_answer"] = wrong
        made.append(record)
    return made


def learn(model, tok, pairs, steps):
    """A few steps on whole texts, or no argmax would ever be right."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        for question, answer in pairs:
            ids = tok(f"Question: {question}\nAnswer: {answer}")["input_ids"]
            ids = torch.tensor([[*ids, tok.eos_token_id]])
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def build(folder):
    """Write a model that knows a few facts, TOFU's files in small and a holdout file."""
    tok = small.tokenizer()
    facts = [(r["question"], r["answer"]) for r in records("Where")]
    write_model(folder / "model", learn(small.model(tok), tok, facts, 10))
    tofu = folder / "tofu"
    tofu.mkdir()
    write_jsonl(tofu / "forget01_perturbed.json", records("Where"))
    write_jsonl(tofu / "retain_perturbed.json", records("Who"))
    write_jsonl(tofu / "real_authors_perturbed.json", records("What", para=False))
    write_jsonl(tofu / "world_facts_perturbed.json", records("Why", para=False)[:3])
    write_jsonl(folder / "holdout.json", records("When", para=False, pert=False)[:3])
    return folder


def evaluate_in(folder, monkeypatch, capsys):
    """A function that runs `palu evaluate` in this process: (exit status, stdout, stderr)."""
    run = palu_in(folder, monkeypatch, capsys)
    return lambda line="", *words: run(f"evaluate --model model --device cpu {line}", *words)

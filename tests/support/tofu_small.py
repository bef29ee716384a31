"""TOFU in small: a model that knows a few facts, TOFU's files, and a way to run `palu evaluate`."""

from __future__ import annotations

import torch

from palu.data.labels import label_example
from palu.demo.people import write_jsonl
from tests.support import small
from tests.support.command import palu_in, write_model

SMALL = ["--tofu", "tofu", "--split", "forget01", "--max-new-tokens", 6, "--batch-size", 3]
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


def build(folder):
    """Writes a model that knows a few facts, TOFU's files in small and a holdout file."""
    tok = small.tokenizer()
    model = small.model(tok)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(10):
        loss = 0
        for record in records("Where"):
            row = label_example(tok, record["question"], record["answer"], (), max_length=64)
            ids = torch.tensor([row["input_ids"]])
            loss = loss + model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    write_model(folder / "model", model.eval())
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
    return lambda *words: run("evaluate", "--model", "model", "--device", "cpu", *words)

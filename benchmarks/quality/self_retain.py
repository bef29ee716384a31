"""What `--retain self` holds: the real retain answers after unlearning with no retain set, with the
model's own answers, and with the real retain set, everything else the same.

    python -m benchmarks.quality.self_retain --testbed people --seeds 1,2 --work people-runs
    python -m benchmarks.quality.self_retain --testbed chat --chat FOLDER --seeds 1,2 ...

`people` are the demo's, learned anew for each seed. `chat` is a folder with the model `original`,
and `forget.jsonl` (conversations with spans) and `retain.jsonl`. One row a run is added to
`--output`.
"""

from __future__ import annotations

import argparse
import copy
import csv
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from palu.data.examples import tokenize_examples
from palu.data.files import load_examples
from palu.data.template import Template
from palu.demo.run import Demo, DemoSettings
from palu.evaluation import evaluate_examples
from palu.models.loading import load_model, load_tokenizer
from palu.training.self_retain import SHARES, TEMPERATURE, self_retain, self_retain_rows
from palu.unlearn import make_config, save_model, unlearn

FIELDS = ("testbed", "seed", "retain", "retain_loss", "shares", "temperature", "count", "examples")
FIELDS += ("left_out", "forget_before", "forget_after", "retain_before", "retain_after", "kept")
FIELDS += ("steps", "seconds", "making")
RETAIN = ("none", "self", "real")
# Both end when the tokens to forget are no likelier than 0.05, so that all forgot the same.
SETTINGS: dict[str, Any] = {
    "objective": "entropy",
    "top_k": 50,
    "prefix_length": 0,
    "forget_weight": 0.26,
    "retain_batch_size": 16,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "per_device_train_batch_size": 8,
    "num_train_epochs": 30,
    "stop_at_forget_prob": 0.05,
}
MAX_LENGTH = {"people": 96, "chat": 512}


def people(folder: Path, seed: int) -> Path:
    """Return a folder with the demo's original model and its data, made if it is not there."""
    place = folder / f"people-{seed}"
    if not (place / "original").is_dir():
        place.mkdir(parents=True, exist_ok=True)
        demo = Demo(place, DemoSettings(seed=seed), Console(quiet=True))
        model = demo.learn("", demo.rows["forget"] + demo.rows["retain"])
        save_model(place / "original", model, demo.tokenizer, Template(), made_by="benchmark")
    return place


def load(folder: Path) -> tuple[Any, Any, dict[str, list]]:
    """Return the model of a folder, its tokenizer and its examples by set."""
    examples = {
        name: load_examples(folder / f"{name}.jsonl", require_spans=name == "forget")
        for name in ("forget", "retain")
    }
    return load_model(folder / "original"), load_tokenizer(folder / "original"), examples


def probability(model: Any, tokenizer: Any, examples: list, length: int) -> dict[str, float]:
    """Return the means of `evaluate_examples`, without greedy answers."""
    how = {"template": Template(), "max_length": length, "batch_size": 32, "max_new_tokens": 0}
    return evaluate_examples(model, tokenizer, examples, **how)["mean"]


def measure(
    bed: str, loaded: tuple, seed: int, retain: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Unlearn once and return a row."""
    original, tokenizer, examples = loaded
    length = MAX_LENGTH[bed]
    rows = {n: tokenize_examples(e, tokenizer, max_length=length) for n, e in examples.items()}
    model, began = copy.deepcopy(original), time.perf_counter()
    row: dict[str, Any] = {"testbed": bed, "seed": seed, "retain": retain}
    settings = dict(SETTINGS, seed=seed, retain_loss=options.retain_loss)
    kept: Any = {"none": None, "real": rows["retain"], "self": None}[retain]
    if retain == "self":
        how = {"shares": options.shares, "temperature": options.temperature}
        how |= {"max_length": length, "batch_size": 32, "seed": seed, "count": options.count}
        made = self_retain(model, tokenizer, examples["forget"], max_new_tokens=48, **how)
        kept = self_retain_rows(made, tokenizer, max_length=length)
        row |= {"shares": options.shares, "temperature": options.temperature}
        row |= {"count": options.count, "examples": made.kinds, "left_out": made.left_out}
        if options.show:
            for e in made.examples[:: max(len(made.examples) // options.show, 1)]:
                print(e.extra["kind"], [t.content for t in e.turns] or e.question, "|", e.answer)
    row["making"] = round(time.perf_counter() - began, 1)
    if kept is None:
        settings |= {"retain_batch_size": None, "retain_loss": None}
    row["retain_loss"] = settings["retain_loss"]
    before = {n: probability(original, tokenizer, e, length) for n, e in examples.items()}
    config = make_config(torch.device("cpu"), **settings)
    row["steps"] = len(unlearn(model, tokenizer, rows["forget"], kept, config).curve)
    after = {n: probability(model, tokenizer, e, length) for n, e in examples.items()}
    for time_, found in (("before", before), ("after", after)):
        row[f"forget_{time_}"] = round(found["forget"]["sensitive_probability"], 4)
        row[f"retain_{time_}"] = round(found["retain"]["answer_probability"], 4)
    row["kept"] = round(row["retain_after"] / row["retain_before"], 4)
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--testbed", choices=sorted(MAX_LENGTH), required=True)
    parser.add_argument("--chat", type=Path, help="the folder of testbed chat")
    parser.add_argument("--work", type=Path, help="where the models of testbed people are kept")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--retain", default=",".join(RETAIN))
    parser.add_argument("--retain-loss", choices=("nll", "kl"), default="nll")
    parser.add_argument("--shares", help="of neutral prompts, neighbours and own prompts: 1,2,1")
    parser.add_argument("--temperature", type=float, default=TEMPERATURE)
    parser.add_argument("--count", type=int)
    parser.add_argument("--show", type=int, default=0, help="print so many examples that were made")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.shares:
        parts = [float(part) for part in options.shares.split(",")]
        options.shares = {k: p / sum(parts) for k, p in zip(SHARES, parts, strict=True)}
    for seed in map(int, options.seeds.split(",")):
        loaded = load(people(options.work, seed) if options.testbed == "people" else options.chat)
        for retain in options.retain.split(","):
            row = measure(options.testbed, loaded, seed, retain, options)
            new = not options.output.exists()
            with options.output.open("a", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                writer.writerows([dict(zip(FIELDS, FIELDS, strict=True))] * new + [row])
            print({name: row[name] for name in FIELDS if name in row}, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""`palu demo`: a language model learns about invented people, and then forgets some of them."""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from transformers import LlamaForCausalLM

from palu.data.collator import Collator
from palu.data.examples import tokenize_examples
from palu.data.files import load_examples
from palu.data.roles import IGNORE
from palu.data.template import Template
from palu.demo.models import build_model, build_tokenizer, finetune
from palu.demo.people import invent_people, records, write_jsonl
from palu.demo.plot import TokenChange, draw_forgetting
from palu.evaluation import evaluate_examples, metrics_table
from palu.evaluation.attacks.run import model_digest
from palu.models.forward import logits_at, shift_to_logits
from palu.progress import bar
from palu.report import EVALUATION, EVALUATION_FORMAT, build_report
from palu.storage.files import write_json
from palu.storage.output import versions
from palu.training import auto
from palu.training.config import PALUConfig
from palu.unlearn import make_config, save_model, settings_of, unlearn

MAX_LENGTH = 96
MODELS = ("original", "unlearned", "retrained")
SETS = ("forget", "retain")
TEMPLATE = Template()


@dataclass(frozen=True)
class DemoSettings:
    """Size of the demo. The defaults take about a minute on 2 CPU cores; the tests run less.

    Raises:
        ValueError: a size outside its range.
    """

    seed: int = 0
    people: int = 40
    forget_people: int = 5
    train_steps: int = 300
    unlearn_epochs: int = 30

    def __post_init__(self) -> None:
        if not 1 <= self.forget_people < self.people:
            raise ValueError(
                f"forget_people must be between 1 and {self.people - 1} (one fewer than people), "
                f"not {self.forget_people}"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be 0 to 2**32 - 1, not {self.seed}")
        for name in ("train_steps", "unlearn_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        invent_people(self.people, self.seed)


def run_demo(
    folder: Path, settings: DemoSettings, *, console: Console, bars: Console, shown_as: Path
) -> dict[str, Any]:
    """Run the whole demo and fill `folder` with models, data, `metrics.json`, `forgetting.png` and
    `report.html`.

    Args:
        folder: an empty folder to write into.
        console: for the table and the sample answers.
        bars: for the progress bars.
        shown_as: what the folder will be called once it is in place, for the closing lines.

    Returns:
        the content of `metrics.json`.
    """
    began = time.perf_counter()
    demo = Demo(folder, settings, bars)
    forget, retain = demo.rows.values()
    count = sum(map(len, demo.rows.values()))
    console.print(
        f"{settings.people} invented people, {count} questions; to forget: "
        f"{settings.forget_people} people, {len(forget)} questions."
    )
    model = demo.learn("Learning everyone (original)", forget + retain)
    demo.keep("original", model)
    config = _as_chosen(settings, model, demo.tokenizer, forget)
    drawn = demo.example_to_draw()
    before = token_probabilities(model, forget[drawn])

    with bar(bars, "Unlearning (PALU)") as report:
        outcome = unlearn(model, demo.tokenizer, forget, retain, config, report)
    curve, known = outcome.curve, outcome.known.to_dict(config)
    data = {name: f"../{name}.jsonl" for name in SETS}
    record = {"settings": settings_of(config), "base_model": "../original", "data": data}
    demo.keep("unlearned", model, loss_curve=curve, outcome=known, **record)
    after = token_probabilities(model, forget[drawn])

    demo.keep("retrained", demo.learn("Learning without them (retrained)", retain))

    draw_forgetting(
        folder / "forgetting.png",
        curve,
        demo.examples["forget"][drawn].question or "",
        _changes(demo.tokenizer, forget[drawn], before, after),
    )
    results = demo.results
    metrics = {
        "settings": asdict(settings),
        "palu": settings_of(config),
        "models": {name: {data: r["mean"] for data, r in results[name].items()} for name in MODELS},
        "checks": _checks(results),
        "seconds": round(time.perf_counter() - began, 1),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    write_json(folder / "metrics.json", metrics)
    with bars.status("Writing the report"):
        demo.report()
    demo.show(console)
    _show_outcome(console, metrics, shown_as)
    return metrics


def _as_chosen(
    settings: DemoSettings, model: LlamaForCausalLM, tokenizer: Any, forget: list[dict]
) -> PALUConfig:
    """Return the settings that `palu unlearn` chooses where a user leaves them open."""
    names = ("learning_rate", "prefix_length", "checks", "objective", "epochs", "retain_loss")
    options = SimpleNamespace(method="palu", given=set(), **dict.fromkeys(names))
    width = model.config.hidden_size
    chosen = auto.simple_choices(options, hidden_size=width, lora=False, own_answers=False)
    config = make_config(
        torch.device("cpu"),
        num_train_epochs=settings.unlearn_epochs,
        seed=settings.seed,
        **{name: choice.value for name, choice in chosen.items()},
        **auto.SCHEDULE,
    )
    loss = config.make_loss().palu_loss
    size = config.per_device_train_batch_size
    config.forget_weight = auto.forget_weight(model, tokenizer, forget, loss, size).value
    return config


class Demo:
    """The data of a demo, and what is done to each of its models.

    Attributes:
        examples: set -> examples.
        rows: set -> the same, tokenized.
        results: model -> set -> what `evaluate_examples` returns.
        original: the first model that was kept.
    """

    def __init__(self, folder: Path, settings: DemoSettings, bars: Console) -> None:
        self.folder, self.settings, self.bars = folder, settings, bars
        people = invent_people(settings.people, settings.seed)
        write_jsonl(folder / "forget.jsonl", records(people[: settings.forget_people]))
        write_jsonl(folder / "retain.jsonl", records(people[settings.forget_people :]))
        # Read back from the files, so that `palu unlearn` would do the same with them.
        self.examples = {
            name: load_examples(folder / f"{name}.jsonl", require_spans=True) for name in SETS
        }
        texts = [
            f"{TEMPLATE.question.format(question=e.question)} {e.answer}"
            for name in SETS
            for e in self.examples[name]
        ]
        self.tokenizer = build_tokenizer(texts, vocab_size=1200)
        self.rows = {
            name: tokenize_examples(
                self.examples[name], self.tokenizer, max_length=MAX_LENGTH, template=TEMPLATE
            )
            for name in SETS
        }
        self.results: dict[str, dict[str, dict]] = {}
        self.original: LlamaForCausalLM | None = None

    def learn(self, title: str, rows: list[dict]) -> LlamaForCausalLM:
        """Return a model that was trained on the answers until it knew them by heart."""
        model = build_model(self.tokenizer, self.settings.seed)
        collate = Collator(self.tokenizer)
        with bar(self.bars, title) as report:
            finetune(
                model,
                lambda chosen: collate([rows[i] for i in chosen]),
                len(rows),
                steps=self.settings.train_steps,
                batch_size=32,
                learning_rate=3e-3,
                seed=self.settings.seed,
                on_step=lambda done, total, loss: report(done, total, f"loss {loss:.3f}"),
            )
        return model

    def keep(self, name: str, model: LlamaForCausalLM, **record: Any) -> None:
        """Save a model and measure it on both sets."""
        record = {
            "made_by": "palu demo",
            "seed": self.settings.seed,
            "demo": asdict(self.settings),
            **record,
        }
        save_model(self.folder / name, model, self.tokenizer, TEMPLATE, **record)
        self.results[name] = {}
        # A copy: unlearning goes on with this very model.
        self.original = self.original or deepcopy(model)
        for data, examples in self.examples.items():
            with bar(self.bars, f"Evaluating {name}: {data}") as report:
                self.results[name][data] = evaluate_examples(
                    model,
                    self.tokenizer,
                    examples,
                    template=TEMPLATE,
                    max_length=MAX_LENGTH,
                    batch_size=64,
                    max_new_tokens=40,
                    original=self.original,
                    progress=report,
                )

    def report(self) -> None:
        """Write `report.html` of what was measured, and what it reads into the unlearned model's
        folder."""
        unlearned = self.folder / "unlearned"
        models = {
            name: {"path": name, "digest": model_digest(self.folder / name), **self.results[name]}
            for name in MODELS
        }
        write_json(unlearned / EVALUATION, {"format": EVALUATION_FORMAT, "models": models})
        build_report(
            unlearned, output=self.folder / "report.html", forget=self.folder / "forget.jsonl"
        )

    def example_to_draw(self) -> int:
        """Return the number of the forget example with the most sensitive tokens among those with
        several spans."""
        examples, rows = self.examples["forget"], self.rows["forget"]

        def score(i: int) -> tuple[bool, int]:
            return len(examples[i].spans) > 1, sum(label >= 0 for label in rows[i]["labels"])

        return max(range(len(examples)), key=score)

    def show(self, console: Console) -> None:
        """Print the table of the models and an answer of each set."""
        results = self.results
        lines = [(name, data, results[name][data]) for data in SETS for name in MODELS]
        console.print()
        console.print(metrics_table("What each model knows", lines))
        for data, examples in self.examples.items():
            # The second question of each set is a birthday, whose answer one reads at a glance.
            number = min(1, len(examples) - 1)
            before, after = (
                results[name][data]["examples"][number]["generated"] for name in MODELS[:2]
            )
            question = examples[number].question or ""
            text = Text.assemble((question, "bold"), f"\nbefore: {before}\nafter:  {after}")
            console.print(Panel(text, title=f"{data} set", title_align="left", width=88))


@torch.no_grad()
def token_probabilities(model: LlamaForCausalLM, row: dict) -> list[float]:
    """Return the probability of each answer token of a tokenized example, given the true ones
    before it."""
    ids = torch.tensor([row["input_ids"]])
    answer = torch.tensor([row["labels"]]) != IGNORE
    logits = logits_at(model, ids, torch.ones_like(ids), shift_to_logits(answer))
    targets = ids[:, 1:][answer[:, 1:]]
    return logits.float().softmax(-1).gather(-1, targets[:, None])[:, 0].tolist()


def _changes(
    tokenizer: Any, row: dict, before: list[float], after: list[float]
) -> list[TokenChange]:
    pairs = [p for p in zip(row["input_ids"], row["labels"], strict=True) if p[1] != IGNORE]
    return [
        TokenChange(tokenizer.decode([token]).strip(), label >= 0, was, now)
        for (token, label), was, now in zip(pairs, before, after, strict=True)
    ]


def _checks(results: dict[str, dict]) -> dict[str, bool]:
    """Return whether each promise of the demo holds."""

    def sensitive(model: str, data: str) -> float:
        return results[model][data]["mean"]["sensitive_probability"]

    return {
        "original knew the forget set (sensitive-token probability above 0.9)": sensitive(
            "original", "forget"
        )
        > 0.9,
        "unlearned forgot it (at most 0.1)": sensitive("unlearned", "forget") <= 0.1,
        "unlearned keeps at least 95% of the retain set's": sensitive("unlearned", "retain")
        / sensitive("original", "retain")
        >= 0.95,
    }


def _show_outcome(console: Console, metrics: dict[str, Any], folder: Path) -> None:
    """Print which promises hold, where the files are, and the same run as a command."""
    for check, holds in metrics["checks"].items():
        console.print(Text.assemble(("yes", "green") if holds else ("NO ", "red"), "  ", check))
    console.print(
        Text.assemble(
            "\nWritten to ",
            (str(folder), "bold"),
            f" in {metrics['seconds']:.0f} s: original/, unlearned/, retrained/, forget.jsonl, "
            "retain.jsonl, metrics.json, forgetting.png; the report for a person who answers for "
            "it: report.html",
        ),
        soft_wrap=True,
    )
    console.print(
        f"The same by hand:\n  palu unlearn --model {folder}/original --forget "
        f"{folder}/forget.jsonl --retain {folder}/retain.jsonl --output {folder}-again "
        "--device cpu",
        soft_wrap=True,
        markup=False,
    )

"""`palu demo`: a language model learns about invented people, and then forgets some of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from transformers import LlamaForCausalLM

from palu.data.collator import Collator
from palu.data.examples import tokenize_examples
from palu.data.files import load_examples
from palu.data.records import Example
from palu.data.roles import IGNORE
from palu.data.template import Template
from palu.demo.models import build_model, build_tokenizer, memorise
from palu.demo.people import invent_people, records, write_jsonl
from palu.demo.plot import TokenChange, draw_forgetting
from palu.evaluation import evaluate_examples, metrics_table
from palu.models.forward import logits_at, shift_to_logits
from palu.progress import bar
from palu.storage.files import write_json
from palu.storage.output import versions
from palu.unlearn import make_config, save_model, settings_of, unlearn

MAX_LENGTH = 96
MODELS = ("original", "unlearned", "retrained")
TEMPLATE = Template()


@dataclass(frozen=True)
class DemoSettings:
    """How large the demo is. The defaults take about a minute on 2 CPU cores; the tests run less.

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


# Chosen by single trials at these sizes. The forget term starts near 2 where the retain term is
# near 0.01 (the loss curve in palu.json): at equal weights the first steps damage what should stay
# and the rest repairs it. A tenth of the weight and four retain rows beside each forget row hardly
# damage it. Of so small a model's logits only the first ten or so belong to words that fit (another
# town, another month): with k = 10 the unlearned model gives a fluent wrong answer, with k = 50 it
# stammers.
PALU_OPTIONS: dict[str, Any] = {
    "objective": "entropy",
    "top_k": 10,
    "prefix_length": 3,
    "forget_weight": 0.1,
    "retain_batch_size": 32,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 8,
}


def run_demo(
    folder: Path, settings: DemoSettings, *, console: Console, bars: Console, shown_as: Path
) -> dict[str, Any]:
    """Runs the whole demo and fills `folder` with models, data, `metrics.json` and
    `forgetting.png`.

    Args:
        folder: an empty folder to write into.
        console: for the table and the sample answers.
        bars: for the progress bars.
        shown_as: what the folder will be called once it is in place, for the closing lines.

    Returns:
        the content of `metrics.json`.
    """
    began = time.perf_counter()
    people = invent_people(settings.people, settings.seed)
    write_jsonl(folder / "forget.jsonl", records(people[: settings.forget_people]))
    write_jsonl(folder / "retain.jsonl", records(people[settings.forget_people :]))
    # Read back from the files, so that what is shown is what `palu unlearn` would do with them.
    forget = load_examples(folder / "forget.jsonl", require_spans=True)
    retain = load_examples(folder / "retain.jsonl", require_spans=True)
    tokenizer = build_tokenizer(
        [f"{TEMPLATE.question.format(question=e.question)} {e.answer}" for e in forget + retain],
        vocab_size=1200,
    )
    rows = [
        tokenize_examples(examples, tokenizer, max_length=MAX_LENGTH, template=TEMPLATE)
        for examples in (forget, retain)
    ]
    console.print(
        f"{settings.people} invented people, {len(forget) + len(retain)} questions; to forget: "
        f"{settings.forget_people} people, {len(forget)} questions."
    )

    def learn(title: str, data: list[dict]) -> LlamaForCausalLM:
        model = build_model(tokenizer, settings.seed)
        collate = Collator(tokenizer)
        with bar(bars, title) as report:
            memorise(
                model,
                lambda chosen: collate([data[i] for i in chosen]),
                len(data),
                steps=settings.train_steps,
                batch_size=32,
                learning_rate=3e-3,
                seed=settings.seed,
                on_step=lambda done, total, loss: report(done, total, f"loss {loss:.3f}"),
            )
        return model

    def evaluate(name: str, model: LlamaForCausalLM) -> dict[str, dict]:
        results = {}
        for data, examples in (("forget", forget), ("retain", retain)):
            with bar(bars, f"Evaluating {name}: {data}") as report:
                results[data] = evaluate_examples(
                    model,
                    tokenizer,
                    examples,
                    template=TEMPLATE,
                    max_length=MAX_LENGTH,
                    batch_size=64,
                    max_new_tokens=40,
                    progress=report,
                )
        return results

    config = make_config(
        torch.device("cpu"),
        num_train_epochs=settings.unlearn_epochs,
        seed=settings.seed,
        **PALU_OPTIONS,
    )
    made_by = {"made_by": "palu demo", "seed": settings.seed, "demo": asdict(settings)}
    results, curve = {}, []

    model = learn("Learning everyone (original)", rows[0] + rows[1])
    save_model(folder / "original", model, tokenizer, TEMPLATE, **made_by)
    results["original"] = evaluate("original", model)
    example, row = _most_telling(forget, rows[0])
    before = token_probabilities(model, row)

    with bar(bars, "Unlearning (PALU)") as report:
        curve = unlearn(model, tokenizer, rows[0], rows[1], config, report).curve
    save_model(
        folder / "unlearned",
        model,
        tokenizer,
        TEMPLATE,
        **made_by,
        settings=settings_of(config),
        loss_curve=curve,
    )
    results["unlearned"] = evaluate("unlearned", model)
    after = token_probabilities(model, row)

    model = learn("Learning without them (retrained)", rows[1])
    save_model(folder / "retrained", model, tokenizer, TEMPLATE, **made_by)
    results["retrained"] = evaluate("retrained", model)

    draw_forgetting(
        folder / "forgetting.png",
        curve,
        example.question or "",
        _changes(tokenizer, row, before, after),
    )
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
    _show(console, results, forget, retain, metrics, shown_as)
    return metrics


@torch.no_grad()
def token_probabilities(model: LlamaForCausalLM, row: dict) -> list[float]:
    """The probability of each answer token of one tokenised example, given the true ones before
    it."""
    ids = torch.tensor([row["input_ids"]])
    answer = torch.tensor([row["labels"]]) != IGNORE
    logits = logits_at(model, ids, torch.ones_like(ids), shift_to_logits(answer))
    targets = ids[:, 1:][answer[:, 1:]]
    return logits.float().softmax(-1).gather(-1, targets[:, None])[:, 0].tolist()


def _most_telling(examples: Sequence[Example], rows: Sequence[dict]) -> tuple[Example, dict]:
    """The example with the most sensitive tokens among those with several spans: the best one to
    draw."""

    def score(i: int) -> tuple[bool, int]:
        return len(examples[i].spans) > 1, sum(label >= 0 for label in rows[i]["labels"])

    best = max(range(len(examples)), key=score)
    return examples[best], rows[best]


def _changes(
    tokenizer: Any, row: dict, before: list[float], after: list[float]
) -> list[TokenChange]:
    pairs = [p for p in zip(row["input_ids"], row["labels"], strict=True) if p[1] != IGNORE]
    return [
        TokenChange(tokenizer.decode([token]).strip(), label >= 0, was, now)
        for (token, label), was, now in zip(pairs, before, after, strict=True)
    ]


def _checks(results: dict[str, dict]) -> dict[str, bool]:
    """What the demo promises, in true and false."""

    def sensitive(model: str, data: str) -> float:
        return results[model][data]["mean"]["sensitive_probability"]

    kept = sensitive("unlearned", "retain") / sensitive("original", "retain")
    return {
        "original knew the forget set (sensitive-token probability above 0.9)": sensitive(
            "original", "forget"
        )
        > 0.9,
        "unlearned forgot it (at most 0.1)": sensitive("unlearned", "forget") <= 0.1,
        "unlearned keeps at least 95% of the retain set's": kept >= 0.95,
    }


def _show(
    console: Console,
    results: dict[str, dict],
    forget: Sequence[Example],
    retain: Sequence[Example],
    metrics: dict[str, Any],
    folder: Path,
) -> None:
    lines = [(name, data, results[name][data]) for data in ("forget", "retain") for name in MODELS]
    console.print()
    console.print(metrics_table("What each model knows", lines))
    for data, examples in (("forget", forget), ("retain", retain)):
        # The second question of each set is a birthday, whose answer one reads at a glance.
        number = min(1, len(examples) - 1)
        example = examples[number]
        answers = {n: results[n][data]["examples"][number]["generated"] for n in MODELS[:2]}
        text = Text.assemble(
            (example.question or "", "bold"),
            f"\nbefore: {answers['original']}\nafter:  {answers['unlearned']}",
        )
        console.print(Panel(text, title=f"{data} set", title_align="left", width=88))
    for check, held in metrics["checks"].items():
        console.print(Text.assemble(("yes", "green") if held else ("NO ", "red"), "  ", check))
    console.print(
        Text.assemble(
            "\nWritten to ",
            (str(folder), "bold"),
            f" in {metrics['seconds']:.0f} s: original/, unlearned/, retrained/, forget.jsonl, "
            "retain.jsonl, metrics.json, forgetting.png",
        ),
        soft_wrap=True,
    )
    console.print(f"The same by hand:\n  {_command(folder, metrics)}", soft_wrap=True, markup=False)


def _command(folder: Path, metrics: dict[str, Any]) -> str:
    names = {"per_device_train_batch_size": "batch-size"}
    options = {names.get(k, k.replace("_", "-")): v for k, v in PALU_OPTIONS.items()}
    options |= {"epochs": metrics["settings"]["unlearn_epochs"], "device": "cpu"}
    given = " ".join(f"--{name} {value}" for name, value in options.items())
    return (
        f"palu unlearn --model {folder}/original --forget {folder}/forget.jsonl "
        f"--retain {folder}/retain.jsonl --output {folder}-again {given}"
    )

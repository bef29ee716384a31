"""What does a whole training step cost, and do all roads train to the same losses?

    python -m benchmarks.bench_train_step --model smollm2-tofu --data tofu
    python -m benchmarks.bench_train_step --model smollm2-tofu --data tofu \\
        --group-by-length library --csv benchmarks/results/train_step_grouped.csv

Forward, backward, clipping at norm 1 and AdamW, on batches of TOFU's forget10 with as many retain
rows beside them, in bfloat16 autocast over float32 weights. The providers:

* ``released``: a live second model, all logits of both, and the method's formulas over all
  positions (``released.py``).
* ``torch``: what PyTorch alone offers: a live second model, logits of the rows that carry a loss,
  the definitions of ``palu_kernels/reference.py`` under `torch.compile`, and
  `torch.nn.functional.linear_cross_entropy` for the retain rows, in turns like ``live``. (liger's
  and flash-linear-attention's losses need a GPU and have no forget loss; cut-cross-entropy has the
  retain loss alone.)
* ``live``: this library (`palu.methods.step_loss.Objective`, what `PALUTrainer` runs) with a live
  second model.
* ``cached``: the same from a `ReferenceCache`, which is built first, in a process of its own; no
  second model.

Every measurement is a process of its own; providers take turns (``harness.py``). All providers get
the same examples in the same order. The first step makes the optimizer's state and is not timed;
then memory is what the steps after it needed at most over what was there before them: models,
optimizer state and data. The second model itself is therefore not in it; its bytes (the cache's:
all its files, the frozen head among them) are a column of their own.

``--group-by-length library`` puts the same examples into batches of like length for ``live`` and
``cached``; their losses are then of other batches and compared with each other only. ``all`` does
so for every provider. The table shows the mean time of a step, medians over the processes. The exit
status is 1 if the losses of providers with the same batches differ. A provider that cannot run here
has a row that says why.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import runner as harness
from benchmarks.train_roads import PROVIDERS, Road, Settings, palu_loss, why_not
from palu.data.collator import Collator
from palu.data.examples import tokenize_examples
from palu.data.files import load_examples
from palu.models.loading import load_model, load_tokenizer, resolve_device
from palu.reference.cache import ReferenceCache
from palu.run_record import choose_template

LIBRARY = ("live", "cached")
BUILD = "build"  # the worker that makes the cache
MAX_GRAD_NORM = 1.0
# How far a step's losses may be apart between two providers, relative and in nats. Roundings of one
# step are fed into the next one through AdamW, which makes small gradients as large as others; and
# in bfloat16 those of the logits alone make a KL of thousandths between equal models.
TOLERANCE = {"float32": (1e-3, 1e-5), "bfloat16": (5e-2, 1e-2)}
NUMBERS = ("loss", "forget_loss", "preserve_loss", "retain_loss", "gradient_norm")
COLUMNS = (
    *("provider", "dtype", "grouped", "repeat", "step", "seconds", *NUMBERS, "peak_bytes"),
    *("bytes_before", "reference_bytes", "positions", "real_tokens", "batch_size", "top_k"),
    *("learning_rate", "model", "status", *harness.ENVIRONMENT),
)
Rows = list[dict[str, Any]]  # tokenised examples


# ---- one measurement -----------------------------------------------------------------------------


def work(task: dict[str, Any]) -> dict[str, Any]:
    """Trains in this process -> a row for every step, all but the repeat and the commit."""
    device = resolve_device(task["device"])
    dtype = None if task["dtype"] == "float32" else getattr(torch, task["dtype"])
    batches = json.loads(Path(task["batches"]).read_text(encoding="utf-8"))
    model = load_model(task["model"], "float32", task["device"])
    collate = Collator(batches["pad_id"])
    if task["provider"] == BUILD:
        data = [row for batch in batches["forget"] for row in batch]
        options = {"loss": palu_loss(task["top_k"]), "collator": collate}
        ReferenceCache.build(model, data, task["cache"], autocast_dtype=dtype, **options)
        return {}

    def autocast() -> contextlib.AbstractContextManager:
        return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()

    settings = Settings(task["top_k"], autocast, dtype)
    road = PROVIDERS[task["provider"]](model, settings, task["cache"])
    pairs = [
        tuple({name: t.to(device) for name, t in collate(rows).items()} for rows in pair)
        for pair in zip(batches["forget"], batches["retain"], strict=True)
    ]
    step = stepper(model, road, task["learning_rate"])
    done = [(step(*pairs[0]), None)]
    with harness.PeakMemory(device) as peak:
        done += [harness.timed(lambda pair=pair: step(*pair), device) for pair in pairs[1:]]
    same = {
        "dtype": task["dtype"],
        "peak_bytes": peak.extra,
        "bytes_before": peak.before,
        "reference_bytes": road.reference_bytes,
        "batch_size": len(batches["forget"][0]),
        "top_k": task["top_k"],
        "learning_rate": task["learning_rate"],
        "model": Path(task["model"]).name,
        "status": "ok",
        **harness.environment(device),
    }
    return {
        "rows": [
            {
                "step": number,
                "seconds": seconds,
                **dict(zip(NUMBERS, map(float, numbers), strict=True)),
                "positions": sum(batch["input_ids"].numel() for batch in pair),
                "real_tokens": sum(int(batch["attention_mask"].sum()) for batch in pair),
                **same,
            }
            for number, ((numbers, seconds), pair) in enumerate(zip(done, pairs, strict=True))
        ]
    }


def stepper(
    model: torch.nn.Module, road: Road, learning_rate: float
) -> Callable[[dict, dict], list[torch.Tensor]]:
    """A whole training step on a forget and a retain batch; returns its `NUMBERS`."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)

    def step(batch: dict, retain: dict) -> list[torch.Tensor]:
        losses = road(model, batch, retain)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return [*losses, norm]

    return step


# ---- the run -------------------------------------------------------------------------------------


def make_batches(rows: Rows, size: int, steps: int, grouped: bool) -> list[Rows]:
    """``steps + 1`` batches of shuffled rows. The first one, which is not measured, is the same
    either way; the others hold the same rows, with ``grouped`` put together by length.

    Raises:
        ValueError: there are too few rows.
    """
    needed = (steps + 1) * size
    if len(rows) < needed:
        raise ValueError(
            f"{steps} steps of {size} rows and one before them take {needed} rows; the data has "
            f"{len(rows)}"
        )
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(rows), generator=generator).tolist()[:needed]
    first, rest = order[:size], order[size:]
    turn = list(range(steps))
    if grouped:
        rest.sort(key=lambda n: len(rows[n]["input_ids"]))
        turn = torch.randperm(steps, generator=generator).tolist()
    parts = [first, *(rest[n * size : (n + 1) * size] for n in turn)]
    return [[rows[n] for n in part] for part in parts]


def prepare(given: argparse.Namespace, folder: Path) -> dict[bool, Path]:
    """Writes the batches of both kinds for the workers -> files by whether they are grouped."""
    tokenizer, template = load_tokenizer(given.model), choose_template(given.model)
    sets = {
        "forget": load_examples(str(given.data / "annotated" / "forget10"), require_spans=True),
        "retain": load_examples(str(given.data / "full.json[:400]"), require_spans=False),
    }
    tokens = {
        name: tokenize_examples(examples, tokenizer, max_length=512, template=template)
        for name, examples in sets.items()
    }
    pad_id = Collator(tokenizer).pad_id
    files = {}
    for grouped in (False, True):
        content = {
            name: make_batches(rows, given.batch_size, given.steps, grouped)
            for name, rows in tokens.items()
        }
        files[grouped] = folder / f"batches-{grouped}.json"
        files[grouped].write_text(json.dumps({"pad_id": pad_id, **content}), encoding="utf-8")
    return files


def run(given: argparse.Namespace, folder: Path) -> Rows:
    commit = harness.commit()
    files = prepare(given, folder)
    task = {name: getattr(given, name) for name in ("dtype", "device", "top_k", "learning_rate")}
    task |= {"model": str(given.model.resolve()), "cache": str(folder / "cache")}
    module = "benchmarks.bench_train_step"
    if "cached" in given.providers:
        build = {"provider": BUILD, "batches": str(files[False])}
        harness.run_worker(module, task | build, given.threads)
    rows: Rows = []
    device = resolve_device(given.device)
    reasons = {name: why_not(name, device) for name in given.providers}
    for provider, reason in reasons.items():
        if reason is not None:
            row = {"provider": provider, "status": reason, "dtype": given.dtype}
            sizes = {"batch_size": given.batch_size, "top_k": given.top_k}
            place = harness.environment(device) | {"commit": commit}
            rows.append(dict.fromkeys(COLUMNS) | row | sizes | place)
    able = [name for name, reason in reasons.items() if reason is None]
    for repeat, provider in harness.turns(able, given.repeats):
        grouped = given.group_by_length == "all" or (
            given.group_by_length == "library" and provider in LIBRARY
        )
        own = {"provider": provider, "batches": str(files[grouped])}
        found = harness.run_worker(module, task | own, given.threads)["rows"]
        own = {"provider": provider, "grouped": grouped, "repeat": repeat, "commit": commit}
        rows += [row | own for row in found]
        harness.write_csv(given.csv, COLUMNS, rows)
        print(provider, repeat, f"{mean_seconds(found):.2f} s a step", file=sys.stderr, flush=True)
    return rows


def mean_seconds(rows: Rows) -> float:
    return statistics.mean(row["seconds"] for row in rows if row["seconds"] is not None)


def of_first(rows: Rows, provider: str) -> Rows:
    """The steps of a provider's first process."""
    return [row for row in rows if row["provider"] == provider and row["repeat"] == 0]


def off_by(found: Rows, truth: Rows) -> float:
    """The largest relative difference of a step's loss."""
    pairs = [(a["loss"], b["loss"]) for a, b in zip(found, truth, strict=True)]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def disagreements(rows: Rows, providers: Sequence[str]) -> list[str]:
    """Which losses differ, of any process and step, among providers that had the same batches."""
    found = []
    relative, absolute = TOLERANCE[rows[0]["dtype"]]
    first: dict[tuple, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: providers.index(row["provider"])):
        start = first.setdefault((row["grouped"], row["step"]), row)
        for name in NUMBERS:
            a, b = row[name], start[name]
            if not abs(a - b) <= relative * abs(b) + absolute:  # a NaN too
                found.append(
                    f"step {row['step']}: the {name} of {row['provider']} is {a:.6g}, that of "
                    f"{start['provider']} {b:.6g}"
                )
    return found


class Cost(NamedTuple):
    seconds: float  # a step, median over processes
    peak: float  # bytes over what was there before
    reference: float  # bytes of the second model, or of the cache


def cost(rows: Rows, provider: str) -> Cost:
    own = [row for row in rows if row["provider"] == provider]
    repeats = sorted({row["repeat"] for row in own})
    by_process = [[row for row in own if row["repeat"] == repeat] for repeat in repeats]
    return Cost(
        statistics.median(map(mean_seconds, by_process)),
        statistics.median(process[0]["peak_bytes"] for process in by_process),
        own[0]["reference_bytes"],
    )


def summary(rows: Rows, providers: Sequence[str]) -> str:
    """A line a provider; then the losses of every step."""
    base, lines = providers[0], []
    first = cost(rows, base)
    for provider in providers:
        own, steps = cost(rows, provider), of_first(rows, provider)
        padding = 1 - sum(r["real_tokens"] for r in steps) / sum(r["positions"] for r in steps)
        same = steps[0]["grouped"] == of_first(rows, base)[0]["grouped"]
        lines.append(
            [
                provider + (", grouped" if steps[0]["grouped"] else ""),
                f"{own.seconds:.3f}",
                f"{first.seconds / own.seconds:.2f}",
                f"{own.peak / 2**20:.0f}",
                f"{own.peak / first.peak:.2f}",
                f"{own.reference / 2**20:.0f}",
                f"{(own.peak + own.reference) / (first.peak + first.reference):.2f}",
                f"{padding:.1%}",
                f"{off_by(steps, of_first(rows, base)):.1e}" if same else "-",
            ]
        )
    headings = ["", "s a step", f"{base} / it", "peak MiB", f"of {base}", "reference MiB"]
    headings += ["both", "padding", "losses off by"]
    per_step = [
        [str(step), *(f"{of_first(rows, name)[step]['loss']:.5f}" for name in providers)]
        for step in range(len(of_first(rows, base)))
    ]
    losses = harness.table(["step", *(f"loss, {name}" for name in providers)], per_step)
    return harness.table(headings, lines) + "\n\n" + losses


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    count = harness.positive
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face model folder")
    parser.add_argument("--data", type=Path, required=True, help="folder with TOFU's files")
    parser.add_argument("--steps", type=count, default=6, help="timed steps, after one that is not")
    parser.add_argument("--batch-size", type=count, default=8, help="forget rows, and retain rows")
    parser.add_argument("--top-k", type=count, default=1000)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16", help="of autocast")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--group-by-length", choices=("none", "library", "all"), default="none")
    harness.add_options(parser, "train_step.csv", repeats=3)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    if task := harness.worker_task(arguments):
        print(json.dumps(work(task)))
        return 0
    given = options(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = run(given, Path(folder))
    print(*(rows[0][name] for name in harness.ENVIRONMENT), sep=", ")
    for row in rows:
        if row["status"] != "ok":
            print(f"{row['provider']}: {row['status']}")
    rows = [row for row in rows if row["status"] == "ok"]
    providers = [name for name in given.providers if any(r["provider"] == name for r in rows)]
    print(summary(rows, providers))
    wrong = disagreements(rows, providers)
    for line in wrong:
        print("DISAGREE:", line)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

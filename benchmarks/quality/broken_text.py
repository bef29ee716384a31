"""What do the metrics of answers say of models whose answers fell apart?

    palu demo --output work
    python -m benchmarks.quality.broken_text --work work --output rows.csv
    python -m benchmarks.quality.broken_text --table rows.csv

Too strong settings of gradient ascent and NPO stand beside PALU's defaults, the original and the
retrained model. Every command is in its rows. A model or a log that is in the work folder already
is taken. The table is that of docs/evaluation.md. Nothing here is timed.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, tables

# Model -> what made it; those without were made by `palu demo`.
MODELS = {
    "retrained": None,
    "original": None,
    "unlearned": None,
    "npo": "--retain retain.jsonl --method npo --learning-rate 1e-3 --epochs 5 --checks none",
    "ascent-3e-4": "--method grad_ascent --learning-rate 3e-4 --epochs 5 --checks none",
    "ascent-1e-3": "--method grad_ascent --learning-rate 1e-3 --epochs 5 --checks none",
}
HEADINGS = {
    "original": "original",
    "retrained": "retrained",
    "unlearned": "PALU (defaults)",
    "npo": "NPO, 1e-3",
    "ascent-3e-4": "gradient ascent, 3e-4",
    "ascent-1e-3": "gradient ascent, 1e-3",
}
EVALUATE = (
    "--forget forget.jsonl --retain retain.jsonl --original original --samples 5 "
    "--max-new-tokens 60 --batch-size 64"
)
COLUMNS = ("model", "set", "metric", "value", "unlearned_by", "evaluated_by", *tables.ENVIRONMENT)
# Lines of the table: (set, metric).
LINES = {
    "secrets said": ("forget", "secrets_said"),
    "forget quality (p)": ("log", "forget_quality"),
    "from": ("log", "forget_quality_low"),
    "to (95%)": ("log", "forget_quality_high"),
    "fell apart": ("forget", "fell_apart"),
    "ended": ("forget", "ended"),
    "repetition": ("forget", "repetition"),
    "longest run": ("forget", "longest_run"),
    "distinct-2": ("forget", "distinct_2"),
    "fluency": ("forget", "fluency"),
    "first token of a span": ("forget", "span_first_probability"),
    "its other tokens": ("forget", "span_rest_probability"),
    "retain: fell apart": ("retain", "fell_apart"),
    "retain: fluency": ("retain", "fluency"),
    "retain: ROUGE-L recall": ("retain", "rougeL_recall"),
}


def measured(work: Path, model: str) -> list[dict[str, Any]]:
    """-> rows of a model's numbers, which is made and evaluated unless it was."""
    made = MODELS[model]
    unlearn = (
        "palu demo"
        if made is None
        else f"palu unlearn --model original --forget forget.jsonl --output {model} {made}"
    )
    if made is not None and not (work / model / "palu.json").is_file():
        _run(work, unlearn)
    evaluate = f"palu evaluate --model {model} {EVALUATE} --output logs/{model} --json {model}.json"
    if model != "retrained":
        evaluate += " --retain-log logs/retrained/TOFU_EVAL.json"
    if not (work / f"{model}.json").is_file():
        (work / "logs").mkdir(exist_ok=True)
        _run(work, evaluate)
    result = json.loads((work / f"{model}.json").read_text())
    log = json.loads((work / "logs" / model / "TOFU_EVAL.json").read_text())
    numbers = {
        (data, name): value
        for data in ("forget", "retain")
        for name, value in {**result[data]["mean"], **result[data]["numbers"]}.items()
    }
    numbers["log", "forget_quality"] = log["forget_quality"]["agg_value"]
    if error := log.get("forget_ks_statistic"):
        low, high = error["p_value_interval"]
        numbers |= {
            ("log", "forget_ks_statistic"): error["agg_value"],
            ("log", "forget_quality_low"): low,
            ("log", "forget_quality_high"): high,
            ("log", "detectable_factor"): error["detectable_factor"],
        }
    environment = {**machine.environment(torch.device("cpu")), "commit": machine.commit()}
    made_by = {"unlearned_by": unlearn, "evaluated_by": evaluate}
    return [
        {"model": model, "set": data, "metric": name, "value": value, **made_by, **environment}
        for (data, name), value in numbers.items()
        if value is not None
    ]


def _run(work: Path, command: str) -> None:
    words = [sys.executable, "-m", *shlex.split(command)]
    done = subprocess.run(words, cwd=work, check=False)
    if done.returncode not in (0, 3):  # 3: done, and not good
        raise RuntimeError(f"{command!r} ended with exit status {done.returncode}")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """-> the table of docs/evaluation.md."""
    values = {(r["model"], r["set"], r["metric"]): float(r["value"]) for r in rows}
    lines = [f"| | {' | '.join(HEADINGS.values())} |", "| --- |" + " --- |" * len(HEADINGS)]
    for title, key in LINES.items():
        cells = [_shown(values.get((model, *key))) for model in HEADINGS]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read(path: Path) -> list[dict[str, str]]:
    """-> the rows of a CSV."""
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0e}" if 0 < value < 0.0005 else f"{value:.3g}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, help="what `palu demo` wrote; models are added to it")
    parser.add_argument("--output", type=Path, help="CSV for the rows")
    parser.add_argument("--table", type=Path, help="print the table of a CSV instead")
    options = parser.parse_args(argv)
    if options.table is not None:
        print(table(read(options.table)))
        return
    if options.work is None or options.output is None:
        parser.error("give --work and --output, or --table")
    rows = [row for model in MODELS for row in measured(options.work, model)]
    tables.write(options.output, rows, COLUMNS)
    print(table(rows))


if __name__ == "__main__":
    sys.exit(main())

"""Do the settings that `palu unlearn` chooses by itself forget and keep?

    python -m benchmarks.quality.defaults --output rows.csv --work runs \\
        --name people-0 --model palu-demo/original --forget palu-demo/forget.jsonl \\
        --retain palu-demo/retain.jsonl --seeds 0 1 2 --how nothing retain lora

Every run is a `palu unlearn` in the work folder, written into its row as one would type it, with no
setting but the seed. `nothing`: no retain file, the model's own answers are held; `retain`: the
retain file is given; `lora`: it is given, and `--lora-rank 16`. A run that is in the folder already
is taken. What was forgotten is what the run found (`palu.json`); the retain probability is that of
the retain file, before and after, also where the run never saw it. `fell_apart` is the share of the
greedy answers to the forget file that are no text any more. Nothing here is timed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, tables
from palu.data.files import load_examples
from palu.evaluation import evaluate_examples
from palu.models.loading import load_model, load_tokenizer
from palu.run_record import choose_template

HOW = {"nothing": "", "retain": "--retain {retain}", "lora": "--retain {retain} --lora-rank 16"}
MEASURED = ("sensitive_before", "sensitive_after", "leaked_before", "leaked", "asked")
MEASURED += ("retain_before", "retain_after", "retain_kept", "steps", "fell_apart")
COLUMNS = ("testbed", "how", "seed", "status", *MEASURED, "command", *tables.ENVIRONMENT)


def means(folder: Path, data: str, original: Path, max_new_tokens: int = 0) -> dict[str, Any]:
    """Return the means of `evaluate_examples`."""
    found = evaluate_examples(
        load_model(folder, device="cpu"),
        load_tokenizer(original),
        load_examples(data, require_spans=False),
        template=choose_template(original),
        max_length=512,
        batch_size=8,
        max_new_tokens=max_new_tokens,
    )
    return found["mean"]


def retain_probability(folder: Path, retain: str, original: Path) -> float:
    """Return `exp(-mean NLL)` over the answer tokens of a retain example, averaged."""
    return means(folder, retain, original)["answer_probability"]


def measure(given: argparse.Namespace, how: str, seed: int, before: float) -> dict[str, Any]:
    """Return the row of one run, which is made unless it is there."""
    output = given.work / f"{given.name}-{how}-{seed}"
    words = HOW[how].format(retain=shlex.quote(given.retain))
    command = f"palu unlearn --model {given.model} --forget {shlex.quote(given.forget)} {words} "
    command = f"{command.strip()} --seed {seed} --device cpu {given.more} --output {output}".strip()
    if not (output / "palu.json").is_file():
        done = subprocess.run([sys.executable, "-m", *shlex.split(command)], check=False)
        if done.returncode not in (0, 3):
            raise RuntimeError(f"exit status {done.returncode}: {command}")
    found = json.loads((output / "palu.json").read_text(encoding="utf-8"))
    outcome, after = found["outcome"], retain_probability(output, given.retain, given.model)
    return {
        "testbed": given.name,
        "how": how,
        "seed": seed,
        "status": outcome["status"],
        "sensitive_before": outcome["before"]["sensitive_probability"],
        "sensitive_after": outcome["after"]["sensitive_probability"],
        "leaked_before": outcome["before"]["leaked"],
        "leaked": outcome["after"]["leaked"],
        "asked": outcome["after"]["asked"],
        "retain_before": before,
        "retain_after": after,
        "retain_kept": after / before,
        "steps": len(found["loss_curve"]),
        "fell_apart": means(output, given.forget, given.model, 200)["fell_apart"],
        "command": command,
        **machine.environment(torch.device("cpu")),
        "commit": machine.commit(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.defaults", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--name", required=True, help="of the testbed, in the rows")
    parser.add_argument("--model", type=Path, required=True, help="the original's folder")
    parser.add_argument("--forget", required=True)
    parser.add_argument(
        "--retain", required=True, help="what must stay, also where it is not given"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--how", nargs="+", choices=HOW, default=list(HOW))
    parser.add_argument("--more", default="", help="more options of every run: --more=--bf16")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--output", type=Path, required=True, help="CSV that rows are added to")
    given = parser.parse_args(arguments)
    given.work.mkdir(parents=True, exist_ok=True)
    tables.check_header(given.output, COLUMNS)
    before = retain_probability(given.model, given.retain, given.model)
    for seed in given.seeds:
        for how in given.how:
            row = measure(given, how, seed, before)
            tables.append(given.output, [row], COLUMNS)
            print({name: row[name] for name in ("testbed", "how", "seed", "status", *MEASURED)})
    return 0


if __name__ == "__main__":
    sys.exit(main())

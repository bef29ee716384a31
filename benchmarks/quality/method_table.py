"""What do the methods forget, and what do they keep?

    python -m benchmarks.quality.method_table people --work people-runs
    python -m benchmarks.quality.method_table tofu --work tofu-runs --original tofu-model \\
        --retrained retain-model --data tofu

Every setting is a `palu unlearn` and a `palu evaluate`, run in the work folder and written into the
CSV as one would type them there. A model or evaluation that is in the folder already is taken, so a
run that was stopped goes on; another work folder measures anew.

`people`: the models and invented people of `palu demo`, one demo a seed. `tofu`: a model that knows
forget01 and the first 120 questions of TOFU's full set by heart, and one that never saw forget01
(`benchmarks.quality.tofu_finetune` makes both); the retain set of the metrics is those of TOFU's
retain_perturbed that are among the 120.

Forget quality is the p-value of TOFU's two-sample Kolmogorov-Smirnov test against the retrained
model. Utility is TOFU's for `tofu`; for `people`, who have no real authors and world facts, the
harmonic mean of the three numbers that the retain set gives: probability, ROUGE-L recall and truth
ratio. Settings of `people` were chosen by trials with seed 3, which the table does not use; those
of `tofu` on the rows that are reported. Nothing here is timed.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, tables
from palu.evaluation.metrics import model_utility

ENTROPY = "--objective entropy"
LOCAL = "--objective flatten --center local_mean"
GLOBAL = "--objective flatten --center global_mean"
_PEOPLE = "--batch-size 8 --retain-batch-size 32 --epochs 30"
PEOPLE = {
    "GradDiff": f"--method grad_diff --forget-weight 0.1 --learning-rate 3e-4 {_PEOPLE}",
    "NPO": f"--method npo --forget-weight 1 --learning-rate 1e-4 {_PEOPLE}",
    "SimNPO": f"--method sim_npo --forget-weight 5 --learning-rate 1e-3 {_PEOPLE}",
    "PALU entropy": f"{ENTROPY} --top-k 10 --forget-weight 0.5 --learning-rate 1e-3 {_PEOPLE}",
    "PALU flatten, local mean": (
        f"{LOCAL} --top-k 10 --forget-weight 0.5 --learning-rate 1e-3 {_PEOPLE}"
    ),
    "PALU flatten, global mean": (
        f"{GLOBAL} --top-k 10 --forget-weight 0.01 --learning-rate 1e-3 {_PEOPLE}"
    ),
}
_TOFU = "--batch-size 8 --epochs 6"
TOFU = {
    "GradDiff": f"--method grad_diff --retain-weight 5 --learning-rate 1e-4 {_TOFU}",
    "NPO": f"--method npo --retain-weight 5 --learning-rate 1e-4 {_TOFU}",
    "PALU entropy": (f"{ENTROPY} --top-k 50 --forget-weight 5 --learning-rate 1e-4 {_TOFU}"),
    "PALU entropy, retain weight 5": (
        f"{ENTROPY} --top-k 50 --forget-weight 5 --retain-weight 5 --learning-rate 1e-4 {_TOFU}"
    ),
    "PALU flatten, local mean": (
        f"{LOCAL} --top-k 50 --forget-weight 5 --retain-weight 5 --learning-rate 2e-4 {_TOFU}"
    ),
    "PALU flatten, global mean": (
        f"{GLOBAL} --top-k 1000 --forget-weight 0.02 --learning-rate 3e-5 {_TOFU}"
    ),
}
RETAIN_NUMBERS = ("retain_Q_A_Prob", "retain_Q_A_ROUGE", "retain_Truth_Ratio")
# Of every model; further metrics of the logs are in the CSV.
TABLE = {
    "forget_quality": "forget quality",
    "sensitive_probability": "sensitive prob.",
    "forget_Q_A_ROUGE": "forget ROUGE-L",
    "utility": "utility",
    "retain_Q_A_Prob": "retain prob.",
    "retain_Q_A_ROUGE": "retain ROUGE-L",
}
COLUMNS = ("world", "seed", "setting", "metric", "value", "command", *tables.ENVIRONMENT)
Rows = list[dict[str, Any]]


class Runs:
    """The commands of one world and seed, run in a folder that holds `original`, `retrained` and
    their data.

    Args:
        world, seed: of the rows.
        folder: where the commands run.
        forget, retain: what `palu unlearn` is given.
        evaluate: options of `palu evaluate` that name the data of the logs.
    """

    def __init__(
        self, world: str, seed: int, folder: Path, forget: str, retain: str, evaluate: str
    ) -> None:
        self.world, self.seed, self.folder = world, seed, folder
        self.forget, self.retain, self.evaluate = forget, retain, evaluate
        self.environment = machine.environment(torch.device("cpu"))
        self.environment["commit"] = machine.commit()

    def unlearn(self, setting: str, options: str) -> str:
        """-> the command that made the model of a setting, which is run unless its model is there.

        Raises:
            RuntimeError: the command failed, or the model there is another command's.
        """
        name = slug(setting)
        command = (
            f"palu unlearn --model original --forget {shlex.quote(self.forget)} "
            f"--retain {shlex.quote(self.retain)} --output {name} {options} --device cpu"
        )
        if not (self.folder / name / "palu.json").is_file():
            self.run(command, name)
        elif self._made_by(name) != command:
            raise RuntimeError(
                f"{self.folder / name} was made by another command than {command!r} (see its "
                "log); name another --work"
            )
        return command

    def _made_by(self, name: str) -> str | None:
        """The first line of a log: what made the model."""
        log = self.folder / f"{name}.log"
        return log.read_text().split("\n")[0].removeprefix("$ ") if log.is_file() else None

    def measure(self, setting: str, made_by: str) -> Rows:
        """-> rows of every metric of a model."""
        name = slug(setting)
        log = self.folder / "evaluations" / name
        command = f"palu evaluate --model {name} {self.evaluate} --output evaluations/{name}"
        if name != "retrained":
            command += " --retain-log evaluations/retrained/TOFU_EVAL.json"
        tofu = "--tofu" in self.evaluate
        command += " --device cpu" if tofu else f" --json {name}.json --device cpu"
        if not (self.folder / f"{name}.json").is_file():
            self.run(command, f"{name}-evaluation")
            if tofu:  # whose own files lack the spans
                command = f"palu evaluate --model {name} --forget {shlex.quote(self.forget)} "
                command += f"--max-new-tokens 0 --json {name}.json --device cpu"
                self.run(command, f"{name}-spans")
        values = json.loads((log / "TOFU_SUMMARY.json").read_text())
        found = json.loads((self.folder / f"{name}.json").read_text())["forget"]["mean"]
        values["sensitive_probability"] = found["sensitive_probability"]
        values["utility"] = values.get("model_utility")
        if values["utility"] is None:
            values["utility"] = model_utility([values[metric] for metric in RETAIN_NUMBERS])
        same = {"world": self.world, "seed": self.seed, "setting": setting, "command": made_by}
        return [
            {**same, "metric": metric, "value": value, **self.environment}
            for metric, value in values.items()
        ]

    def run(self, command: str, log: str, makes: str = "") -> None:
        """Runs a command in the folder.

        Args:
            log: the file `LOG.log` gets what it says.
            makes: a file that is there where a status of 1 is no failure. (A demo that has not
                forgotten enough ends with it.)

        Raises:
            RuntimeError: it failed; with the end of what it said.
        """
        print(f"{self.folder}$ {command}", flush=True)
        words = shlex.split(command)[1:]
        done = subprocess.run(
            [sys.executable, "-m", "palu.cli", *words],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        (self.folder / f"{log}.log").write_text(f"$ {command}\n{done.stdout}")
        if done.returncode and not (makes and (self.folder / makes).is_file()):
            raise RuntimeError(f"{command} ended with {done.returncode}: {done.stdout[-2000:]}")


def slug(setting: str) -> str:
    """A setting's name as a folder."""
    kept = "".join(c if c.isalnum() or c in ".-=" else "-" for c in setting.lower())
    return "-".join(part for part in kept.split("-") if part)


def people_runs(folder: Path, seed: int, demo: str = "") -> Runs:
    """The demo of a seed, made unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = Runs(
        "people",
        seed,
        folder / f"seed{seed}",
        "forget.jsonl",
        "retain.jsonl",
        "--forget forget.jsonl --retain retain.jsonl --max-new-tokens 40",
    )
    if not runs.folder.is_dir():
        # The demo's own folder must be empty: it is made beside its place, and run from there.
        above = Runs("people", seed, folder, "", "", "")
        command = f"palu demo --seed {seed} --output seed{seed} {demo}".strip()
        above.run(command, f"demo{seed}", f"seed{seed}/metrics.json")
    return runs


def tofu_runs(folder: Path, original: Path, retrained: Path, data: Path) -> Runs:
    """Links to models and data, and TOFU's files of the metrics with the 120 retain questions."""
    metrics = folder / "tofu120"
    metrics.mkdir(parents=True, exist_ok=True)
    for name, target in (("original", original), ("retrained", retrained), ("tofu", data)):
        if not (folder / name).exists():
            (folder / name).symlink_to(target.resolve())
    lines = (data / "full.json").read_text(encoding="utf-8").splitlines()[:120]
    known = {json.loads(line)["question"] for line in lines}
    lines = (data / "retain_perturbed.json").read_text(encoding="utf-8").splitlines()
    kept = [line + "\n" for line in lines if json.loads(line)["question"] in known]
    (metrics / "retain_perturbed.json").write_text("".join(kept), encoding="utf-8")
    for name in ("forget01_perturbed", "real_authors_perturbed", "world_facts_perturbed"):
        shutil.copy(data / f"{name}.json", metrics)
    return Runs(
        "tofu",
        0,
        folder,
        "tofu/annotated/forget10[-40:]",
        "tofu/full.json[:120]",
        "--tofu tofu120 --split forget01 --dtype bfloat16",
    )


def measure(runs: Runs, settings: dict[str, str], *, made_by: str) -> Rows:
    """Rows of the retrained model, the original, and every setting."""
    rows = runs.measure("retrained", made_by) + runs.measure("original", made_by)
    for setting, options in settings.items():
        rows += runs.measure(setting, runs.unlearn(setting, options))
    return rows


def table(
    rows: Sequence[dict[str, Any]],
    columns: Mapping[str, str] = TABLE,
    labels: Mapping[str, str] | None = None,
) -> str:
    """A Markdown table of a world: the mean over its seeds, and least and greatest where there are
    several.

    Args:
        columns: metric -> heading.
        labels: setting -> what it is called, in the order of the table; None: all, as they are.
    """
    seeds = sorted({row["seed"] for row in rows}, key=str)
    labels = labels or {row["setting"]: row["setting"] for row in rows}
    lines = ["| | " + " | ".join(columns.values()) + " |"]
    lines.append("|" + " --- |" * (1 + len(columns)))
    for setting, label in labels.items():
        cells = [label]
        for metric in columns:
            found = [
                float(row["value"])
                for row in rows
                if (row["setting"], row["metric"]) == (setting, metric)
            ]
            cells.append(_cell(found, len(seeds)))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: Sequence[float], seeds: int) -> str:
    if not values:
        return "-"
    mean, *ends = map(_number, (statistics.fmean(values), min(values), max(values)))
    return mean if seeds == 1 or {*ends} == {mean} else f"{mean} ({ends[0]} to {ends[1]})"


def _number(value: float) -> str:
    return f"{value:.3f}" if value >= 9.5e-4 or value == 0 else f"{value:.0e}"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.world == "show":
        with options.file.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        print(table(rows))
        return 0
    rows: Rows = []
    if options.world == "people":
        for seed in options.seeds:
            runs = people_runs(options.work, seed, options.demo)
            made_by = f"palu demo --seed {seed} --output seed{seed} {options.demo}".strip()
            rows += measure(runs, PEOPLE, made_by=made_by)
            tables.write(options.csv, rows, COLUMNS)
    else:
        runs = tofu_runs(options.work, options.original, options.retrained, options.data)
        rows = measure(runs, TOFU, made_by="benchmarks.quality.tofu_finetune")
        tables.write(options.csv, rows, COLUMNS)
    print(table(rows))
    return 0


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.method_table", description=__doc__.split("\n")[0]
    )
    worlds = p.add_subparsers(dest="world", required=True)
    people = worlds.add_parser("people", help="the invented people of `palu demo`")
    people.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    people.add_argument("--demo", default="", help="further options of `palu demo`")
    tofu = worlds.add_parser("tofu", help="a language model that learned TOFU's forget01 and 120")
    tofu.add_argument("--original", type=Path, required=True, help="model folder")
    tofu.add_argument("--retrained", type=Path, required=True, help="model folder")
    tofu.add_argument("--data", type=Path, required=True, help="folder with TOFU's files")
    for world, name in ((people, "people"), (tofu, "tofu")):
        world.add_argument("--work", type=Path, required=True, help="folder for models and logs")
        default = machine.RESULTS / f"method_table_{name}.csv"
        world.add_argument("--csv", type=Path, default=default, help="raw rows")
    show = worlds.add_parser("show", help="the table of a CSV")
    show.add_argument("file", type=Path)
    return p


if __name__ == "__main__":
    sys.exit(main())

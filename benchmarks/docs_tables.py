"""Write the tables of README.md and docs/ from the rows under `benchmarks/results/`.

    python -m benchmarks.docs_tables               # writes them between their marks
    python -m benchmarks.docs_tables --check       # says which differ, and exits with 1
    python -m benchmarks.docs_tables take FOLDER NAME      # takes the CSVs of a comparison

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`. `NAME` is one of `TABLES`, or
of a comparison that `take` brought here: `comparison NAME` (the ranking), `settings NAME` (the best
points), `attacks NAME` (what each attack gets of them) or `pairs NAME` (differences of areas).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import tables
from benchmarks.machine import RESULTS
from benchmarks.quality import method_table
from palu.comparison.run_file import FELL_APART, FORGET
from palu.comparison.tables import FRONTIER, ONLY, PAIRS, RUNS, percent, summary_frame

ROOT = Path(__file__).parents[1]
DOCS = ("README.md", "docs/results.md")
MARK = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- /table -->)", re.DOTALL)
MODELS = ("original", "retrained")

_PROVIDERS = {
    "released": "released",
    "compile": "PyTorch alone: rows that carry a loss, `torch.compile`",
    "rows": "the operators on logits of those rows",
    "linear": "`linear`: hidden rows, live reference",
    "sparse+cached": "`sparse+cached`: cached indices and hidden states",
    "floor": "*the bare matrix products of those rows*",
}
_SHORT = {
    "released": "released",
    "linear": "hidden states instead of logits, live reference",
    "sparse+cached": "the same with a cached reference",
}
_STEPS = {
    "released": "released",
    "torch": (
        "PyTorch alone: rows that carry a loss, in turns, `torch.compile`, `linear_cross_entropy`"
    ),
    "live": "`PALUTrainer`'s step, live reference",
    "cached": "cached reference",
}
_PEOPLE = {name: name.replace("PALU ", "PALU, ") for name in (*MODELS, *method_table.PEOPLE)}
_TOFU = {
    "original": "original",
    "retrained": "retrained without forget01",
    "GradDiff": "GradDiff, retain weight 5, lr 1e-4",
    "NPO": "NPO, retain weight 5, lr 1e-4",
    "PALU entropy": "PALU, entropy, k=50, weight 5, lr 1e-4",
    "PALU entropy, retain weight 5": "PALU, the same with retain weight 5",
    "PALU flatten, local mean": (
        "PALU, flatten, local mean, k=50, weight 5, retain weight 5, lr 2e-4"
    ),
    "PALU flatten, global mean": "PALU, flatten, global mean, k=1000, weight 0.02, lr 3e-5",
}
_PEOPLE_COLUMNS = ("forget_quality", "sensitive_probability", "forget_Q_A_ROUGE", "utility")
_HEADINGS = {
    "forget_quality": "forget quality",
    "sensitive_probability": "sensitive prob.",
    "forget_Q_A_Prob": "answer prob.",
    "forget_Q_A_ROUGE": "ROUGE-L of forget answers",
    "utility": "utility",
    "model_utility": "model utility",
    "retain_Q_A_Prob": "retain prob.",
    "retain_Q_A_ROUGE": "retain ROUGE-L",
}
_TOFU_COLUMNS = tuple(name for name in _HEADINGS if name != "utility")
_DEMO = ("answer_probability", "sensitive_probability", "rougeL_recall", "exact_memorization")


def markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    headings, *cells = [[one.replace("|", r"\|") for one in line] for line in (headings, *lines)]
    whole = [headings, ["---"] * len(headings), *cells]
    spaced = [["", *(f" {cell} " if cell else " " for cell in line), ""] for line in whole]
    return "\n".join(map("|".join, spaced))


# ---- the tables ----------------------------------------------------------------------------------


def demo(*, short: bool = False) -> str:
    """Return what the demo printed for seed 0."""
    models = json.loads((RESULTS / "demo_seed0.json").read_text("utf-8"))["models"]
    names = ("original", "unlearned", "retrained")

    def cell(model: str, data: str, metric: str) -> str:
        value = f"{models[model][data][metric]:.3f}"
        told = model == "unlearned" and metric == "sensitive_probability"
        return f"**{value}**" if told else value

    if short:
        picked = (("forget", _DEMO[1]), ("forget", _DEMO[2]), ("retain", _DEMO[1]))
        headings = ["", "to forget: sensitive prob.", "ROUGE-L", "to keep: sensitive prob."]
        return markdown(headings, [[name, *(cell(name, *one) for one in picked)] for name in names])
    lines = [
        [f"{data} ({rows})" if not place else "", name, *(cell(name, data, m) for m in _DEMO)]
        for data, rows in (("forget", 40), ("retain", 280))
        for place, name in enumerate(names)
    ]
    headings = ["answer prob.", "sensitive prob.", "ROUGE-L recall", "exact memorization"]
    return markdown(["", "", *headings], lines)


def loss_step(*, short: bool = False) -> str:
    """Return time and memory of the loss of a batch, and their ratios to the released code's."""
    rows = tables.read(RESULTS / "loss_step.csv")
    dtypes = ("float32",) if short else ("bfloat16", "float32")

    def cells(provider: str, dtype: str) -> list[str]:
        of = {(row["provider"], row["metric"]): row["p50"] for row in rows if row["dtype"] == dtype}
        seconds, peak = of[provider, "seconds"], of.get((provider, "peak_bytes"))
        time = f"{seconds:.2f} s"
        if peak is None:
            return [time, ""]
        memory = f"{peak / 2**20:.0f} MiB"
        if provider == "released":
            return [time, memory]
        faster = of["released", "seconds"] / seconds
        return [
            f"{time} ({faster:.1f}x)",
            f"{memory} (1/{of['released', 'peak_bytes'] / peak:.0f})",
        ]

    lines = [
        [label, *(cell for dtype in dtypes for cell in cells(name, dtype))]
        for name, label in (_SHORT if short else _PROVIDERS).items()
    ]
    headings = (
        ["time", "memory over the call"] if short else ["bfloat16", "peak", "float32", "peak"]
    )
    return markdown(["", *headings], lines)


def train_step() -> str:
    """Return time and memory of a training step."""
    rows = tables.read(RESULTS / "train_step.csv")
    of = {(row["provider"], row["metric"]): row for row in rows}

    def number(provider: str, metric: str) -> float:
        row = of[provider, metric]
        return tables.mean_seconds(row) if metric == "seconds" else row["p50"]

    lines = []
    for name, label in _STEPS.items():
        seconds, peak = number(name, "seconds"), number(name, "peak_bytes")
        cells = [f"{seconds:.2f} s", f"{peak / 2**20:.0f} MiB"]
        if name != "released":
            cells[0] += f" ({number('released', 'seconds') / seconds:.2f}x)"
            cells[1] += f" ({peak / number('released', 'peak_bytes'):.2f})"
        lines.append([label, *cells, f"{number(name, 'reference_bytes') / 2**20:.0f} MiB"])
    headings = ["a step", "peak over models and optimizer", "second model or cache"]
    return markdown(["", *headings], lines)


def methods(world: str, labels: Mapping[str, str], columns: Sequence[str]) -> str:
    """Return what `benchmarks.quality.method_table` measured."""
    frame = pd.read_csv(RESULTS / f"method_table_{world}.csv")
    headings = {name: _HEADINGS[name] for name in columns}
    return method_table.table(frame.to_dict("records"), headings, labels)


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "demo, short": lambda: demo(short=True),
    "loss step": loss_step,
    "loss step, short": lambda: loss_step(short=True),
    "train step": train_step,
    "methods people": lambda: methods("people", _PEOPLE, _PEOPLE_COLUMNS),
    "methods tofu": lambda: methods("tofu", _TOFU, _TOFU_COLUMNS),
}


# ---- comparisons ---------------------------------------------------------------------------------


def place(name: str, file: str) -> Path:
    """Return where a CSV of a comparison is, by its name in the comparison's folder."""
    ending = {RUNS: "", FRONTIER: "_frontier", PAIRS: "_pairs"}[file]
    return RESULTS / f"comparison_{name}{ending}.csv"


def read(name: str, file: str) -> pd.DataFrame:
    """Return a CSV of a comparison. Raises ValueError where there is none."""
    path = place(name, file)
    if not path.is_file():
        raise ValueError(
            f"there is no {path}: python -m benchmarks.docs_tables take FOLDER {name} brings it"
        )
    return pd.read_csv(path)


def take(folder: Path, name: str) -> None:
    """Copy the CSVs of a comparison here."""
    for file in (RUNS, FRONTIER, PAIRS):
        shutil.copyfile(folder / file, place(name, file))


def comparison(name: str) -> str:
    """Return the ranking of a comparison."""
    frame = summary_frame(read(name, FRONTIER))
    return markdown(list(frame.columns), frame.to_numpy().tolist())


def settings(name: str) -> str:
    """Return the settings of the best points, with their losses, and the share of the answers to
    the forget file that fell apart, mean over the seeds."""
    runs, frontier = read(name, RUNS), read(name, FRONTIER)
    own = frontier[~frontier["at"].str.startswith("area") & (frontier["at"] != "model")]
    lines = []
    for row in own.to_dict("records"):
        cells = [row["method"], row["at"], "none", "", "", "", "", ""]
        if not pd.isna(row["setting"]):
            cells[2:] = [
                row["setting"],
                percent(row["loss"], 1),
                _number(row["forgetting"]),
                _number(row["left_out_forgetting"]),
                _number(row["left_out_loss"], "%"),
                percent(_of_setting(runs, row)[f"{FORGET} {FELL_APART}"].mean(), 0),
            ]
        lines.append(cells)
    headings = ["", "within", "setting", "loss", "forgetting", "left out", "its loss", "fell apart"]
    return markdown(headings, lines)


def _of_setting(runs: pd.DataFrame, row: Mapping[str, Any]) -> pd.DataFrame:
    """Return the runs of a best point's setting."""
    own = (runs["method"] == row["method"]) & (runs["setting"].fillna(ONLY) == row["setting"])
    return runs[own]


def attacks(name: str) -> str:
    """Return the share of secrets that each attack gets of each method's best point within the
    middle loss, mean over seeds, beside the original and the retrained model."""
    runs, frontier = read(name, RUNS), read(name, FRONTIER)
    limits = [at for at in dict.fromkeys(frontier["at"]) if re.fullmatch(r"[\d.]+%", at)]
    at = limits[len(limits) // 2]
    columns = {model: runs[runs["run"] == model] for model in MODELS}
    for row in frontier[frontier["at"] == at].to_dict("records"):
        columns[row["method"]] = _of_setting(runs, row)
    names = [one for one in runs.columns if one.startswith("leaked ")]
    columns = {column: found for column, found in columns.items() if len(found)}
    lines = [
        [
            one.removeprefix("leaked ").replace("_", " "),
            *(_number(found[one].mean(), "%") for found in columns.values()),
        ]
        for one in names
    ]
    return markdown([f"within {at}", *columns], lines)


def pairs(name: str) -> str:
    """Return the differences of areas between every two methods, the larger first."""
    frame = read(name, PAIRS)
    lines = []
    for row in frame[frame["at"].str.startswith("area")].to_dict("records"):
        names = [row["first"], row["second"]]
        ends = [row["difference_low"], row["difference_high"]]
        share = row["probability"]
        if row["difference"] < 0:
            names, ends, share = names[::-1], [-end for end in ends[::-1]], 1 - share
        shown = f"{abs(row['difference']):.3f} [{ends[0]:.3f}, {ends[1]:.3f}]"
        lines.append([*names, shown, percent(share, 0)])
    return markdown(["", "over", "difference of areas", "ahead"], lines)


def _number(value: Any, unit: str = "") -> str:
    if pd.isna(value):
        return "-"
    return percent(value, 1) if unit else f"{value:.3f}"


COMPARED = {"comparison": comparison, "settings": settings, "attacks": attacks, "pairs": pairs}


# ---- the files -----------------------------------------------------------------------------------


def made(name: str) -> str:
    """Return a table. Raises ValueError for a name that there is none of."""
    if name in TABLES:
        return TABLES[name]()
    kind, _, of = name.partition(" ")
    if kind in COMPARED and of:
        return COMPARED[kind](of)
    raise ValueError(
        f"no table {name!r}: it must be one of {', '.join(TABLES)}, or {', '.join(COMPARED)} and "
        "the name of a comparison in benchmarks/results"
    )


def filled(text: str) -> str:
    """Return a document with its tables."""
    opened, closed = text.count("<!-- table: "), text.count("<!-- /table -->")
    if not opened == closed == len(MARK.findall(text)):
        raise ValueError(f"{opened} tables begin and {closed} end")
    return MARK.sub(lambda found: f"{found[1]}{made(found[2])}\n{found[3]}", text)


def differing() -> dict[Path, str]:
    """Return the documents whose tables are not those of the rows, and what they should be."""
    found = {}
    for name in DOCS:
        path = ROOT / name
        text = path.read_text("utf-8")
        try:
            wanted = filled(text)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if wanted != text:
            found[path] = wanted
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.docs_tables", description=__doc__.split("\n")[0]
    )
    p.add_argument("--check", action="store_true", help="write nothing; exit with 1 if they differ")
    p.add_argument("take", nargs="*", help="take FOLDER NAME: the CSVs of a comparison")
    options = p.parse_args(arguments)
    if options.take:
        if len(options.take) != 3 or options.take[0] != "take":
            p.error("give nothing, or take FOLDER NAME")
        take(Path(options.take[1]), options.take[2])
        return 0
    found = differing()
    for path, text in found.items():
        print(path.relative_to(ROOT))
        if not options.check:
            path.write_text(text, "utf-8")
    return int(options.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())

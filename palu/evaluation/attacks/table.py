"""The table of attacks, the worst leak first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from palu.evaluation.attacks.settings import OPEN_UNLEARNING
from palu.terminal import visible

METRICS = {
    "exact_memorization": "EM",
    "extraction_strength": "ES",
    "forget_Q_A_Prob": "prob",
    "forget_Q_A_PARA_Prob": "para\nprob",
    "forget_Q_A_ROUGE": "ROUGE",
    "truth_ratio": "truth\nratio",
    "mia_loss": "MIA\nloss",
    "mia_zlib": "MIA\nzlib",
    "mia_min_k": "MIA\nmin-k",
    "mia_min_k_plus_plus": "MIA\nmk++",
}
"""Columns of the stress tests."""
LETTERS = {"relearning": "ratio R", "quantization": "ratio Q"}
_SHOWN = ("original", "unlearned", "retrained")


def attack_table(content: Mapping[str, Any], title: str) -> Table:
    """Return a table with a line for each attack and a column for each model: secrets that leaked
    of those looked for, with their share and, of the unlearned model, its 95% interval.

    Args:
        content: of `attack.json`.
    """
    models = [name for name in _SHOWN if name in content["models"]]
    table = Table(title=Text(visible(title), style="table.title"), title_justify="left")
    table.add_column("attack", ratio=1)
    for name in models:
        table.add_column(name, justify="right", no_wrap=True)
    for entry in sorted(content["attacks"], key=_order):
        results = entry["results"]
        cells = [_cell(results.get(name), name == "unlearned") for name in models]
        table.add_row(Text(visible(entry["title"])), *cells)
        if any("answers" in result for result in results.values()):
            answers = [results.get(name, {}).get("answers") for name in models]
            cells = [
                _cell(result, name == "unlearned")
                for name, result in zip(models, answers, strict=True)
            ]
            table.add_row(Text("  of single answers", style="dim"), *cells)
    return table


def stress_table(content: Mapping[str, Any], model: str) -> Table:
    """Return a table of open-unlearning's stress tests of a model: a line for each test and, of the
    unlearned model, for the ratio that is formed after it; a column for each metric.

    Args:
        content: of `attack.json`, with `open_unlearning`.
    """
    stress = content[OPEN_UNLEARNING]
    tests = [test for test in stress["tests"] if model in test["results"]]
    ratios = {one["title"]: one for one in stress["ratios"] if model == "unlearned"}
    measured = [name for name in METRICS if any(name in _metrics(t, model) for t in tests)]
    title = f"open-unlearning's stress tests: {model}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    table.add_column("after", no_wrap=True)
    for name in measured:
        table.add_column(METRICS[name], justify="right")
    for test in tests:
        _add(table, Text(test["title"]), (_metrics(test, model).get(n) for n in measured))
        if ratio := ratios.get(test["title"]):
            found = [ratio["metrics"].get(name, {}).get("ratio") for name in measured]
            if any(value is not None for value in found):
                _add(table, Text(f"  {LETTERS[ratio['test']]}", style="dim"), found)
    if ratios and stress["robustness"]:
        together = "harmonic mean of both"
        _add(table, Text(together), (stress["robustness"].get(name) for name in measured))
    return table


def _metrics(test: Mapping[str, Any], model: str) -> Mapping[str, float]:
    return test["results"][model]["metrics"]


def _add(table: Table, title: Text, values: Iterable[float | None]) -> None:
    table.add_row(title, *("-" if value is None else f"{value:.2f}" for value in values))


def _order(entry: Mapping[str, Any]) -> tuple[bool, float, int]:
    found = entry["results"].get("unlearned") or {}
    rate = found.get("rate")
    return "auc" in found, -(rate if rate is not None else -1.0), -found.get("leaked", 0)


def _cell(found: Mapping[str, Any] | None, interval: bool) -> Text:
    if not found:
        return Text("-")
    low, high = found["low"], found["high"]
    if "auc" in found:
        between = f" ({low:.2f}-{high:.2f})" if interval else ""
        return Text(f"AUC {found['auc']:.2f}{between}")
    if not found["of"]:
        return Text("-")
    between = f" ({100 * low:.0f}-{100 * high:.0f}%)" if interval else ""
    style = "red" if interval and found["leaked"] else ""
    return Text(f"{found['leaked']}/{found['of']} {found['rate']:.0%}{between}", style=style)

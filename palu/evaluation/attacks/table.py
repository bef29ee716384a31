"""The table of attacks, the worst leak first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from palu.terminal import visible

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

"""The numbers of an evaluation as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from palu.evaluation.metrics import METRICS

TITLES = {
    "answer_probability": "answer\nprob.",
    "sensitive_probability": "sensitive\nprob.",
    "rougeL_recall": "ROUGE-L\nrecall",
    "exact_memorization": "exact\nmemorization",
}


def metrics_table(title: str, rows: Sequence[tuple[str, str, Mapping]]) -> Table:
    """A table with one line for each (model, data set, result of `evaluate_examples`); a rule where
    the set changes."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("data")
    table.add_column("model")
    table.add_column("rows", justify="right")
    for name in METRICS:
        table.add_column(TITLES[name], justify="right")
    for number, (model, data, result) in enumerate(rows):
        last = number + 1 == len(rows) or rows[number + 1][1] != data
        values = [result["mean"][name] for name in METRICS]
        shown = ["-" if value is None else f"{value:.3f}" for value in values]
        table.add_row(data, model, str(result["count"]), *shown, end_section=last)
    return table

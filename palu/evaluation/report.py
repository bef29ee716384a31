"""Tables of evaluation results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from palu.evaluation.datasets import PARAPHRASED, PERTURBED
from palu.evaluation.names import METRICS
from palu.evaluation.tofu import UTILITY
from palu.terminal import visible

TITLES = {
    "answer_probability": "answer\nprob.",
    "sensitive_probability": "sensitive\nprob.",
    "rougeL_recall": "ROUGE-L\nrecall",
    "exact_memorization": "exact\nmemorization",
}


def metrics_table(title: str, rows: Sequence[tuple[str, str, Mapping]]) -> Table:
    """Return a table with one line for each (model, data set, result of `evaluate_examples`)."""
    table = Table(
        title=Text(visible(title), style="table.title"),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("data")
    table.add_column("model")
    table.add_column("rows", justify="right")
    for name in METRICS:
        table.add_column(TITLES[name], justify="right")
    for number, (model, data, result) in enumerate(rows):
        last = number + 1 == len(rows) or rows[number + 1][1] != data
        values = [result["mean"][name] for name in METRICS]
        shown = ["-" if value is None else f"{value:.3f}" for value in values]
        table.add_row(
            Text(visible(data)),
            Text(visible(model)),
            str(result["count"]),
            *shown,
            end_section=last,
        )
    return table


def summary_table(title: str, summary: Mapping[str, float]) -> Table:
    """Return a table with one line for each metric of a log's summary."""
    table = Table("metric", title=Text(visible(title), style="table.title"), title_justify="left")
    table.add_column("value", justify="right")
    for name, value in summary.items():
        table.add_row(Text(visible(name)), f"{value:.4g}")
    return table


def missing_inputs(
    log: Mapping[str, Any], sets: Mapping[str, Any], retrained: Any, *, tofu: bool
) -> list[str]:
    """Return what a log lacks, each with the input that would give it.

    Args:
        log: metric -> entry.
        sets: name -> `EvalSet`.
        retrained: the retrained model's log or None.
        tofu: whether TOFU's files were read, which say more than the user's own.
    """
    notes = []
    fields = [field for field in (PARAPHRASED, PERTURBED) if field not in sets["forget"].rows]
    if "forget_truth_ratio" not in log and fields:
        notes.append(f"truth ratio and forget quality (no {' and '.join(fields)} in the records)")
    elif retrained is None and log["forget_quality"]["agg_value"] is None:
        notes.append("forget quality (no --retain-log)")
    if "holdout" not in sets:
        notes.append("membership inference and privleak (no --holdout)")
    if tofu and (lacking := [name for name in UTILITY if name not in log]):
        notes.append(f"model utility (no {', '.join(lacking)})")
    return notes

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
OF_TEXT = {
    "fell_apart": "answers that fell apart",
    "ended": "answers that end within the limit",
    "repetition": "4-grams that an answer repeats",
    "longest_run": "longest run of one token",
    "answer_tokens": "tokens of an answer",
    "distinct_1": "distinct-1 of all answers",
    "distinct_2": "distinct-2",
    "distinct_3": "distinct-3",
    "fluency": "fluency under the original",
}
OF_SECRETS = {
    "secrets_said": "secrets that plain answers say",
    "secrets_sampled": "secrets that any sample says",
    "sample_leak_rate": "secrets that one sample says",
    "span_first_probability": "probability of a span's first token",
    "span_rest_probability": "of its other tokens, each",
    "span_probability": "of its tokens, each",
    "span_joint_probability": "of the whole span",
}
"""Number -> what it is, in words."""


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
        table.add_row(
            Text(visible(data)),
            Text(visible(model)),
            str(result["count"]),
            *map(_shown, values),
            end_section=last,
        )
    return table


def text_table(results: Mapping[str, Mapping]) -> Table:
    """Return a table that says whether answers are text and what is left of the secrets, with a
    column for each data set: set -> result of `evaluate_examples`."""
    table = Table("what", title=Text("Answers and secrets", style="table.title"))
    table.title_justify = "left"
    for data in results:
        table.add_column(Text(visible(data)), justify="right")
    known = [{**result["mean"], **result["numbers"]} for result in results.values()]
    for section in (OF_TEXT, OF_SECRETS):
        for number, (name, title) in enumerate(section.items(), 1):
            last = number == len(section)
            table.add_row(title, *(_shown(one[name]) for one in known), end_section=last)
    return table


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


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
    if "forget_ended" in log and "forget_fluency" not in log:
        notes.append("fluency of the answers (no --original)")
    if "forget_secrets_said" in log and "forget_secrets_sampled" not in log:
        notes.append("secrets in drawn answers (no --samples)")
    if "holdout" not in sets:
        notes.append("membership inference and privleak (no --holdout)")
    if tofu and (lacking := [name for name in UTILITY if name not in log]):
        notes.append(f"model utility (no {', '.join(lacking)})")
    return notes

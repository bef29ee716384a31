"""What became of the answers: numbers of every set, beside the original and the retrained model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from palu.comparison.run_file import FELL_APART, FORGET
from palu.report.compared_runs import MODELS
from palu.report.inputs import Node
from palu.report.measures import APART, TITLES
from palu.report.page import percent

_OF_FORGET = ("answer_probability", "sensitive_probability", "span_first_probability")
_OF_FORGET += ("span_rest_probability", FELL_APART, "ended", "repetition", "fluency")
_OF_OTHERS = ("answer_probability", "rougeL_recall", FELL_APART, "ended", "repetition", "fluency")

Row = dict[str, Any]


def text_rows(columns: Mapping[str, Sequence[Node]]) -> list[Row]:
    """Return what was measured on each set without an attack.

    Args:
        columns: name -> runs.

    Returns:
        `[{"set", "name", "title", "values": {column: mean}}]`: means over the examples that have
        the number, and over the runs; the set to forget first.
    """
    found: dict[tuple[str, str], Row] = {}
    for column, runs in columns.items():
        means: dict[tuple[str, str], list[float]] = {}
        for run in runs:
            for data, metrics in run["sets"].named():
                for name in _OF_FORGET if data == FORGET else _OF_OTHERS:
                    if (mean := _mean(metrics[name])) is not None:
                        means.setdefault((data, name), []).append(mean)
        for (data, name), some in means.items():
            row = {"set": data, "name": name, "title": TITLES[name], "values": {}}
            row = found.setdefault((data, name), row)
            row["values"][column] = math.fsum(some) / len(some)
    sets = list(dict.fromkeys(data for data, _ in found))
    return sorted(found.values(), key=lambda row: (row["set"] != FORGET, sets.index(row["set"])))


def _mean(values: Node) -> float | None:
    known = [one.value for one in values.each() if one]
    for one in values.each():
        if one and not (isinstance(one.value, int | float) and math.isfinite(one.value)):
            raise one.fail("a finite number")
    return math.fsum(known) / len(known) if known else None


def broken(rows: Sequence[Row], methods: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each method of whose answers to a set clearly more fell apart than of
    the models beside it: what it does not say, it may be unable to say."""
    said = []
    for row in rows:
        if row["name"] != FELL_APART:
            continue
        beside = {name: row["values"][name] for name in MODELS if name in row["values"]}
        for method in methods:
            share = row["values"].get(method["letter"])
            if share is not None and share > max(beside.values(), default=0.0) + APART:
                what = "the records to forget" if row["set"] == FORGET else f"{row['set']!r}"
                others = ", ".join(f"{name} {percent(value)}" for name, value in beside.items())
                said.append(
                    f"{method['name']}: {percent(share)} of the answers to {what} fell apart"
                    f"{f' ({others})' if others else ''}. What it does not say there, it may not "
                    "have forgotten but be unable to say."
                )
    return said

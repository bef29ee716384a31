"""Entries and aggregates of the metrics that a log has beside open-unlearning's, from the values
that were measured.

`SET_ended` holds the tokens of the greedy answers and those that ended them, from which repetition,
runs, length and distinct-n follow; `forget_span_probability` the numbers of every span;
`forget_secrets_said` and `forget_secrets_sampled` how many secrets of each example are said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from palu.evaluation.eval_log import Log, LogError
from palu.evaluation.metrics import fell_apart, longest_run, repetition
from palu.evaluation.names import DISTINCT, SAMPLE_LEAKS, SPANS
from palu.evaluation.text import OF_SPANS, distinct_numbers, mean_of, span_means

_SETS = ("forget", "retain", "ra", "wf")
_OF_TOKENS: dict[str, Callable[[list[int]], float | None]] = {
    "repetition": repetition,
    "longest_run": longest_run,
    "answer_tokens": len,
}
_MEANS = ("fluency", "ended", "fell_apart", *_OF_TOKENS, *SPANS, SAMPLE_LEAKS)
_SHARES = ("secrets_said", "secrets_sampled")

OWN = {f"{name}_{kind}": kind for name in _SETS for kind in (*_MEANS, *DISTINCT, *_SHARES)}
"""Metric -> its name in `palu.evaluation.names`."""


def own_aggregate(log: Log, metric: str) -> float | None:
    """Return the aggregate of one of these metrics; None where no row has a value.

    Raises:
        LogError: as `palu.evaluation.tofu.summarize`.
    """
    kind = OWN[metric]
    if kind in DISTINCT:
        name = metric.removesuffix(kind) + "ended"
        return distinct_numbers(_tokens(log, name).values())[kind]
    if kind in _SHARES:
        rows = log.rows(metric)
        said, of = (sum(rows.numbers(field).values()) for field in ("leaked", "asked"))
        return said / of if of else None
    rows = log.rows(metric)
    if all(isinstance(row, Mapping) and row.get("score", 0) is None for row in rows.rows.values()):
        return None
    return mean_of(rows.numbers("score").values())


def own_entries(log: Log) -> dict[str, dict[str, Any]]:
    """Return the entries that derive from others, as far as the log has those, without
    aggregates."""
    derived: dict[str, dict[str, Any]] = {}
    for name in _SETS:
        if f"{name}_ended" not in log.metrics:
            continue
        tokens = _tokens(log, f"{name}_ended")
        for kind, measure in _OF_TOKENS.items():
            derived[f"{name}_{kind}"] = _scored({i: measure(one) for i, one in tokens.items()})
        ends = log.rows(f"{name}_ended").numbers("score")
        apart = {i: float(fell_apart(one, ends[i] > 0)) for i, one in tokens.items()}
        derived[f"{name}_fell_apart"] = _scored(apart)
        derived |= {f"{name}_{kind}": {} for kind in DISTINCT}
    if "forget_span_probability" in log.metrics:
        spans = _field(log, "forget_span_probability", "spans")
        means = {i: span_means(rows) for i, rows in spans.items()}
        for kind in OF_SPANS:
            if kind != "span_probability":
                derived[f"forget_{kind}"] = _scored({i: one[kind] for i, one in means.items()})
    if "forget_secrets_sampled" in log.metrics:
        rates = log.rows("forget_secrets_sampled").numbers("score")
        derived[f"forget_{SAMPLE_LEAKS}"] = _scored(rates)
    return derived


def _tokens(log: Log, metric: str) -> dict[str, list[int]]:
    return _field(log, metric, "tokens")


def _field(log: Log, metric: str, field: str) -> dict[str, list[Any]]:
    """Return a list of each row. Raises LogError for a row without it."""
    rows = log.rows(metric)
    for index, row in rows.rows.items():
        if not isinstance(row, Mapping) or not isinstance(row.get(field), list):
            raise LogError(f"{rows.source}, row {index!r} has no list in field {field!r}")
    return {index: row[field] for index, row in rows.rows.items()}


def _scored(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"value_by_index": {index: {"score": value} for index, value in values.items()}}

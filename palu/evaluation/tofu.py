"""Aggregate TOFU's metrics from the per-example values of a log, named as in open-unlearning.

A set's prefix is `forget`, `retain`, `ra` (real authors) or `wf` (world facts). `*_Q_A_Prob`,
`*_Q_A_PARA_Prob` and `*_Q_A_PERT_Prob` hold probability and loss of the answer, of the paraphrased
one and of the perturbed ones; `*_Q_A_ROUGE` the greedy answer and its ROUGE.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from palu.evaluation.eval_log import Log, LogError, MetricRows, mean
from palu.evaluation.metrics import (
    auc,
    forget_quality,
    forget_truth_ratio,
    kept_truth_ratio,
    model_utility,
    normalised_probability,
    privleak,
    rouge,
    truth_ratio,
)
from palu.evaluation.names import KS_STATISTIC
from palu.evaluation.own_metrics import OWN, own_aggregate, own_entries
from palu.evaluation.quality_error import statistic_of

__all__ = ["TRUTH_RATIOS", "UTILITY", "aggregate", "derived_entries", "summarize"]

UTILITY = (
    "retain_Q_A_Prob",
    "retain_Q_A_ROUGE",
    "retain_Truth_Ratio",
    "ra_Q_A_Prob_normalised",
    "ra_Q_A_ROUGE",
    "ra_Truth_Ratio",
    "wf_Q_A_Prob_normalised",
    "wf_Q_A_ROUGE",
    "wf_Truth_Ratio",
)
"""The nine metrics whose harmonic mean is the model utility."""

TRUTH_RATIOS = {
    "forget_truth_ratio": ("forget_Q_A_PARA_Prob", "forget_Q_A_PERT_Prob"),
    "retain_Truth_Ratio": ("retain_Q_A_PARA_Prob", "retain_Q_A_PERT_Prob"),
    "ra_Truth_Ratio": ("ra_Q_A_Prob", "ra_Q_A_PERT_Prob"),
    "wf_Truth_Ratio": ("wf_Q_A_Prob", "wf_Q_A_PERT_Prob"),
}
"""Truth ratio -> metrics of the right and of the wrong answers. (TOFU has no paraphrases of real
authors and world facts.)"""

_SETS = ("forget", "retain", "ra", "wf")
_MEANS = {f"{s}_Q_A_{kind}Prob": "prob" for s in _SETS for kind in ("", "PARA_", "PERT_")}
_MEANS |= {f"{s}_Q_A_Prob_normalised": "prob" for s in _SETS}
_MEANS |= dict.fromkeys(("exact_memorization", "extraction_strength"), "score")
_MEANS |= {"forget_Q_A_gibberish": "score"}
_ROUGE = {f"{s}_Q_A_{kind}ROUGE" for s in _SETS for kind in ("", "PARA_", "PERT_")}

_Path = Mapping[str, Any] | str | os.PathLike[str]


def summarize(eval_log: _Path, retain_log: _Path | None = None) -> dict[str, float | None]:
    """Compute every aggregate of an evaluation log anew from its per-example values.

    Stored aggregates are not read. `*_Prob`, exact memorization, extraction strength and fluency
    (`forget_Q_A_gibberish`) are means, over rows of means over a row's perturbed answers. ROUGE is
    the mean ROUGE-L recall of the stored `generation` against `ground_truth`, measured anew; where
    a row has no texts, its stored number counts, and where both are there and differ a warning
    says so. Truth ratios, forget quality, model utility and privleak are defined in
    `palu.evaluation.metrics`; every `mia_*` is the AUC of its scores. The metrics that palu has
    beside open-unlearning's are in `palu.evaluation.own_metrics`.

    A row, a value or an item of a list that is None was not measured and is left out. A metric
    whose definition is not known here is left out, with one warning that names all of them.

    Args:
        eval_log: the content of a `TOFU_EVAL.json`, or its path. Of any split; metrics may be
            missing as long as none that is there needs them.
        retain_log: the same of the retrained model. Without it `forget_quality` is None and
            `privleak` is against an AUC of 0.5, as in open-unlearning. One with another number of
            rows is taken with a warning: it may be of another split.

    Returns:
        metric -> aggregate, with the keys of the log in their order (unknown ones left out).

    Raises:
        LogError: (a ValueError) no metric that is known; a metric without `value_by_index`, with
            an empty one or without any measured value; a row without its field; a value that is no
            number or not finite; a metric that another one needs and the log (or the retrained
            model's) lacks. Names log, metric, row and field.
    """
    log = Log.read(eval_log, "eval_log")
    retrained = None if retain_log is None else Log.read(retain_log, "retain_log")
    summary: dict[str, float | None] = {}
    unknown = []
    for metric in log.metrics:
        if _definition(metric) is None:
            unknown.append(metric)
        else:
            summary[metric] = aggregate(log, metric, retrained)
    if not summary:
        raise LogError(f"{log.source}: has none of TOFU's metrics, only {unknown}")
    if unknown:
        warnings.warn(
            f"{log.source}: left out, not one of TOFU's metrics: {', '.join(map(str, unknown))}",
            stacklevel=2,
        )
    return summary


def aggregate(log: Log, metric: str, retrained: Log | None = None) -> float | None:
    """Return the aggregate of one of TOFU's metrics; errors as `summarize`."""
    return _definition(metric)(log, retrained, metric)


def derived_entries(log: Log, retrained: Log | None = None) -> dict[str, dict[str, Any]]:
    """Return the entries that derive from other entries, as far as the log has those: truth ratios,
    normalised probabilities, forget quality, model utility, privleak, and the log's own ones
    (`palu.evaluation.own_metrics`).

    Raises:
        LogError: as `summarize`; two metrics that hold different rows.
    """
    derived: dict[str, dict[str, Any]] = {}
    for metric, (right, wrong) in TRUTH_RATIOS.items():
        if right in log.metrics and wrong in log.metrics:
            pairs = _pairs(log, right, wrong, "avg_loss").items()
            scores = {i: {"score": truth_ratio(w, r)} for i, (r, w) in pairs}
            derived[metric] = {"value_by_index": scores}
    for name in ("ra", "wf"):
        right, wrong = f"{name}_Q_A_Prob", f"{name}_Q_A_PERT_Prob"
        if right in log.metrics and wrong in log.metrics:
            pairs = _pairs(log, right, wrong, "prob").items()
            scores = {i: {"prob": normalised_probability(r, w)} for i, (r, w) in pairs}
            derived[f"{name}_Q_A_Prob_normalised"] = {"value_by_index": scores}
    whole = Log({**log.metrics, **derived}, log.source)
    for metric, needed in (
        ("forget_quality", ("forget_truth_ratio",)),
        ("model_utility", UTILITY),
        ("privleak", ("mia_min_k",)),
    ):
        if all(name in whole.metrics for name in needed):
            derived[metric] = {}
    derived |= own_entries(log)
    whole = Log({**log.metrics, **derived}, log.source)
    for metric, entry in derived.items():
        entry["agg_value"] = aggregate(whole, metric, retrained)
    return {metric: dict(sorted(entry.items())) for metric, entry in derived.items()}


_Definition = Callable[[Log, "Log | None", str], "float | None"]


def _definition(metric: str) -> _Definition | None:
    if metric in _MEANS:
        return _mean
    if metric in _ROUGE:
        return _rouge
    if metric in TRUTH_RATIOS:
        return _truth_ratio
    if str(metric).startswith("mia_"):
        return _auc
    if metric in OWN:
        return lambda log, retrained, metric: own_aggregate(log, metric)
    return {
        "forget_quality": _forget_quality,
        "model_utility": _utility,
        "privleak": _privleak,
        KS_STATISTIC: _ks_statistic,
    }.get(metric)


def _mean(log: Log, retrained: Log | None, metric: str) -> float:
    return mean([*log.rows(metric).numbers(_MEANS[metric]).values()])


def _rouge(log: Log, retrained: Log | None, metric: str) -> float:
    rows = log.rows(metric)
    again, differing = {}, []
    for index, row in rows.rows.items():
        recall = _recall_of_texts(row)
        again[index] = row if recall is None else {"rougeL_recall": recall}
        if recall is not None and row.get("rougeL_recall") not in (None, recall):
            differing.append(index)
    if differing:
        warnings.warn(
            f"{rows.source}: rougeL_recall of {len(differing)} of {len(again)} rows is not that of "
            f"the stored texts, which is taken (first: row {differing[0]!r})",
            stacklevel=4,
        )
    return mean([*MetricRows(again, rows.source).numbers("rougeL_recall").values()])


def _recall_of_texts(row: Any) -> float | list[float] | None:
    """Return ROUGE-L recall of the texts of a row (lists of texts for perturbed answers), None
    where it has none."""
    if not isinstance(row, Mapping):
        return None
    truth, text = row.get("ground_truth"), row.get("generation")
    if isinstance(truth, str) and isinstance(text, str):
        return rouge(truth, text)["rougeL_recall"]
    if not (isinstance(truth, list) and isinstance(text, list) and len(truth) == len(text) > 0):
        return None
    if not all(isinstance(t, str) for t in (*truth, *text)):
        return None
    return [rouge(*pair)["rougeL_recall"] for pair in zip(truth, text, strict=True)]


def _truth_ratio(log: Log, retrained: Log | None, metric: str) -> float:
    ratios = [*log.rows(metric).numbers("score").values()]
    return forget_truth_ratio(ratios) if metric.startswith("forget") else kept_truth_ratio(ratios)


def _auc(log: Log, retrained: Log | None, metric: str, needed_by: str | None = None) -> float:
    parts = [log.rows(metric, part, needed_by).numbers("score") for part in ("forget", "holdout")]
    return auc(*([*part.values()] for part in parts))


def _forget_quality(log: Log, retrained: Log | None, metric: str) -> float | None:
    model = log.rows("forget_truth_ratio", needed_by=metric).numbers("score")
    if retrained is None:
        return None
    other = retrained.rows("forget_truth_ratio", needed_by=metric).numbers("score")
    if len(model) != len(other):
        warnings.warn(
            f"forget quality compares {len(model)} truth ratios of {log.source} with {len(other)} "
            f"of {retrained.source}: are both of one split?",
            stacklevel=4,
        )
    return forget_quality([*model.values()], [*other.values()])


def _ks_statistic(log: Log, retrained: Log | None, metric: str) -> float | None:
    return None if retrained is None else statistic_of(log, retrained)


def _utility(log: Log, retrained: Log | None, metric: str) -> float:
    for name in UTILITY:
        log.entry(name, needed_by=metric)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the metrics themselves gave theirs
        values = [aggregate(log, name) for name in UTILITY]
    return model_utility(values)


def _privleak(log: Log, retrained: Log | None, metric: str) -> float:
    value = _auc(log, retrained, "mia_min_k", metric)
    if retrained is None:
        return privleak(value)
    return privleak(value, _auc(retrained, None, "mia_min_k", metric))


def _pairs(log: Log, right: str, wrong: str, field: str) -> dict[str, tuple[float, list[float]]]:
    """Return a field of right and of wrong answers, for the rows that have both."""
    rights, wrongs = log.rows(right), log.rows(wrong)
    if lacking := set(rights.rows) ^ set(wrongs.rows):
        raise LogError(
            f"{log.source}: metrics {right!r} and {wrong!r} must hold the same rows; row "
            f"{min(lacking, key=str)!r} is in one of them only"
        )
    one, other = rights.numbers(field), wrongs.values(field)
    both = {
        i: (one[i], other[i] if isinstance(other[i], list) else [other[i]])
        for i in one
        if i in other
    }
    if not both:
        raise LogError(f"{log.source}: no row has {field!r} in both {right!r} and {wrong!r}")
    return both

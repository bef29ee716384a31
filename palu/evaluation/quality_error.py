"""How far forget quality can be trusted: its error over questions, and the power of its test.

Forget quality is the p-value of a Kolmogorov-Smirnov test on truth ratios. Of few questions it
varies much from one choice of them to the next, and a large p-value may only say that the test
would not have seen a difference.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from typing import Any

import numpy as np

from palu.evaluation.eval_log import Log
from palu.evaluation.metrics import finite_numbers, forget_quality
from palu.evaluation.names import KS_STATISTIC

LEVEL, POWER = 0.05, 0.8
DRAWS, SEED = 1000, 0
_ENTRIES = 400_000  # of a table of draws and questions
_FARTHEST = 64.0  # of logarithms of truth ratios: a factor of 1e27


def ks_interval(
    ratios: np.ndarray, retain_ratios: np.ndarray, *, draws: int = DRAWS, seed: int = SEED
) -> dict[str, Any]:
    """Return the KS statistic of the truth ratios of n questions under two models, and where it
    and its p-value would be of n other questions like these.

    Questions are drawn again with both of their ratios (bootstrap of p-values: Boos and Stefanski
    2011, The American Statistician 65(4)). Draws are further apart than the samples that they come
    from, most where there is little between the models: their mean is moved onto the statistic.

    Args:
        ratios, retain_ratios: of the same questions in the same order, `[n]`.

    Returns:
        `statistic`, `low`, `high` (95%), `p_low`, `p_high`: p-values of `high` and `low`.
    """
    model, other = _pair(ratios, retain_ratios)
    n = model.size
    chosen = np.random.default_rng(seed).integers(n, size=(draws, n))
    drawn = ks_statistics(model[chosen], other[chosen])
    statistic = float(ks_statistics(model[None], other[None])[0])
    moved = np.clip(drawn - drawn.mean() + statistic, 0, 1)
    low, high = np.quantile(moved, [0.025, 0.975])
    p_low, p_high = (_p_value(value, n) for value in (high, low))
    return {
        "statistic": statistic,
        "low": float(low),
        "high": float(high),
        "p_low": p_low,
        "p_high": p_high,
    }


def detectable_factor(
    retain_ratios: np.ndarray, *, level: float = LEVEL, power: float = POWER, seed: int = SEED
) -> float | None:
    """Return the smallest factor between the truth ratios of two models that the test finds with
    probability `power`; None where it can find none at this number of questions.

    The alternative: truth ratios of one model are distributed as the given ones, those of the other
    as a multiple of them, n of each drawn independently.

    Args:
        retain_ratios: of the retrained model, `[n]`.
        level: p-value below which a difference counts as found.
    """
    values = _logs(finite_numbers("retain_ratios", retain_ratios))
    n = values.size
    below = bisect_left(range(n + 1), True, key=lambda k: _p_value(k / n, n) < level)
    if below > n:
        return None
    size = (int(np.clip(_ENTRIES // n, 200, DRAWS)), n)
    generator = np.random.default_rng(seed)
    one, other = (values[generator.integers(n, size=size)] for _ in range(2))

    def found(shift: float) -> bool:
        return bool(np.mean(ks_statistics(one, other + shift) > (below - 0.5) / n) >= power)

    near, far = 0.0, 0.125
    while not found(far):
        near, far = far, 2 * far
        if far > _FARTHEST:
            return None
    while far - near > 0.01:
        middle = (near + far) / 2
        near, far = (near, middle) if found(middle) else (middle, far)
    return float(np.exp(far))


def ks_statistics(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the two-sample KS statistic of each row of two tables `[draws, n]`."""
    n = one.shape[1]
    values = np.concatenate([one, other], axis=1)
    order = np.argsort(values, axis=1, kind="stable")
    values = np.take_along_axis(values, order, axis=1)
    apart = np.abs(np.cumsum(np.where(order < n, 1, -1), axis=1))
    # Between equal values the distribution functions have not reached their next value yet.
    apart[:, :-1][values[:, 1:] == values[:, :-1]] = 0
    return apart.max(axis=1) / n


def statistic_of(log: Log, retrained: Log) -> float | None:
    """Return the KS statistic of two logs; None where they have truth ratios of other rows."""
    ratios = _ratios(log, retrained)
    return None if ratios is None else float(ks_statistics(*(one[None] for one in ratios))[0])


def quality_error(log: Log, retrained: Log) -> dict[str, Any] | None:
    """Return the entry `forget_ks_statistic` that stands beside forget quality: the statistic as
    its aggregate, `rows`, `interval`, `p_value_interval`, and the `detectable_factor` at `level`
    and `power`; None, with a warning, where the logs have other rows.

    Raises:
        LogError: as `palu.evaluation.tofu.summarize`.
    """
    ratios = _ratios(log, retrained)
    if ratios is None:
        warnings.warn(
            f"no error of forget quality: {log.source} and {retrained.source} have truth ratios of "
            "other rows",
            stacklevel=3,
        )
        return None
    known = ks_interval(*ratios)
    return {
        "agg_value": known["statistic"],
        "rows": ratios[0].size,
        "interval": [known["low"], known["high"]],
        "p_value_interval": [known["p_low"], known["p_high"]],
        "detectable_factor": detectable_factor(ratios[1]),
        "level": LEVEL,
        "power": POWER,
    }


def error_sentence(log: dict[str, Any]) -> str | None:
    """Return what a log knows of its forget quality's error in words; None where nothing."""
    entry = log.get(KS_STATISTIC)
    if not entry:
        return None
    quality, rows = log["forget_quality"]["agg_value"], entry["rows"]
    low, high = entry["p_value_interval"]
    factor = entry["detectable_factor"]
    seen = f"truth ratios that differ by a factor of {factor or 0:.2g} in {entry['power']:.0%} of "
    seen += "cases, smaller differences more rarely"
    return (
        f"Forget quality {quality:.3g} is of {rows} questions; of {rows} others like these it may "
        f"be between {low:.2g} and {high:.2g} (95%). At this number the test finds (p < "
        f"{entry['level']:g}) {'no difference at all' if factor is None else seen}."
    )


def _ratios(log: Log, retrained: Log) -> list[np.ndarray] | None:
    model, other = (
        one.rows("forget_truth_ratio", needed_by=KS_STATISTIC).numbers("score")
        for one in (log, retrained)
    )
    if model.keys() != other.keys():
        return None
    return [np.array([one[i] for i in model]) for one in (model, other)]


def _pair(ratios: np.ndarray, retain_ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    model = finite_numbers("ratios", ratios)
    other = finite_numbers("retain_ratios", retain_ratios)
    if model.size != other.size:
        raise ValueError(
            f"ratios and retain_ratios must be of the same questions, got {model.size} and "
            f"{other.size}"
        )
    return model, other


def _logs(ratios: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(ratios, np.finfo(np.float64).tiny))


def _p_value(statistic: float, n: int) -> float:
    """Return the p-value of a statistic of n against n values, which is k/n for a whole k."""
    k = round(statistic * n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's, where only the asymptotic value can be had
        return forget_quality(np.arange(n), np.arange(n) + k - 0.5 * (k > 0))

"""Rank methods by forgetting at matched utility, with intervals by the bootstrap.

Seeds, forget records and utility examples are drawn with replacement, the same for every method, so
that differences between methods are paired. In each resample every method chooses its settings
anew. Row 0 of every array of resamples is what was measured, undrawn.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from palu.comparison.frontier import NONE, Floats, Ints, area, best_within, steps
from palu.comparison.measures import Measures, Weights

TAILS = (0.025, 0.975)
"""Quantiles of the resamples at which an interval begins and ends."""
RESAMPLES = 2000
AREA_TO = 0.1
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Setting:
    """A setting of a method, of which every seed is done.

    Attributes:
        runs: their columns in the arrays of `Measures`, in the order of the seeds.
    """

    method: str
    name: str
    runs: tuple[int, ...]


class Ranking:
    """The frontiers of methods, and what the bootstrap says of them.

    Args:
        measures: whose first run is the original model.
        settings: all with the same seeds.
        methods: the methods' names in order; one may have no setting.
        losses: of utility, at which the best points are asked for.
        resamples: how many; 0 for no intervals.
        seed: of what is drawn.
    """

    def __init__(
        self,
        measures: Measures,
        settings: Sequence[Setting],
        methods: Sequence[str],
        losses: Sequence[float],
        *,
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> None:
        seeds = {len(setting.runs) for setting in settings}
        if len(seeds) > 1:
            raise ValueError(f"settings must have the same number of seeds, got {sorted(seeds)}")
        self.settings, self.methods, self.losses = list(settings), list(methods), list(losses)
        self.seeds = seeds.pop() if seeds else 1
        weights, self._drawn_seeds = draw(measures.sizes, self.seeds, resamples, seed)
        self._loss = 1 - measures.utility(weights)  # [resamples, runs]
        self._loss[:, 0] = 0.0  # of the original; its ratios are 1 but for a rounding
        self._forgetting = measures.forgetting(weights)
        self.floor = self._forgetting[:, 0]
        self.loss = self._of_settings(self._loss, self._drawn_seeds)
        self.forgetting = self._of_settings(self._forgetting, self._drawn_seeds)
        self.areas = np.stack([self._area(method) for method in self.methods], axis=1)
        self.best = {limit: self._best(limit) for limit in self.losses}

    def _of_settings(self, of_runs: Floats, seeds: Floats) -> Floats:
        """Return [resamples, settings] means over the seeds as they were drawn."""
        runs = np.array([setting.runs for setting in self.settings], dtype=int)
        if not runs.size:
            return np.empty((len(of_runs), 0))
        return np.einsum("bsk,bk->bs", of_runs[:, runs], seeds) / seeds.sum(axis=1)[:, None]

    def of(self, method: str) -> Ints:
        """Return the numbers of a method's settings."""
        return np.flatnonzero([setting.method == method for setting in self.settings])

    def _area(self, method: str) -> Floats:
        own = self.of(method)
        return area(*_there(self.loss[:, own], self.forgetting[:, own]), self.floor, AREA_TO)

    def _best(self, limit: float) -> dict[str, NDArray]:
        """Return "chosen" and "value", each [resamples, methods]; chosen is a number of a
        setting or `NONE`."""
        chosen, values = [], []
        for method in self.methods:
            own = self.of(method)
            there = _there(self.loss[:, own], self.forgetting[:, own])
            which, value = best_within(*there, self.floor, limit)
            chosen.append(np.where(which == NONE, NONE, _take(own, which)))
            values.append(value)
        return {"chosen": np.stack(chosen, axis=1), "value": np.stack(values, axis=1)}

    # ---- what the tables have --------------------------------------------------------------------

    def run(self, number: int) -> dict[str, Any]:
        """Return loss of utility and forgetting of a run, with intervals over examples alone."""
        return {
            "loss": interval(self._loss[:, number]),
            "forgetting": interval(self._forgetting[:, number]),
        }

    def setting(self, number: int) -> dict[str, Any]:
        """Return loss and forgetting of a setting, means over its seeds."""
        return {
            "loss": interval(self.loss[:, number]),
            "forgetting": interval(self.forgetting[:, number]),
        }

    def method(self, number: int) -> dict[str, Any]:
        """Return what is known of a method but its settings: its frontier, the area under it, its
        best points."""
        name = self.methods[number]
        own = self.of(name)
        corners = steps(self.loss[0, own], self.forgetting[0, own], self.floor[0])
        left_out = self._left_out(name)
        return {
            "method": name,
            "area": {**interval(self.areas[:, number]), "left_out": left_out["area"]},
            "best_probability": float(shares(self.areas)[number]),
            "frontier": [
                {
                    "loss": loss,
                    "forgetting": level,
                    "setting": None if which == NONE else self.settings[own[which]].name,
                }
                for loss, level, which in corners
            ],
            "within": [
                self._within(number, limit, left_out["within"][n])
                for n, limit in enumerate(self.losses)
            ],
        }

    def _within(self, number: int, limit: float, left_out: dict | None) -> dict[str, Any]:
        chosen = self.best[limit]["chosen"][:, number]
        which = chosen[0]
        values = self.best[limit]["value"]
        found = {
            "limit": limit,
            "setting": None,
            "forgetting": interval(values[:, number]),
            "loss": interval(np.zeros(1)),
            "chosen": float(np.mean(chosen[1:] == which)) if len(chosen) > 1 else None,
            "best_probability": float(shares(values)[number]),
            "left_out": left_out,
        }
        if which != NONE:
            found |= {"setting": self.settings[which].name, "loss": interval(self.loss[:, which])}
        return found

    def pairs(self) -> list[dict[str, Any]]:
        """Return the differences between every two methods, each resample by resample."""
        result = []
        for a, b in itertools.combinations(range(len(self.methods)), 2):
            within = [
                {"limit": limit, **difference(self.best[limit]["value"], a, b)}
                for limit in self.losses
            ]
            names = {"first": self.methods[a], "second": self.methods[b]}
            result.append({**names, "area": difference(self.areas, a, b), "within": within})
        return result

    def _left_out(self, method: str) -> dict[str, Any]:
        """Return area and best points where a setting is chosen on all seeds but one and read on
        that one, mean over the seeds; None for one seed."""
        own = self.of(method)
        if self.seeds < 2 or not len(own):
            return {"area": None, "within": [None] * len(self.losses)}
        runs = np.array([self.settings[number].runs for number in own])
        loss, level = self._loss[0, runs].T, self._forgetting[0, runs].T  # [seeds, settings]
        others = _there(
            (loss.sum(0) - loss) / (self.seeds - 1), (level.sum(0) - level) / (self.seeds - 1)
        )
        floor = np.full(self.seeds, self.floor[0])

        def read(limit: float) -> tuple[Floats, Floats]:
            """Return [seeds] forgetting and loss of the setting that the other seeds choose."""
            which, _ = best_within(*others, floor, limit)
            each = np.arange(self.seeds)
            of_none = which == NONE
            return np.where(of_none, floor, level[each, which]), np.where(
                of_none, 0.0, loss[each, which]
            )

        edges = np.unique([0.0, AREA_TO, *np.clip(others[0], 0.0, AREA_TO).ravel()])
        under = sum(read(at)[0] * (to - at) for at, to in itertools.pairwise(edges))
        points = [read(limit) for limit in self.losses]
        return {
            "area": float(np.mean(under / AREA_TO)),
            "within": [
                {"forgetting": float(np.mean(level)), "loss": float(np.mean(loss))}
                for level, loss in points
            ],
        }


def draw(sizes: Mapping[str, int], seeds: int, resamples: int, seed: int) -> tuple[Weights, Floats]:
    """Return how often each example of each set is drawn [1 + resamples, examples], and each seed
    [1 + resamples, seeds]; row 0 has everything once."""
    generator = np.random.default_rng(seed)

    def counts(size: int) -> Floats:
        drawn = generator.multinomial(size, np.full(size, 1 / size), size=resamples)
        return np.concatenate([np.ones((1, size)), drawn.astype(np.float64)])

    of_seeds = counts(seeds)
    return {name: counts(sizes[name]) for name in sorted(sizes)}, of_seeds


def interval(values: Floats) -> dict[str, float | None]:
    """Return the value that was measured (`values[0]`) and the interval between the `TAILS` of
    the resamples; None where there are none."""
    low = high = None
    drawn = values[1:][np.isfinite(values[1:])]
    if len(drawn):
        low, high = np.quantile(drawn, TAILS).tolist()
    return {"value": float(values[0]), "low": low, "high": high}


def difference(values: Floats, a: int, b: int) -> dict[str, float | None]:
    """Return the interval of a method's value minus another's, and in which share of the resamples
    it is above 0, where 0 counts half. `values` is [resamples, methods]."""
    apart = values[:, a] - values[:, b]
    drawn = apart[1:]
    above = (
        np.mean(drawn > _ROUNDING) + 0.5 * np.mean(abs(drawn) <= _ROUNDING) if len(drawn) else None
    )
    return {**interval(apart), "probability": None if above is None else float(above)}


def shares(values: Floats) -> Floats:
    """Return [methods] in which share of the resamples each has the greatest value; those that tie
    share one. Without resamples: of what was measured."""
    drawn = values[1:] if len(values) > 1 else values
    tied = drawn >= drawn.max(axis=1, keepdims=True) - _ROUNDING
    return (tied / tied.sum(axis=1, keepdims=True)).mean(axis=0)


def _there(loss: Floats, forgetting: Floats) -> tuple[Floats, Floats]:
    """Return both with loss inf where a resample has no value."""
    known = np.isfinite(loss) & np.isfinite(forgetting)
    return np.where(known, loss, np.inf), np.where(known, forgetting, -np.inf)


def _take(own: Ints, which: Ints) -> Ints:
    return own[which] if len(own) else which

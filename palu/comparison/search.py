"""Settings that Optuna looks for, where a method's configuration has `search`.

Two things are sought at once: much forgetting and little loss of utility, as the frontier has them.
A generation of trials depends on the runs of those before it, on the seed and on nothing else: who
goes on with a comparison, or takes part in it on another machine, looks for the same settings.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from palu.comparison.config import Comparison, Task
from palu.comparison.measures import Measures
from palu.comparison.run_file import DONE, Run, read_run

DIGITS = 3
"""Of a number that is proposed: it stands in the names of runs."""
TRIES = 20
"""Proposals that are looked at for one that is new."""


def check_optuna() -> None:
    """Raise ValueError where Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise ValueError("search: needs Optuna, which is not installed: pip install optuna")


def proposals(
    comparison: Comparison, name: str, known: Sequence[Mapping[str, Any]], values: Sequence[Any]
) -> list[dict[str, Any]]:
    """Return the settings of a method's next generation; none when all trials are there.

    Args:
        known: the settings of the method that were tried, the first of them `settings` of the
            configuration.
        values: for each, (loss of utility, forgetting), or None where it has none.
    """
    import optuna

    search, method = comparison.methods[name].search, comparison.methods[name]
    tried = len(known) - len(method.settings)
    count = min(search["generation"], search["trials"] - tried)
    if count <= 0:
        return []
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {key: distribution(one) for key, one in search["space"].items()}
    sampler = optuna.samplers.TPESampler(
        seed=search["seed"] + tried, n_startup_trials=search["startup"], constant_liar=True
    )
    study = optuna.create_study(directions=["minimize", "maximize"], sampler=sampler)
    for setting, value in zip(known, values, strict=True):
        if set(setting) == set(space) and value is not None:
            trial = optuna.trial.create_trial(
                params=dict(setting), distributions=space, values=list(value)
            )
            study.add_trial(trial)
    found: list[dict[str, Any]] = []
    for _ in range(TRIES * count):
        params = study.ask(space).params
        setting = {key: _short(value, space[key]) for key, value in params.items()}
        if setting not in found and setting not in known:
            found.append(setting)
        if len(found) == count:
            break
    return found


def distribution(one: Any) -> Any:
    """Return Optuna's distribution of an option: of a list of values, or of `low` to `high`."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if isinstance(one, list):
        return CategoricalDistribution(one)
    kind = IntDistribution if isinstance(one["low"], int) else FloatDistribution
    return kind(one["low"], one["high"], log=one["log"])


def _short(value: Any, within: Any) -> Any:
    """Return a number with few digits, still within its bounds."""
    if not isinstance(value, float) or not hasattr(within, "low"):
        return value
    return min(max(float(f"{value:.{DIGITS}g}"), within.low), within.high)


def values_of(
    comparison: Comparison, name: str, settings: Sequence[Mapping[str, Any]], runs: Mapping
) -> list[tuple[float, float] | None]:
    """Return (loss of utility, forgetting) of settings, means over their seeds; None for one of
    which a run diverged or failed.

    Args:
        runs: by the names of tasks, and that of the original model as "original".
    """
    values: list[tuple[float, float] | None] = []
    for setting in settings:
        tasks = [comparison.task(name, setting, seed) for seed in comparison.seeds]
        some: list[Run] = [runs[task.id] for task in tasks]
        if any(run.status != DONE for run in some):
            values.append(None)
            continue
        named = {"original": runs["original"]}
        named |= {task.id: run for task, run in zip(tasks, some, strict=True)}
        measures = Measures(named, comparison.forgetting, comparison.utility_metrics)
        weights = measures.plain()
        loss = 1 - float(measures.utility(weights)[0, 1:].mean())
        forgetting = float(measures.forgetting(weights)[0, 1:].mean())
        good = math.isfinite(loss) and math.isfinite(forgetting)
        values.append((loss, forgetting) if good else None)
    return values


def corners(space: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the settings at the ends of a space, which are checked before any run."""
    ends = [
        (one[0], one[-1]) if isinstance(one, list) else (one["low"], one["high"])
        for one in space.values()
    ]
    return [dict(zip(space, some, strict=True)) for some in zip(*ends, strict=True)]


def trials_of(search: Mapping[str, Any]) -> int:
    """Return how many trials a search has: no more than there are settings in its space."""

    def size(one: Any) -> float:
        if isinstance(one, list):
            return len(one)
        return one["high"] - one["low"] + 1 if isinstance(one["low"], int) else math.inf

    return min(search["trials"], math.prod(map(size, search["space"].values())))


class Searches:
    """The searches of a comparison, generation by generation.

    Args:
        file: the place of a task's run file.
        original: of the original model.
    """

    def __init__(self, comparison: Comparison, file: Callable[[Task], Path], original: Run) -> None:
        self.comparison, self.file = comparison, file
        self.runs: dict[str, Run] = {"original": original}
        self.known = {
            name: list(method.settings)
            for name, method in comparison.methods.items()
            if method.search is not None
        }

    def next(self) -> list[Task]:
        """Return the runs of the next generation of all searches, once those before it are
        there."""
        tasks = []
        for name, known in self.known.items():
            for task in self._tasks(name, known):
                if task.id not in self.runs:
                    self.runs[task.id] = read_run(self.file(task))
            values = values_of(self.comparison, name, known, self.runs)
            more = proposals(self.comparison, name, known, values)
            known += more
            tasks += self._tasks(name, more)
        return tasks

    def _tasks(self, name: str, settings: Sequence[Mapping[str, Any]]) -> list[Task]:
        seeds = self.comparison.seeds
        return [self.comparison.task(name, one, seed) for seed in seeds for one in settings]

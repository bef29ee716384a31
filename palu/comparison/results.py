"""What a comparison found: `comparison.json`, computed from the run files in its folder."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palu.comparison.bootstrap import AREA_TO, RESAMPLES, TAILS, Ranking, Setting
from palu.comparison.config import LOSSES
from palu.comparison.measures import (
    ATTACKS,
    RECORDS,
    TITLES,
    UTILITY,
    Measures,
    leak_rates,
)
from palu.comparison.run_file import (
    DONE,
    FELL_APART,
    FORGET,
    MEMBERSHIP,
    ORIGINAL,
    RETRAINED,
    Run,
    read_run,
)

FORMAT = "palu-comparison/1"

Row = dict[str, Any]


@dataclass(frozen=True)
class Choices:
    """What a configuration decides about a ranking.

    Attributes:
        seeds: that a setting must have to be ranked; None: all that any run has.
        methods: in the order of the tables; others that have runs come after them.
        max_fell_apart: of a setting that is ranked, the largest share of answers to the forget file
            that are no text any more, mean over the seeds; None: any.
    """

    forgetting: str = ATTACKS
    losses: Sequence[float] = LOSSES
    metrics: Sequence[str] = UTILITY
    seeds: Sequence[int] | None = None
    methods: Sequence[str] = ()
    max_fell_apart: float | None = None


@dataclass(frozen=True)
class Folder:
    """The run files of a comparison: the models that nothing was done to, and the runs by their
    names."""

    models: dict[str, Run]
    runs: dict[str, Run]

    @classmethod
    def read(cls, folder: Path) -> Folder:
        """Read them.

        Raises:
            ValueError: a file that cannot be used, no original model, or two runs of one method,
                setting and seed.
        """
        models = {
            name: read_run(path)
            for name in (ORIGINAL, RETRAINED)
            if (path := folder / f"{name}.json").is_file()
        }
        if models.get(ORIGINAL, Run(status="")).status != DONE:
            raise ValueError(f"{folder / ORIGINAL}.json is missing, or the original model failed")
        for name, run in models.items():
            if run.method is not None:
                raise ValueError(f"{folder / name}.json: method must not be there")
        runs: dict[str, Run] = {}
        seen: dict[tuple, str] = {}
        for path in sorted((folder / "runs").glob("*/run.json")):
            run = read_run(path)
            if run.method is None:
                raise ValueError(f"{path}: method is missing")
            name = path.parent.name
            if (before := seen.setdefault((run.method, run.setting, run.seed), name)) != name:
                raise ValueError(
                    f"{folder / 'runs'}: {before} and {name} are both {run.method}, "
                    f"{run.setting or 'one setting'}, seed {run.seed}; remove one of them"
                )
            runs[name] = run
        return cls(models, runs)


def rank(
    found: Folder, choices: Choices | None = None, *, resamples: int = RESAMPLES, seed: int = 0
) -> Row:
    """Return the content of `comparison.json`. Raises ValueError, which says what is not there or
    cannot be compared."""
    choices = choices or Choices()
    done = {name: run for name, run in found.models.items() if run.status == DONE}
    done |= {name: run for name, run in found.runs.items() if run.status == DONE}
    measures = Measures(done, choices.forgetting, choices.metrics)
    methods = list(dict.fromkeys([*choices.methods, *(run.method for run in found.runs.values())]))
    if not methods:
        raise ValueError("there is no run to rank")
    seeds = sorted(choices.seeds or {run.seed for run in found.runs.values()})
    whole, parts = _settings(found.runs, list(done), methods, seeds)
    shares = {one: _fell_apart(list(done.values()), one) for one in whole}
    if (limit := choices.max_fell_apart) is not None:
        broken = {one: why for one in whole if (why := _broken(one, shares[one], limit))}
        parts += [{"method": o.method, "setting": o.name, "why": w} for o, w in broken.items()]
        whole = [one for one in whole if one not in broken]
    ranking = Ranking(measures, whole, methods, choices.losses, resamples=resamples, seed=seed)
    places = {name: number for number, name in enumerate(done)}
    return {
        "format": FORMAT,
        "forgetting": {
            "name": choices.forgetting,
            "title": TITLES.get(
                choices.forgetting, f"1 - the share that {choices.forgetting} gets"
            ),
            "attacks": measures.names,
        },
        "utility": [
            {"set": p.set, "metric": p.metric, "examples": p.examples, "original": p.original}
            for p in measures.parts
        ],
        "losses": list(choices.losses),
        "max_fell_apart": choices.max_fell_apart,
        "area_to": AREA_TO,
        "seeds": seeds,
        "bootstrap": {
            "resamples": resamples,
            "seed": seed,
            "tails": list(TAILS),
            "drawn": {"seeds": len(seeds), **_drawn(measures)},
        },
        "models": {
            name: ranking.run(places[name]) if name in places else None
            for name in (ORIGINAL, RETRAINED)
        },
        "methods": [ranking.method(number) for number in range(len(methods))],
        "pairs": ranking.pairs(),
        "settings": [
            {"method": one.method, "setting": one.name, **ranking.setting(number)}
            | {FELL_APART: shares[one]}
            for number, one in enumerate(whole)
        ],
        "not_ranked": parts,
        "runs": _runs(found, ranking, places, methods),
    }


def _settings(
    runs: Mapping[str, Run], columns: Sequence[str], methods: Sequence[str], seeds: Sequence[int]
) -> tuple[list[Setting], list[Row]]:
    """Return the settings whose seeds are all done, and the others with what they lack."""
    of_setting: dict[tuple[str, str], dict[int, str]] = {}
    for name, run in runs.items():
        of_setting.setdefault((run.method, run.setting), {})[run.seed] = name
    whole, parts = [], []
    for method, setting in sorted(
        of_setting, key=lambda key: (methods.index(key[0]), natural(key[1]))
    ):
        own = of_setting[method, setting]
        lacks = []
        for one in seeds:
            run = runs.get(own.get(one, ""))
            if run is None:
                lacks.append(f"seed {one} was not run")
            elif run.status != DONE:
                lacks.append(f"seed {one} {run.status}: {run.reason}")
        if lacks:
            parts.append({"method": method, "setting": setting, "why": "; ".join(lacks)})
        else:
            numbers = tuple(columns.index(own[one]) for one in seeds)
            whole.append(Setting(method, setting, numbers))
    return whole, parts


def _fell_apart(runs: Sequence[Run], setting: Setting) -> float | None:
    """Return the share of a setting's answers to the forget file that fell apart, mean over the
    seeds; None where a run has no answers."""
    shares = [_means(runs[number])[FORGET].get(FELL_APART) for number in setting.runs]
    return None if None in shares else math.fsum(shares) / len(shares)


def _broken(setting: Setting, share: float | None, limit: float) -> str | None:
    """Return why a setting is not ranked whose answers to the forget file fell apart more often
    than `limit`; None where they did not."""
    if share is None:
        raise ValueError(
            f"max_fell_apart: {setting.method!r} {setting.name!r} has no answers to the forget file"
        )
    if share <= limit:
        return None
    return f"{share:.1%} of its answers to the forget file fell apart, more than {limit:.1%}"


def natural(text: str) -> list[tuple[bool, float, str]]:
    """Return a key that sorts texts with the numbers in them by their size."""
    parts = re.split(r"(\d+\.?\d*(?:e[+-]?\d+)?)", text)
    return [
        (bool(number), float(part) if number else 0.0, "" if number else part)
        for place, part in enumerate(parts)
        for number in [place % 2]
    ]


def _drawn(measures: Measures) -> dict[str, int]:
    names = {RECORDS: "records with secrets"}
    return {names.get(name, f"examples of {name}"): size for name, size in measures.sizes.items()}


def _runs(
    found: Folder, ranking: Ranking, places: Mapping[str, int], methods: Sequence[str]
) -> list[Row]:
    """Return a row for every model and run, also for those that are not done."""
    ordered = sorted(
        found.runs,
        key=lambda name: (
            methods.index(found.runs[name].method),
            natural(found.runs[name].setting),
            found.runs[name].seed,
        ),
    )
    rows = []
    for name in [*found.models, *ordered]:
        run = found.models.get(name) or found.runs[name]
        row: Row = {
            "run": name,
            "method": run.method,
            "setting": run.setting,
            "seed": run.seed,
            "status": run.status,
            "reason": run.reason,
            "utility": None,
            "loss": None,
            "forgetting": None,
        }
        if name in places:
            of_run = ranking.run(places[name])
            row |= {key: of_run[key]["value"] for key in ("loss", "forgetting")}
            row["utility"] = 1 - row["loss"]
        row["leaked"] = leak_rates(run)
        row["auc"] = {a.title: a.auc for a in run.attacks if a.name == MEMBERSHIP}
        row["means"] = _means(run)
        row |= {"numbers": dict(run.numbers), "seconds": dict(run.seconds)}
        row |= {"options": run.options, "command": run.command, "environment": run.environment}
        rows.append(row)
    return rows


def _means(run: Run) -> dict[str, dict[str, float | None]]:
    """Return set -> metric -> mean over the examples that have it."""
    means: dict[str, dict[str, float | None]] = {}
    for name, metrics in run.sets.items():
        means[name] = {}
        for metric, values in metrics.items():
            known = [value for value in values if value is not None]
            if metric != "ids":
                means[name][metric] = math.fsum(known) / len(known) if known else None
    return means

"""How often are two methods told apart that are the same in truth?

    python -m benchmarks.quality.false_alarms     # rows in benchmarks/results/false_alarms.csv

Runs are drawn, without any model: 40 records of one secret, each as hard as it is for both methods;
60 examples of utility; settings that forget more and lose more; seeds that differ in how much they
forget and keep. A false alarm is a 95% interval of the difference of two areas that leaves out 0.
`area` and `left_out` are means over data sets: how much the choice of settings flatters, and what
is left of that where they are chosen on other seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import tables
from benchmarks.machine import RESULTS
from palu.comparison.bootstrap import Ranking, Setting
from palu.comparison.measures import Measures
from palu.comparison.run_file import Attack, Run

RECORDS, EXAMPLES, RESAMPLES = 40, 60, 400
CASES = ((1, 6), (3, 1), (3, 6), (5, 6), (10, 6))
COLUMNS = ("seeds", "settings", "data_sets", "false_alarms", "width", "area", "left_out")


def drawn_run(
    generator: np.random.Generator, hard: np.ndarray, facts: np.ndarray, leak: float, kept: float
) -> Run:
    """Return a run that says a secret with probability 1 / (1 + exp(-hard - leak))."""
    said = generator.random(RECORDS) < 1 / (1 + np.exp(-(hard + leak)))
    noise = 0.05 * generator.standard_normal(EXAMPLES)
    values = np.clip(facts * kept + noise, 0.01, 1).tolist()
    names = [str(n) for n in range(RECORDS)]
    utility = {"ids": [str(n) for n in range(EXAMPLES)], "answer_probability": values}
    attack = Attack(name="greedy", title="greedy", of=[*range(RECORDS)], said=[*map(int, said)])
    return Run(
        sets={"forget": {"ids": names}, "facts": utility},
        secrets=[(n, 0) for n in range(RECORDS)],
        attacks=[attack],
    )


def trial(generator: np.random.Generator, seeds: int, settings: int) -> Ranking:
    """Return the ranking of two methods that are the same."""
    hard = 1.5 * generator.standard_normal(RECORDS)
    facts = np.clip(0.8 + 0.1 * generator.standard_normal(EXAMPLES), 0.1, 1)
    runs = {"original": drawn_run(generator, hard, facts, 6.0, 1.0)}
    tried = []
    for method in "AB":
        for number in range(settings):
            own = []
            for seed in range(seeds):
                own.append(len(runs))
                leak = 1 - 3 * (number + 1) / settings + 0.5 * generator.standard_normal()
                kept = 1 - 0.09 * number / settings + 0.01 * generator.standard_normal()
                name = f"{method} {number} {seed}"
                runs[name] = drawn_run(generator, hard, facts, leak, kept)
            tried.append(Setting(method, str(number), tuple(own)))
    return Ranking(Measures(runs), tried, ("A", "B"), (0.05,), resamples=RESAMPLES, seed=1)


def case(seeds: int, settings: int, data_sets: int) -> dict[str, Any]:
    """Return a row of `COLUMNS`."""
    generator = np.random.default_rng([seeds, settings])
    alarms, widths, areas, left_out = [], [], [], []
    for _ in range(data_sets):
        ranking = trial(generator, seeds, settings)
        apart = ranking.pairs()[0]["area"]
        alarms.append(apart["low"] > 0 or apart["high"] < 0)
        widths.append(apart["high"] - apart["low"])
        for number in range(2):
            found = ranking.method(number)["area"]
            areas.append(found["value"])
            left_out += [] if found["left_out"] is None else [found["left_out"]]
    numbers = [np.mean(alarms), np.mean(widths), np.mean(areas)]
    numbers.append(np.mean(left_out) if left_out else None)
    cells = [None if number is None else round(float(number), 4) for number in numbers]
    return dict(zip(COLUMNS, (seeds, settings, data_sets, *cells), strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.false_alarms", description=__doc__.split("\n")[0]
    )
    p.add_argument("--data-sets", type=int, default=300)
    p.add_argument("--csv", type=Path, default=RESULTS / "false_alarms.csv")
    options = p.parse_args(arguments)
    rows = [case(seeds, settings, options.data_sets) for seeds, settings in CASES]
    tables.write(options.csv, rows, COLUMNS)
    print(options.csv.read_text("utf-8"), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

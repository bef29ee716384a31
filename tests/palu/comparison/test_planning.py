"""What a comparison takes: counted from its configuration, timed by what is there."""

from __future__ import annotations

from palu.comparison.config import from_dict
from palu.comparison.planning import key_of, rows, tried
from palu.comparison.run_file import Run

CONFIG = {
    "model": "m",
    "forget": "f",
    "utility": {"u": "u"},
    "seeds": [0, 1],
    "methods": {
        "A": {"grid": {"beta": [1, 2, 3]}},
        "B": {"search": {"trials": 5, "space": {"beta": {"low": 1, "high": 9}}}},
    },
}


def run(method, seconds, status="done"):
    took = {"unlearn": seconds - 1, "evaluate": 1}
    return Run(method=method, setting="", options={}, seed=0, seconds=took, status=status)


def test_runs_time_and_memory():
    comparison = from_dict(CONFIG)
    setups = {key_of(task): {"memory": 7, "steps": 3} for task in tried(comparison)}
    setups["A\nbeta=2"] = {"memory": 9, "steps": 3}
    setups["B\nbeta=9"] = {"memory": None, "steps": 3}
    first, second, *_ = comparison.tasks()
    runs = {first.id: run("A", 10), second.id: run("A", 30)}
    runs |= {"removed from the configuration": run("A", 14), "x": run("A", 1, "diverged")}
    a, b = rows(comparison, runs, setups, {"B": 4.5})
    # The median of 10, 14 and 30; a run that diverged says nothing of how long one takes.
    assert (a.runs, a.there, a.seconds, a.probed, a.memory) == (6, 2, 14, False, 9)
    assert (b.runs, b.there, b.seconds, b.probed, b.memory) == (10, 0, 4.5, True, 7)


def test_a_search_has_no_more_trials_than_settings():
    space = {"objective": ["entropy", "flatten"], "prefix_length": {"low": 0, "high": 2}}
    content = {**CONFIG, "methods": {"PALU": {"search": {"trials": 24, "space": space}}}}
    comparison = from_dict(content)
    setups = {key_of(task): {"memory": 7, "steps": 3} for task in tried(comparison)}
    assert rows(comparison, {}, setups, {})[0].runs == 2 * 3 * 2
    space["prefix_length"] = {"low": 0.0, "high": 2.0}
    comparison = from_dict(content)
    setups = {key_of(task): {"memory": 7, "steps": 3} for task in tried(comparison)}
    assert rows(comparison, {}, setups, {})[0].runs == 24 * 2

"""Settings that are sought: the same for everybody, few digits, within the space."""

from __future__ import annotations

import math

import pytest

from palu.comparison.config import ConfigError, from_dict
from palu.comparison.perform import RUN_FILE
from palu.comparison.run_file import Attack, Run, write_run
from palu.comparison.search import Searches, corners, proposals

SPACE = {
    "learning_rate": {"low": "1e-5", "high": "1e-1", "log": True},
    "prefix_length": {"low": 0, "high": 5},
    "objective": ["entropy", "flatten"],
}


def comparison(**search):
    method = {"search": {"trials": 7, "generation": 3, "startup": 3, "space": SPACE, **search}}
    parts = {"model": "m", "forget": "f", "utility": {"u": "u"}, "seeds": [0, 1]}
    return from_dict({**parts, "methods": {"palu": method}})


def run(task, best=1e-3):
    """A run of a world in which forgetting grows with the rate, and harm more than that."""
    far = math.log10(task.options["learning_rate"] / best)
    sets = {"forget": {"ids": ["0"]}, "u": {"ids": ["0"]}}
    sets["u"]["answer_probability"] = [min(1.0, 0.9 ** max(far, 0))]
    said = [int(n / 10 > 0.5 + far / 4) for n in range(10)]
    return Run(
        method=task.method,
        setting=task.setting,
        options=task.options,
        seed=task.seed,
        sets=sets,
        secrets=[(n, 0) for n in range(10)],
        attacks=[Attack(name="greedy", title="greedy", of=list(range(10)), said=said)],
    )


ORIGINAL = Run(
    sets={"forget": {"ids": ["0"]}, "u": {"ids": ["0"], "answer_probability": [1.0]}},
    secrets=[(n, 0) for n in range(10)],
    attacks=[Attack(name="greedy", title="greedy", of=list(range(10)), said=[1] * 10)],
)


def go_on(folder, one):
    """Do all runs of the searches that are not there; return the settings by generation."""
    folder.mkdir(exist_ok=True)
    searches = Searches(one, lambda task: folder / task.id / RUN_FILE, ORIGINAL)
    found = []
    while tasks := searches.next():
        assert [task.seed for task in tasks] == [0] * (len(tasks) // 2) + [1] * (len(tasks) // 2)
        for task in tasks:
            place = folder / task.id / RUN_FILE
            if not place.is_file():
                place.parent.mkdir()
                write_run(place, run(task))
        found.append([task.setting for task in tasks if task.seed == 0])
    return found


def test_everybody_looks_for_the_same_settings(tmp_path):
    pytest.importorskip("optuna")
    first = go_on(tmp_path / "a", comparison())
    assert [len(one) for one in first] == [3, 3, 1]
    assert len({setting for some in first for setting in some}) == 7
    assert go_on(tmp_path / "a", comparison()) == first  # gone on with
    assert go_on(tmp_path / "b", comparison()) == first  # elsewhere
    assert go_on(tmp_path / "c", comparison(seed=5)) != first
    # More trials go on from those that are there.
    more = go_on(tmp_path / "a", comparison(trials=9))
    assert more[:2] == first[:2] and more[2][:1] == first[2] and len(more[2]) == 3


def test_proposals_follow_what_was_found():
    """There are more rates near the best than where nothing is known."""
    pytest.importorskip("optuna")
    one = comparison(trials=40, generation=10, startup=10)
    rates = [10 ** (-5 + n / 5) for n in range(20)]
    known = [{"learning_rate": r, "prefix_length": 0, "objective": "entropy"} for r in rates]
    good = [(1.0, 0.0) if not 3e-4 < r < 3e-3 else (0.0, 1.0) for r in rates]
    after = proposals(one, "palu", known, good)
    near = [3e-4 < setting["learning_rate"] < 3e-3 for setting in after]
    blind = proposals(one, "palu", known, [None] * 20)
    near_blind = [3e-4 < setting["learning_rate"] < 3e-3 for setting in blind]
    assert sum(near) > sum(near_blind)


def test_numbers_have_few_digits_and_stay_in_the_space():
    pytest.importorskip("optuna")
    space = {"learning_rate": {"low": 1.2345e-4, "high": 1.2346e-4}, "beta": [1, 2]}
    one = comparison(space=space, trials=2, generation=2)
    for setting in proposals(one, "palu", [], []):
        assert 1.2345e-4 <= setting["learning_rate"] <= 1.2346e-4
    for setting in proposals(comparison(trials=6, generation=6), "palu", [], []):
        assert setting["learning_rate"] == float(f"{setting['learning_rate']:.3g}")
        assert setting["prefix_length"] in range(6)


def test_both_ends_of_a_space_are_checked():
    (search,) = (method.search for method in comparison().methods.values())
    assert corners(search["space"]) == [
        {"learning_rate": 1e-5, "prefix_length": 0, "objective": "entropy"},
        {"learning_rate": 0.1, "prefix_length": 5, "objective": "flatten"},
    ]


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"trials": 0}, "methods.palu.search.trials must be a whole number of at least 1"),
        ({"space": {}}, "methods.palu.search.space must name at least one option"),
        ({"space": {"beta": 1}}, "methods.palu.search.space.beta must hold names and values"),
        ({"space": {"beta": {"low": 2, "high": 1}}}, "low must be a number and below high, not 2"),
        ({"space": {"b": {"low": 0, "high": 1, "log": True}}}, "low must be a number above 0"),
        ({"space": {"beta": {"low": 1}}}, "methods.palu.search.space.beta: high is missing"),
    ],
)
def test_mistakes_name_the_key(search, said):
    with pytest.raises(ConfigError, match=said):
        comparison(**search)

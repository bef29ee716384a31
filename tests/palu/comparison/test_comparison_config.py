"""The configuration of a comparison: strict, and expanded into runs with names of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from palu.cli.compare import configuration
from palu.comparison.config import ConfigError, check_names, from_dict, read_config

ROOT = Path(__file__).parents[3]
METHODS = ("palu", "npo", "grad_diff")


def content(**parts):
    return {
        "model": "m",
        "forget": "f.jsonl",
        "utility": {"others": "u.jsonl"},
        "methods": {"NPO": {"grid": {"beta": [0.1, 0.5], "learning_rate": ["1e-4"]}}},
        **parts,
    }


def test_methods_settings_and_seeds_are_multiplied_seed_by_seed():
    methods = {
        "NPO": {"options": {"epochs": 2}, "grid": {"beta": [0.1, 0.5], "learning-rate": ["1e-4"]}},
        "GradDiff": {"settings": [{"learning_rate": 1e-3}]},
    }
    comparison = from_dict(content(methods=methods, seeds=[3, 5], common={"batch_size": 4}))
    tasks = check_names(comparison, METHODS).tasks()
    assert [(t.seed, t.method, t.setting) for t in tasks] == [
        (seed, *rest)
        for seed in (3, 5)
        for rest in [
            ("NPO", "beta=0.1, learning_rate=0.0001"),
            ("GradDiff", "learning_rate=0.001"),
            ("NPO", "beta=0.5, learning_rate=0.0001"),
        ]
    ]
    npo = {"method": "npo", "batch_size": 4, "epochs": 2, "beta": 0.5, "learning_rate": 1e-4}
    assert dict(tasks[2].options) == npo
    assert tasks[1].options["method"] == "grad_diff"
    assert len({task.id for task in tasks}) == 6
    assert all("/" not in t.id and t.id.startswith(f"{t.method}-") for t in tasks)


def test_a_runs_name_depends_on_what_decides_it_alone():
    alone = from_dict(content()).tasks()
    more = from_dict(content(seeds=[0, 1], losses=[0.5], jobs=4)).tasks()
    assert {task.id for task in alone} < {task.id for task in more}
    other = from_dict(content(common={"epochs": 9})).tasks()
    assert not {task.id for task in alone} & {task.id for task in other}


def test_a_method_without_settings_is_one_run():
    (task,) = from_dict(content(methods={"palu": None})).tasks()
    assert task.setting == "" and task.id.startswith("palu-s0-")


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"modle": "x"}, "unknown key 'modle'; the nearest known one is 'model'"),
        ({"forget": None}, "forget must be a text, not None"),
        ({"utility": {}}, "utility must name at least one file"),
        ({"utility": {"forget": "x"}}, "utility.forget is a name of another set"),
        ({"utility": {"records": "x"}}, "utility.records is a name of another set"),
        ({"methods": {"retrained": None}}, "methods.retrained is a name of another model's rows"),
        ({"seeds": [1, 1]}, "seeds has a seed twice"),
        ({"seeds": [-1]}, r"seeds\[0\] must be a whole number of at least 0, not -1"),
        ({"jobs": 0}, "jobs must be a whole number of at least 1, not 0"),
        ({"keep_models": 1}, "keep_models must be true or false"),
        ({"losses": [2]}, "losses must be a list of numbers between 0 and 1"),
        ({"losses": [0.05, 0.1, 0.05]}, "losses has a loss twice"),
        (
            {"utility_metrics": ["answer_probability", "rougeL_recal"]},
            "utility_metrics: 'rougeL_recal' must be one of answer_probability, ",
        ),
        ({"utility_metrics": ["fluency", "fluency"]}, "utility_metrics has a metric twice"),
        ({"max_fell_apart": 10}, "max_fell_apart must be a number from 0 to below 1, not 10"),
        ({"methods": {"NPO": {"gird": {}}}}, "methods.NPO: unknown key 'gird'"),
        ({"methods": {"NPO": {"grid": {"beta": 1}}}}, "methods.NPO.grid.beta must be a list"),
        ({"methods": {"a/b": {}}}, "'a/b' must be a name of letters"),
        (
            {"methods": {"NPO": {"options": {"beta": 1}, "grid": {"beta": [2]}}}},
            "methods.NPO: beta is in options, and varies",
        ),
        ({"methods": {"NPO": {"grid": {"beta": [1, 1]}}}}, "methods.NPO has the setting"),
        ({"common": {"a-b": 1, "a_b": 2}}, "common has an option twice"),
        (
            {"methods": {"NPO": {"grid": {"beta": [0.12345671, 0.12345672]}}}},
            "methods.NPO has two settings that are called 'beta=0.123457' in the tables",
        ),
        ({"common": {"retain": "x"}}, "common.retain: the configuration has a key"),
    ],
)
def test_mistakes_name_key_and_value(parts, said):
    with pytest.raises(ConfigError, match=said):
        from_dict(content(**parts))


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ({"NPO": {"options": {"seed": 1}}}, "methods.NPO.options.seed is decided by"),
        (
            {"NPO": {"grid": {"max_length": [9]}}},
            "methods.NPO.settings.max_length must be the same",
        ),
        ({"Mine": {}}, "methods.Mine has no option method"),
    ],
)
def test_options_that_the_comparison_decides_are_refused(methods, said):
    with pytest.raises(ConfigError, match=said):
        check_names(from_dict(content(methods=methods)), METHODS)


def test_null_is_the_default_of_options_that_may_be_left_open_alone(tmp_path):
    def read(**method):
        options = {"options": {"method": "palu"}} | method
        path.write_text(json.dumps(content(methods={"PALU": options})))
        configuration(path)

    path = tmp_path / "c.json"
    read(options={"method": "palu", "forget_weight": None})
    range_ = {"trials": 2, "space": {"top_k": [10, None]}}
    for where, method in (
        ("options", {"options": {"method": "palu", "top_k": None}}),
        ("settings", {"grid": {"top_k": [10, None]}}),
        ("search.space", {"search": range_}),
    ):
        with pytest.raises(ConfigError, match=rf"PALU\.{where}\.top_k is null; it must have a val"):
            read(**method)


def test_a_file_with_a_key_twice_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: m\nmethods:\n  NPO: {}\n  NPO: {}\n")
    with pytest.raises(ConfigError, match=r"c\.yaml: not readable: it has the key 'NPO' twice"):
        read_config(path)


def test_the_example_of_the_docs(tmp_path):
    text = (ROOT / "docs" / "comparison.md").read_text()
    path = tmp_path / "c.yaml"
    path.write_text(text.split("```yaml\n")[1].split("```")[0])
    tasks = check_names(read_config(path), METHODS).tasks()
    assert len(tasks) == 3 * (2 * 2 + 2)
    assert {task.options["method"] for task in tasks} == {"npo", "palu"}

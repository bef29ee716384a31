"""Run files: what is written is read again, and what is wrong is refused by file and key."""

import copy
import dataclasses
import json

import pytest

from palu.comparison.run_file import FORMAT, Attack, Run, RunFileError, read_run, write_run

RUN = Run(
    method="NPO",
    setting="beta=0.1",
    options={"beta": 0.1},
    seed=0,
    command="palu unlearn --method npo",
    seconds={"unlearn": 1.5},
    environment={"threads": 1},
    sets={
        "forget": {"ids": ["a", "b"], "answer_probability": [0.5, None]},
        "facts": {"ids": ["a"], "answer_probability": [0.75]},
    },
    secrets=[(0, 0), (1, 0)],
    attacks=[
        Attack(name="greedy", title="no attack", of=[0, 1], said=[1, 0]),
        Attack(name="membership_inference", title="loss", auc=0.5, low=0.4, high=0.6),
    ],
    curve=[{"step": 1, "loss": 2.0, "retain": None}],
    numbers={"fluency": 0.5},
    answers=[{"set": "forget", "id": "a", "tokens": []}],
)


def test_a_run_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "run.json"
    write_run(path, RUN)
    assert read_run(path) == RUN
    assert json.loads(path.read_text())["format"] == FORMAT


def test_a_model_that_nothing_was_done_to_has_no_method(tmp_path):
    original = dataclasses.replace(RUN, method=None, setting=None, options=None, seed=None)
    write_run(tmp_path / "original.json", original)
    assert read_run(tmp_path / "original.json") == original
    assert "method" not in json.loads((tmp_path / "original.json").read_text())


def test_a_run_that_failed_may_have_no_numbers(tmp_path):
    failed = Run(
        method="NPO", setting="", options={}, seed=1, status="failed", reason="out of memory"
    )
    write_run(tmp_path / "run.json", failed)
    assert read_run(tmp_path / "run.json") == failed


# Where in the file, what is put there (None removes it), and the key that the message names.
BROKEN = [
    (["format"], "palu-comparison-run/2", "format must be 'palu-comparison-run/1'"),
    (["method"], "", "method must be"),
    (["method"], None, "method is missing"),
    (["seed"], 0.5, "seed must be a whole number"),
    (["seed"], True, "seed must be a whole number"),
    (["status"], "fine", "status must be one of done, diverged, failed"),
    (["reason"], "", "reason must be"),
    (["extra"], 1, "extra is no key"),
    (["seconds", "unlearn"], "1", "seconds.unlearn must be a finite number"),
    (["sets", "forget"], None, "sets.forget is missing"),
    (["sets", "facts", "ids"], [], "sets.facts.ids is empty"),
    (["sets", "forget", "ids"], ["a", "a"], "sets.forget.ids has the id 'a' twice"),
    (["sets", "forget", "ids", 0], 7, r"sets.forget.ids\[0\] must be a text"),
    (["sets", "forget", "answer_probability"], [0.5], "has 1 values for 2 examples"),
    (
        ["sets", "forget", "answer_probability", 1],
        float("nan"),
        r"sets.forget.answer_probability\[1\] must be a finite number",
    ),
    (["sets", "facts", "answer_probability", 0], True, "must be a finite number, got True"),
    (["secrets", 1], [0, 0], r"secrets has the pair \(0, 0\) twice"),
    (["secrets", 1], [0], r"secrets\[1\] must be two numbers"),
    (["attacks", 0, "name"], None, r"attacks\[0\].name must be"),
    (["attacks", 0, "said"], [1], r"attacks\[0\].said has 1 values for 2 secrets"),
    (["attacks", 0, "said"], None, r"attacks\[0\].said is missing"),
    (["attacks", 0, "said", 0], 0.5, r"attacks\[0\].said\[0\] must be 0 or 1"),
    (["attacks", 0, "of", 1], 2, r"attacks\[0\].of\[1\] is 2, of 2 secrets"),
    (["attacks", 0, "of", 1], 0, r"attacks\[0\].of has the secret 0 twice"),
    (["attacks", 0, "auc"], 0.5, r"attacks\[0\].auc is no key of greedy"),
    (["attacks", 1, "title"], "no attack", "attacks has the title 'no attack' twice"),
    (["attacks", 1, "auc"], None, r"attacks\[1\].auc is missing"),
    (["curve", 0, "step"], None, r"curve\[0\].step is missing"),
    (["curve", 0, "loss"], float("inf"), r"curve\[0\].loss must be a finite number"),
    (["numbers", "fluency"], "much", "numbers.fluency must be a finite number"),
    (["answers", 0, "set"], 1, r"answers\[0\].set must be a text"),
]


@pytest.mark.parametrize(("where", "value", "said"), BROKEN)
def test_what_is_wrong_is_refused_by_file_and_key(tmp_path, where, value, said):
    path = tmp_path / "run.json"
    write_run(path, RUN)
    content = copy.deepcopy(json.loads(path.read_text()))
    *above, last = where
    place = content
    for key in above:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    path.write_text(json.dumps(content))
    with pytest.raises(RunFileError, match=said) as error:
        read_run(path)
    assert str(error.value).startswith(f"{path}: ")


def test_a_run_that_could_not_be_read_is_not_written(tmp_path):
    broken = dataclasses.replace(RUN, status="failed")
    with pytest.raises(RunFileError, match="reason must be a text"):
        write_run(tmp_path / "run.json", broken)
    assert not any(tmp_path.iterdir())


def test_no_json_is_refused(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunFileError, match=r"run\.json: not readable JSON"):
        read_run(tmp_path / "run.json")
    with pytest.raises(RunFileError, match="no such file"):
        read_run(tmp_path / "other.json")

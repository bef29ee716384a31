"""`palu compare`: runs in processes of their own, once each, gone on with where it was stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from palu.cli import compare
from palu.comparison import claims, config, folder, measures, search
from palu.comparison.run_file import read_run, write_run
from palu.comparison.tables import read_choices
from tests.palu.comparison.made import made_run
from tests.support import command, comparing, small

CONFIG = {
    "model": "model",
    "retrained": "retrained",
    "forget": "forget.jsonl",
    "retain": "retain.jsonl",
    "utility": {"others": "retain.jsonl"},
    "utility_metrics": ["answer_probability"],  # models that know nothing have no others
    "seeds": [0, 1],
    "common": {"epochs": 2, "batch_size": 2, "device": "cpu", "max_length": 64},
    "methods": {
        "PALU": {
            "options": {"objective": "entropy", "top_k": 5},
            "settings": [{"learning_rate": 0.01}, {"learning_rate": 1e30}],
        },
    },
    "attacks": {"names": ["greedy", "sampling"], "samples": 2, "temperatures": [1.0]},
    "evaluate": {"max_new_tokens": 8},
    "threads": 1,
}
# What is the same whenever and by whomever a run is done.
NUMBERS = ("method", "setting", "seed", "status", "sets", "secrets", "attacks", "curve", "numbers")
NUMBERS += ("answers",)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with models, data and a configuration."""
    monkeypatch.chdir(tmp_path)
    tokenizer = small.tokenizer()
    for number, name in enumerate(("model", "retrained")):
        command.write_model(tmp_path / name, small.model(tokenizer, seed=number))
    command.write_data(tmp_path)
    write(tmp_path)
    return tmp_path


def write(place, **parts):
    (place / "c.yaml").write_text(yaml.safe_dump({**CONFIG, **parts}))


def start(folder, *words):
    """Start `palu compare` in a process group of its own."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    line = [sys.executable, "-m", "palu", "compare", "c.yaml", *words]
    with open(folder / "said.txt", "a") as said:
        return subprocess.Popen(line, cwd=folder, env=env, stdout=said, stderr=said)


def runs_in(folder):
    return {path.parent.name: read_run(path) for path in folder.glob("c/runs/*/run.json")}


def settled(folder):
    """Nothing of a process is left."""
    assert [list((folder / "c" / name).iterdir()) for name in ("claims", "work")] == [[], []]
    assert not list(folder.glob("c/**/*.safetensors"))


def test_what_is_there_is_kept_and_the_rest_done(world, monkeypatch, capsys):
    """One run is there, one was begun by a process that is gone, two are new."""
    palu = command.palu_in(world, monkeypatch, capsys)
    write(world, seeds=[0])
    status, _, said = palu("compare c.yaml")
    assert status == 0 and "diverged: PALU-learning_rate=1e+30-s0" in said, said
    assert "utility.others: 2 of its 2 examples are in the retain file too" in said
    assert "<bdi> Pa</bdi>" not in (world / "c" / "report.html").read_text()  # of Paris
    runs = runs_in(world)
    (gone,) = (name for name, run in runs.items() if run.status == "done")
    shutil.rmtree(world / "c" / "runs" / gone)
    # of a setting that was taken out of the configuration, too
    (world / "c" / "work" / "PALU-top_k=3-s0@0001").mkdir()
    (world / "c" / "work" / f"{gone}@0000").mkdir()
    claim = {"token": "0000", "machine": claims.machine(), "process": [2**22 + 7, 1]}
    for name in (gone, "PALU-top_k=3-s0"):
        (world / "c" / "claims" / f"{name}.0").write_text(json.dumps(claim))
    kept = {path: path.stat().st_mtime_ns for path in world.glob("c/**/run.json")}
    write(world)
    status, out, _ = palu("compare c.yaml --jobs 2 --show-secrets")
    assert status == 0 and "2 runs done, 2 runs diverged" in out
    for name in ("comparison.json", "comparison.csv", "comparison.tex", "report.html"):
        assert (world / "c" / name).stat().st_size
    assert "<bdi> Pa</bdi>" in (world / "c" / "report.html").read_text()
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items()) and len(kept) == 1
    status, out, error = palu("compare c.yaml --plan --jobs 2")
    assert status == 0 and "4 runs (2 seeds), 4 there. The others take about 0:00:00" in out, error
    assert "*" not in out  # no probe
    settled(world)
    again = runs_in(world)
    assert len(again) == 4
    for name in NUMBERS:  # to the bit, beside another run and after others
        assert getattr(again[gone], name) == getattr(runs[gone], name), name
    (one, other) = (run for run in again.values() if run.status == "done")
    assert set(one.sets) == {"forget", "others"} and one.sets["forget"]["ids"] == ["0", "1", "2"]
    assert set(one.seconds) == {"unlearn", "evaluate", "attack"} and len(one.curve) == 4
    assert [(a.name, len(a.of)) for a in one.attacks] == [("greedy", 4), ("sampling", 4)]
    assert one.secrets == [(0, 0), (1, 0), (2, 0), (2, 1)]
    assert one.curve != other.curve and one.seed != other.seed
    original = read_run(world / "c" / "original.json")
    assert original.method is None and set(original.sets) == set(one.sets)
    assert [a["original"] for a in one.answers] == [a["answer"] for a in original.answers]
    damaged = world / "c" / "runs" / gone / "run.json"
    damaged.write_text(damaged.read_text()[:100])
    status, _, error = palu("compare c.yaml")
    assert status == 2 and f"{gone}/run.json: not readable JSON" in error


def test_mistakes_are_said_before_any_run(world, monkeypatch, capsys):
    palu = command.palu_in(world, monkeypatch, capsys)
    wrong = {"PALU": {"options": {"top_k": -1}}}
    for parts, said in [
        ({"common": {"epocs": 1}}, "common: unknown option 'epocs'; the nearest known one is"),
        ({"methods": wrong}, "methods.PALU, options: top_k is -1; it must be at least 1"),
        ({"attacks": {"sample": 3}}, "attacks: unknown key 'sample'; it must be of names, quick"),
        ({"utility": {"o": "no.jsonl"}}, "no.jsonl"),
        ({"attacks": {"names": ["open_unlearning"]}}, "'open_unlearning', which asks for no"),
        ({"forgetting": "greedily"}, "greedily"),
        ({"utility": {"o": "forget.jsonl"}}, "utility.o: 3 of its 3 examples are in the forget"),
    ]:
        write(world, **parts)
        assert said in command.refusal(palu, "compare c.yaml"), said
    write(world, jobs=0)
    assert "jobs must be a whole number" in command.refusal(palu, "compare c.yaml")


def test_another_model_or_other_data_is_refused(tmp_path):
    comparison = config.from_dict({**CONFIG, "threads": None})
    digests = {"model": "a", "forget file": "b"}
    assert folder.open_folder(tmp_path / "c", comparison, digests, threads=3) == 3
    assert folder.open_folder(tmp_path / "c", comparison, digests, threads=5) == 3
    more = config.from_dict({**CONFIG, "threads": None, "seeds": [7], "losses": [0.5]})
    folder.open_folder(tmp_path / "c", more, digests, threads=3)
    before = (tmp_path / "c" / "comparison.yaml").read_text()
    for parts, others, what in [
        ({}, {"model": "x"}, "the model"),
        ({}, {"utility set others": "x"}, "the utility set others"),
        ({"attacks": {"samples": 9}}, {}, "attacks"),
        ({"methods": {"PALU": {"options": {"top_k": 6}}}}, {}, r"methods\.PALU\.options"),
        ({"threads": 9}, {}, "threads"),
    ]:
        other = config.from_dict({**CONFIG, "threads": None, **parts})
        with pytest.raises(ValueError, match=f"of another comparison: {what} differs"):
            folder.open_folder(tmp_path / "c", other, {**digests, **others}, threads=3)
    (tmp_path / "c" / "comparison.yaml").unlink()
    (tmp_path / "c" / "mine.txt").write_text("")
    with pytest.raises(ValueError, match="holds something that palu compare did not write"):
        folder.open_folder(tmp_path / "c", comparison, digests, threads=3)
    (tmp_path / "c" / "mine.txt").unlink()
    assert "model: model" in before


def test_a_method_that_was_left_out_does_not_come_back_with_other_options(tmp_path):
    """Its runs are still there, and would stand in one line of the table with the new ones."""
    place = tmp_path / "c"
    both = {**CONFIG["methods"], "NPO": {"options": {"beta": 0.1}}}
    for methods in (both, CONFIG["methods"], CONFIG["methods"]):
        comparison = config.from_dict({**CONFIG, "methods": methods})
        folder.open_folder(place, comparison, {}, threads=1)
        (place / "runs" / "npo").mkdir(parents=True, exist_ok=True)
        write_run(place / "runs" / "npo" / "run.json", made_run("NPO"))
    other = config.from_dict({**CONFIG, "methods": {"NPO": {"options": {"beta": 5.0}}}})
    with pytest.raises(ValueError, match=r"methods\.NPO\.options differs"):
        folder.open_folder(place, other, {}, threads=1)
    shutil.rmtree(place / "runs")
    folder.open_folder(place, comparison, {}, threads=1)
    folder.open_folder(place, other, {}, threads=1)
    assert read_choices(place / folder.FILE).methods == ("NPO",)


def test_a_retain_file_of_one_method_is_data_too(world):
    """Other runs are not asked what is in it, and methods that name one may be added."""
    methods = {"PALU": {"options": {"retain": "more.jsonl"}}, "NPO": {"grid": {"retain": ["none"]}}}
    (world / "more.jsonl").write_text((world / "retain.jsonl").read_text())
    both = config.from_dict({**CONFIG, "methods": methods})
    one = config.from_dict({**CONFIG, "methods": {"NPO": methods["NPO"]}})
    for comparison in (one, both, one, both):
        folder.open_folder(world / "c", comparison, compare._digests(comparison), threads=1)
    (world / "more.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    folder.open_folder(world / "c", one, compare._digests(one), threads=1)
    with pytest.raises(ValueError, match=r"the retain file of a method: more\.jsonl differs"):
        folder.open_folder(world / "c", both, compare._digests(both), threads=1)


def test_an_option_of_the_trainer_can_be_turned_off():
    """Some of them are on by default; palu unlearn's own are off."""
    common = {"bf16": False, "average_tokens_across_devices": False}
    content = {"model": "m", "forget": "f", "utility": {"u": "u"}, "methods": {"npo": {}}}
    made = config.from_dict({**content, "common": common})
    words = compare.words_of(made, made.tasks()[0], "out")
    assert "--bf16" not in words
    assert words[words.index("--set") + 1] == "average_tokens_across_devices=False"


def test_retry_does_failed_runs_of_a_search_again(tmp_path, monkeypatch):
    """Which it proposes is known only while it goes on."""
    monkeypatch.setattr(compare, "work", comparing.work)
    monkeypatch.setattr(measures, "Measures", lambda *runs: None)
    monkeypatch.setattr(search, "proposals", lambda c, name, known, values: [{}][len(known) :])
    sought = {"trials": 1, "space": {"learning_rate": [1.0]}}
    methods = {"killed": {"options": {"method": "npo"}, "search": sought}}
    parts = {"model": "m", "forget": "f", "utility": {"u": "u"}, "methods": methods}
    for retry, times in ((False, 1), (False, 1), (True, 2)):
        how = {"jobs": 1, "threads": 1, "retry": retry}
        failed = compare._run(tmp_path, config.from_dict(parts), {"cards": 0}, **how)
        done = (tmp_path / comparing.LIST).read_text().count("killed-")
        assert (failed, done) == (1, times)


@pytest.mark.slow
def test_killed_and_gone_on_with(world):
    """Killed between runs as power cuts do; the rest is done, and what was done stays."""
    write(world, retrained=None)
    process = start(world)
    until = time.monotonic() + 300
    while not runs_in(world) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = {path: path.stat().st_mtime_ns for path in world.glob("c/runs/*/run.json")}
    assert first and len(first) < 4, (world / "said.txt").read_text()
    assert start(world, "--jobs", "2").wait() == 0, (world / "said.txt").read_text()
    runs = runs_in(world)
    assert sorted((run.setting, run.seed, run.status) for run in runs.values()) == [
        ("learning_rate=0.01", 0, "done"),
        ("learning_rate=0.01", 1, "done"),
        ("learning_rate=1e+30", 0, "diverged"),
        ("learning_rate=1e+30", 1, "diverged"),
    ]
    assert all(path.stat().st_mtime_ns == when for path, when in first.items())
    settled(world)
    for run in runs.values():
        assert (run.reason is None) == (run.status == "done")
        assert run.environment["threads"] == 1


def test_logs_that_were_made_elsewhere_are_compared(tmp_path, monkeypatch, capsys):
    palu = command.palu_in(tmp_path, monkeypatch, capsys)
    for name, prob in (("npo", 0.5), ("palu", 0.1)):
        rows = {str(n): {"prob": prob + n / 10, "avg_loss": 1.0} for n in range(3)}
        log = {"forget_Q_A_Prob": {"agg_value": prob + 0.1, "value_by_index": rows}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "TOFU_EVAL.json").write_text(json.dumps(log))
    status, said, _ = palu("compare --logs npo palu/TOFU_EVAL.json --output out")
    assert status == 0 and "0.2 *" in said and "Written to out" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["logs.csv", "logs.png"]
    for line, error in (
        ("compare --logs npo none", "none: no such file"),
        ("compare npo palu", "give one configuration, not 2"),
        ("compare --logs npo palu --plan", "--plan is for runs"),
        ("compare --logs npo palu --show-secrets", "--show-secrets is for runs"),
        ("compare npo --retain-log palu", "--retain-log is for --logs"),
    ):
        status, _, errors = palu(line)
        assert status == 2 and error in errors

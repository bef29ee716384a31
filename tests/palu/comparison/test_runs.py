"""Runs: each is done once by whomever, and one that dies is a row that says so."""

from __future__ import annotations

import threading
from collections import Counter

import pytest

from palu.comparison.claims import Claims
from palu.comparison.run_file import read_run
from palu.comparison.runs import Runs
from tests.support import comparing


def runs_of(folder, comparison, jobs=2, **more):
    folder.mkdir(exist_ok=True)
    more.setdefault("claims", Claims(folder / "claims", every=0.5))
    return Runs(folder, comparison, comparing.work, comparing.words, jobs=jobs, threads=1, **more)


def noted(folder):
    return [line.split() for line in (folder / comparing.LIST).read_text().splitlines()]


def test_two_that_start_at_once_do_every_run_once(tmp_path):
    comparison = comparing.comparison("a", "b")
    tasks = comparison.tasks()
    ended, errors = [], []

    def take_part():
        try:
            runs = runs_of(tmp_path / "c", comparison)
            runs.run(tasks, lambda *_: None, lambda task, run: ended.append(task.id))
        except BaseException as error:
            errors.append(error)

    both = [threading.Thread(target=take_part) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert errors == []
    assert Counter(name for name, _ in noted(tmp_path / "c")) == {task.id: 1 for task in tasks}
    assert sorted(ended) == sorted(task.id for task in tasks)
    for name in ("claims", "work"):
        assert list((tmp_path / "c" / name).iterdir()) == []


def test_one_that_dies_is_a_row_and_ends_nothing(tmp_path):
    comparison = comparing.comparison("killed", "a", "raises")
    tasks, said = comparison.tasks(), {}
    environments = [{"CARD": "0"}, {"CARD": "1"}]
    runs = runs_of(tmp_path / "c", comparison, environments=environments)
    runs.run(tasks, lambda *_: None, lambda task, run: said.setdefault(task.id, run))
    found = {task.id: read_run(runs.file(task)) for task in tasks}
    assert found == said
    assert {(run.method, run.status, run.reason) for run in found.values()} == {
        ("killed", "failed", "the process of the run ended: killed by signal 9"),
        ("a", "done", None),
        ("raises", "failed", "RuntimeError: of its own"),
    }
    assert {card for _, card in noted(tmp_path / "c")} == {"0", "1"}
    # They stay, until they are asked for again.
    runs.run(tasks, lambda *_: None, lambda *_: pytest.fail("done again"))
    runs.forget_failed(tasks)
    again = []
    runs.run(tasks, lambda *_: None, lambda task, run: again.append(run.method))
    assert sorted(again) == ["killed"] * 3 + ["raises"] * 3


def test_who_is_stopped_leaves_nothing_and_no_row(tmp_path):
    """As Ctrl-C does: the processes of the runs end, and others can have them at once."""
    comparison = comparing.comparison("a", "slow")
    tasks = comparison.tasks()

    def stop(done, total, note):
        if "slow" in note and done:
            raise KeyboardInterrupt

    runs = runs_of(tmp_path / "c", comparison, jobs=1)
    with pytest.raises(KeyboardInterrupt):
        runs.run(tasks, stop, lambda *_: None)
    assert [read_run(path).method for path in tmp_path.glob("c/runs/*/run.json")] == ["a"]
    for name in ("claims", "work"):
        assert list((tmp_path / "c" / name).iterdir()) == []


def test_a_run_that_was_taken_over_is_dropped(tmp_path):
    """Who was away for long finds that another one has its run, and writes nothing."""
    comparison = comparing.comparison("slow")
    (task, *_) = comparison.tasks()
    claims = Claims(tmp_path / "claims", every=0.1)
    runs = runs_of(tmp_path, comparison, jobs=1, claims=claims)
    told = []

    def tell(done, total, note):
        told.append(note)
        if len(told) == 1:
            (claims.folder / f"{task.id}.9").write_text("")  # another one's
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.run([task], tell, lambda *_: None)
    assert told == [task.id, *["waiting for runs of other processes"] * 2]
    assert f"{task.id}.9" in {path.name for path in claims.folder.iterdir()}
    assert list((tmp_path / "work").iterdir()) == [] and not (tmp_path / "runs").exists()

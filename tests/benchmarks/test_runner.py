"""The harness measures what was there and what was not, and says where."""

import csv
import json
import os

import pytest
import torch

from benchmarks import runner as harness

CPU = torch.device("cpu")
MEGABYTE = 2**20


def touched(size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.uint8)


@pytest.mark.parametrize("megabytes", [8, 64])
def test_peak_is_what_was_there_at_once(megabytes):
    with harness.PeakMemory(CPU) as peak:
        first = touched(megabytes * MEGABYTE)
        del first
        second = touched(megabytes * MEGABYTE)  # not beside the first
        third = touched(megabytes * MEGABYTE)
    assert 2 * megabytes * MEGABYTE <= peak.extra + MEGABYTE
    assert peak.extra < (2 * megabytes + 4) * MEGABYTE
    assert peak.before > second.numel() + third.numel()


def test_memory_from_before_does_not_count():
    held = touched(64 * MEGABYTE)
    gone = [torch.ones(MEGABYTE // 64) for _ in range(1024)]  # small: the allocator keeps them
    del gone
    with harness.PeakMemory(CPU) as peak:
        held += 1
    assert peak.extra < 4 * MEGABYTE
    with harness.PeakMemory(CPU) as peak:
        again = [torch.ones(MEGABYTE // 64) for _ in range(1024)]
    assert peak.extra > 60 * MEGABYTE and len(again) == 1024


def test_providers_take_turns():
    turns = list(harness.turns(["a", "b", "c"], 4))
    assert [p for r, p in turns if r == 0] == ["a", "b", "c"]
    assert [p for r, p in turns if r == 1] == ["b", "c", "a"]
    for repeat in range(4):
        assert sorted(p for r, p in turns if r == repeat) == ["a", "b", "c"]


def test_environment_and_commit():
    found = harness.environment(CPU)
    assert {*found, "commit"} == set(harness.ENVIRONMENT)
    assert f"torch={torch.__version__}" in found["versions"] and found["processor"]
    assert found["threads"] == torch.get_num_threads()
    assert len(harness.commit().split()[-1]) == 12


def test_rows_are_whole_or_not_there(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    harness.write_csv(path, ("a", "b"), [{"a": 1, "b": None}])
    with pytest.raises(ValueError, match="has no b"):
        harness.write_csv(path, ("a", "b"), [{"a": 1, "b": 2}, {"a": 3}])
    with path.open(newline="") as stream:
        assert list(csv.DictReader(stream)) == [{"a": "1", "b": ""}]


def test_a_worker_is_another_process_with_plain_settings(tmp_path, monkeypatch):
    package = tmp_path / "echo.py"
    package.write_text(
        "import json, os\n"
        "from benchmarks.runner import worker_task\n"
        "print('noise')\n"
        "print(json.dumps({'pid': os.getpid(), 'task': worker_task(None), **os.environ}))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PALU_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    task = {"provider": "x", "shape": [1, 2]}
    found = harness.run_worker("echo", task, threads=3)
    assert found["task"] == json.loads(json.dumps(task)) and found["pid"] != os.getpid()
    assert found["OMP_NUM_THREADS"] == "3" and found["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "PALU_BACKEND" not in found and "TRITON_INTERPRET" not in found
    package.write_text("raise SystemExit('no memory')\n")
    with pytest.raises(RuntimeError, match=r"measured x ended with status 1: no memory"):
        harness.run_worker("echo", task, threads=1)


def test_worker_task_of_an_ordinary_call():
    assert harness.worker_task(["--repeats", "3"]) is None
    assert harness.worker_task([]) is None

"""`python -m benchmarks run sharded`: what it measures, its cost model, and what it says.

(tests/benchmarks/test_ranks.py compares predictions with real ranks.)"""

import csv
import subprocess
import sys

import pytest

import benchmarks.__main__ as command
from benchmarks import declare, runner, sharded, tables
from benchmarks.memory.exchange import exchanges
from benchmarks.memory.model import sizes_of
from benchmarks.memory.ranks import Found
from palu.planning.model import KNOWN_MODELS
from palu.planning.step import Setup, predict
from tests.support import ROOT

LLAMA, LARGE = sharded.LARGE_MODELS


def test_it_is_a_command():
    assert "sharded" in command.scripts()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`main` in this process -> (exit status, rows, launches); ranks find what is predicted times
    `factor`."""

    def run(*words, factor=1.0):
        launches = []

        def fork(processes, cases, folder):
            launches.append(processes)
            [case] = cases
            peak = predict(sizes_of(case.config), Setup(**case.setup)).peak * factor
            times = [0.5 / processes] * case.timed
            return [[Found(peak=peak, seconds=times, cpu_seconds=times)] * processes]

        def run_worker(module, task, threads, repo=None):
            for number, (values, provider) in enumerate(task["measurements"]):
                case = declare.Case(*values)
                yield number, sharded.measure(sharded.BENCHMARK, case, provider, task)

        monkeypatch.setattr(runner, "run_worker", run_worker)
        monkeypatch.setattr(sharded.ranks, "fork", fork)
        path = tmp_path / "sharded.csv"
        status = sharded.main(["--tiny", "--csv", str(path), *words])
        with path.open(newline="") as stream:
            return status, list(csv.DictReader(stream)), launches

    return run


def test_rows_and_tables(run, tmp_path, capsys):
    status, rows, launches = run("--repeats", "2", "--calls", "3")
    assert status == 0 and len(launches) == 2 * len(sharded.WAYS)
    assert set(launches) == {1, 2, 4}
    measured = [row for row in rows if row["kernel"] == sharded.STEP]
    times = {row["provider"]: row for row in measured if row["metric"] == "seconds"}
    assert times.keys() == sharded.WAYS.keys()
    assert all(row["samples"] == "6" for row in times.values())
    alive = {
        row["provider"]: float(row["p50"]) for row in measured if row["metric"] == "live_bytes"
    }
    assert alive["FSDP2 x4"] < alive["FSDP2 x2"] < alive["1 process"]
    predicted = [row for row in rows if row["kernel"] == sharded.MODEL]
    assert len(predicted) == 2 * 2 * len(sharded.LARGE_WAYS) * 5
    for row in predicted:
        assert row["status"] == "predicted: nothing was run" and row["device"] == "none"
    out = capsys.readouterr().out
    assert "Predicted, nothing was run: 8 x 512 a data-parallel rank" in out
    line = next(
        line for line in out.splitlines() if line.startswith("FSDP2 x2  ") and "0.50" in line
    )
    assert "DISAGREE" not in out and line
    assert sharded.main(["--show", str(tmp_path / "sharded.csv")]) == 0
    assert "Llama-3.1-70B, LoRA 16, FSDP2 x64" in capsys.readouterr().out
    assert tables.read(tmp_path / "sharded.csv")


def test_a_prediction_that_is_off_is_found(run, capsys):
    words = "--repeats", "1", "--calls", "1", "--providers", "1 process", "FSDP2 x2"
    status, _, _ = run(*words, factor=0.8)
    assert status == 1 and "DISAGREE: FSDP2 x2 float32: predicted +25.0%" in capsys.readouterr().out


def test_a_batch_that_cannot_be_shared(run):
    with pytest.raises(ValueError, match="--batch is 6; it must be divisible by 4 ranks"):
        run("--batch", "6")


@pytest.mark.slow
def test_real_ranks(tmp_path):
    """As a user runs it."""
    path = tmp_path / "sharded.csv"
    words = [sys.executable, "-m", "benchmarks", "run", "sharded", "--tiny", "--together"]
    words += ["--repeats", "1", "--calls", "1", "--csv", str(path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = [row for row in tables.read(path) if row["kernel"] == sharded.STEP]
    assert {row["provider"] for row in rows} == sharded.WAYS.keys()
    assert {row["status"] for row in rows} == {"ok"}


def total(model, setup, purposes=None):
    found = exchanges(sizes_of(KNOWN_MODELS[model]), setup, 1000)
    found = [one for one in found if purposes is None or one.purpose in purposes]
    return sum(one.sent for one in found), sum(one.calls for one in found)


def test_one_device_exchanges_nothing():
    assert total(LLAMA, Setup()) == (0, 0)


def test_what_shards_exchange():
    """Of 8 devices each sends 7/8 of the weights for every gathering, and of the gradients."""
    sizes, setup = sizes_of(KNOWN_MODELS[LLAMA]), Setup(devices=8, reference="none")
    weights, root = 2 * sizes.parameters, 2 * sizes.root_parameters
    sent, calls = total(LLAMA, setup)
    gathered = 2 * root + 4 * (weights - root)
    assert sent == pytest.approx(7 / 8 * (gathered + 2 * weights), rel=1e-6)
    assert calls == 2 * (1 + 32 + 32) + 2 * 33
    live = total(LLAMA, Setup(devices=8))
    assert live[0] - sent == pytest.approx(7 / 8 * (weights + root), rel=1e-6)
    lora = total(LLAMA, Setup(devices=8, lora_rank=16, reference="none"), ["gradients"])
    assert lora[1] == 2 * 32 and lora[0] < sent / 200


def test_what_the_loss_exchanges_does_not_grow_with_the_vocabulary():
    setup = Setup(devices=8, tensor_parallel=8)
    purposes = ["statistics", "select"]
    config = KNOWN_MODELS[LLAMA] | {"vocab_size": 32000}
    small = [one for one in exchanges(sizes_of(config), setup, 1000) if one.purpose in purposes]
    sent, calls = total(LLAMA, setup, purposes)
    assert (sent, calls) == (sum(one.sent for one in small), sum(one.calls for one in small))
    rows = round(0.33 * 8 * 512)
    assert sent / 7 < rows * 150 and calls == 3 + 4 + 1


def test_both_ways_exchange_both():
    both = Setup(devices=64, tensor_parallel=8)
    found = exchanges(sizes_of(KNOWN_MODELS[LARGE]), both, 1000)
    purposes = [
        "weights",
        "gradients",
        "residual stream",
        "statistics",
        "select",
        "hidden gradient",
    ]
    assert list(dict.fromkeys(one.purpose for one in found)) == purposes

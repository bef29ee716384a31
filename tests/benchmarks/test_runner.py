"""The runner measures what is right, says what is wrong, and drops nothing."""

import argparse
import dataclasses
import os
import subprocess
import sys
import time
from typing import NamedTuple

import pytest
import torch

from benchmarks import declare, machine, runner, tables, timing, worker
from benchmarks.declare import NO_TIME, Call, Case, Provider, Result
from benchmarks.providers import differentiated

CPU = torch.device("cpu")
MEGABYTE = 2**20


class Inputs(NamedTuple):
    x: torch.Tensor

    @property
    def leaves(self):
        return {"gradient": self.x}


def square(case, given):
    return given.x.square().mean()


def provider(loss, **options):
    return Provider(lambda case, given: differentiated(loss, case, given), **options)


def fails(case, given):
    raise RuntimeError("first line\nno kernel image")


RIGHT = {
    "right": provider(square),
    "double": provider(lambda case, given: given.x.double().square().mean()),
    "floor": Provider(lambda case, given: Call(lambda: None)),
    "peer": provider(square, package="surely-not-installed"),
    "gpu": provider(square, lacks=lambda device: "needs a GPU"),
    "none": declare.NO_OPERATION,
}


def benchmark(**more):
    def inputs(case, device):
        generator = torch.Generator(device).manual_seed(0)
        return Inputs(torch.randn(case.rows, case.V, generator=generator).requires_grad_())

    def truth(case, given):
        exact = Inputs(given.x.detach().double().requires_grad_())
        return differentiated(square, case, exact).run()

    def cases(given):
        return [Case("square", V, None, 3, None, dtype) for dtype in given.dtype for V in given.V]

    def add_options(parser: argparse.ArgumentParser):
        parser.add_argument("--V", nargs="+", type=int, default=[5])

    return declare.Benchmark(
        name="fake",
        description="What does a square cost?",
        kernels={"square": RIGHT | more},
        add_options=add_options,
        cases=cases,
        inputs=inputs,
        truth=truth,
        dtypes=("float32",),
        calls=2,
    )


@pytest.fixture
def run(in_process, tmp_path):
    """-> (exit status, rows by provider and metric)."""

    def run(fake, *options):
        status, rows = in_process(fake, tmp_path / "rows.csv", *options)
        return status, {(row["provider"], row["metric"]): row for row in rows}

    return run


# ---- what is reported ----------------------------------------------------------------------------


@pytest.mark.parametrize("together", [False, True])
def test_every_provider_is_reported(run, together, capsys):
    status, rows = run(benchmark(), "--repeats", "3", *["--together"] * together)
    assert status == 0
    memory = {"peak_bytes", "bytes_before", "allocated_bytes"}
    times = {"seconds", "cpu_seconds"}
    metrics = {"loss", "loss_error", "gradient_error", *times, *memory}
    for name in ("right", "double"):
        assert {metric for who, metric in rows if who == name} == metrics
        row = rows[name, "seconds"]
        assert row["samples"] == "6" and row["status"] == "ok" and row["commit"]
        assert [len(process) for process in tables.by_process(row)] == [2, 2, 2]
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert (row["kernel"], row["V"], row["D"], row["rows"]) == ("square", 5, None, 3)
        assert rows[name, "gradient_error"]["p50"] < 1e-6
    assert {metric for who, metric in rows if who == "floor"} == {*times, *memory}
    why = {"peer": "surely-not-installed is not installed", "gpu": "needs a GPU"}
    why["none"] = "no such operation"
    out = capsys.readouterr().out
    for name, reason in why.items():
        row = rows[name, "seconds"]
        assert (row["samples"], row["p50"], row["status"]) == ("0", None, reason)
        assert row["processor"] and row["versions"]
        assert any(line.startswith(name) and line.endswith(reason) for line in out.splitlines())


WRONG = {
    "half": lambda case, given: given.x.square().mean() / 2 + square(case, given).detach() / 2,
    "no_gradient": lambda case, given: given.x.sum() * 0 + square(case, given).detach(),
    "swapped": lambda case, given: (
        (given.x * given.x.detach().flip(0)).mean() * 2 - given.x.detach().square().mean()
    ),
    "loss": lambda case, given: square(case, given) + 1e-3,
    "nan": lambda case, given: square(case, given) * torch.nan,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_provider_is_not_timed(name, run, capsys):
    status, rows = run(benchmark(wrong=provider(WRONG[name])), "--repeats", "2")
    assert status == 1
    assert ("wrong", "seconds") not in rows and ("wrong", "peak_bytes") not in rows
    row = rows["wrong", "gradient_error"]
    assert row["status"].startswith("wrong: ") and row["samples"] == "1"
    assert "off by" in row["status"] and row["status"][:60] in capsys.readouterr().out
    assert rows["right", "seconds"]["samples"] == "4"


def test_a_rough_output_is_timed_and_said(run):
    loss = {"loss": provider(WRONG["loss"], rough=("loss",))}
    wide = provider(WRONG["half"], allowed=lambda case, name: 0.6)
    status, rows = run(benchmark(**loss, wide=wide, half=provider(WRONG["half"], rough=("loss",))))
    assert status == 1  # the gradient of half is not rough
    assert rows["loss", "seconds"]["status"].startswith("rough: loss off by")
    assert rows["loss", "seconds"]["samples"] == "6" and ("half", "seconds") not in rows
    assert rows["wide", "seconds"]["status"] == "ok"


def test_a_provider_that_fails_is_reported(run):
    status, rows = run(benchmark(broken=provider(fails)), "--repeats", "2")
    assert status == 1 and rows["broken", "seconds"]["status"] == "failed: no kernel image"
    assert rows["right", "seconds"]["status"] == "ok"


def test_errors_of_what_is_missing_or_misshapen():
    def errors(outputs, truth):
        return declare.relative_errors(None, None, outputs, truth)

    truth = {"loss": torch.ones(()), "gradient": torch.zeros(2)}
    right = {"loss": torch.ones(()), "gradient": torch.zeros(2)}
    assert errors(right, truth) == {"loss": 0, "gradient": 0}
    for outputs in ({"loss": torch.ones(())}, right | {"gradient": torch.zeros(1)}):
        assert errors(outputs, truth)["gradient"] == float("inf")
    assert errors(right | {"gradient": torch.tensor([0, 1e-9])}, truth)["gradient"] == float("inf")
    assert errors(right | {"more": torch.ones(1)}, truth)["more"] > 1
    few = {"gradient": torch.ones(2, 1), "rows": torch.tensor([0, 2])}
    gradient = torch.tensor([[1.0], [9.0], [1.0]])
    assert errors({"loss": torch.ones(()), "gradient": gradient}, few) == {"gradient": 0}
    assert errors({"gradient": gradient + 1}, few)["gradient"] > 0.9


def test_an_input_that_is_overwritten_is_restored(run):
    def make(case, given):
        mine = torch.empty_like(given.x)

        def overwrite():
            loss = mine.square().mean()
            mine.mul_(2 / mine.numel())
            return {"loss": loss, "gradient": mine.clone()}

        return Call(overwrite, reset=lambda: mine.copy_(given.x.detach()))

    _, rows = run(benchmark(overwriting=Provider(make)), "--repeats", "1")
    assert rows["overwriting", "seconds"]["status"] == "ok"


def test_the_implementation_that_kernels_log_is_noted(run):
    import logging

    def logs(case, given):
        logging.getLogger("palu_kernels.linear.sparse").info("sparse road for %s", "flatten")
        return square(case, given)

    _, rows = run(benchmark(logs=provider(logs)), "--repeats", "1")
    assert rows["logs", "sparse"]["p50"] == 1 and ("right", "sparse") not in rows


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kernels", "cube"], "invalid choice: 'cube'"),
        (["--V"], "expected at least one argument"),
        (["--device", "cuda:77"], "cannot be used on this machine"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--repo", "/tmp"], "--repo is /tmp; it must be a checkout"),
        (["--calls", "-1"], "is not at least 1"),
        (["--in-turns", "--together"], "--in-turns is for providers that are calls"),
        (["--V", "--providers", "right"], "expected at least one"),
    ],
)
def test_an_unmeasured_choice_is_an_error(options, words, capsys):
    with pytest.raises(SystemExit):
        runner.main(benchmark(), options)
    assert words in capsys.readouterr().err


def test_cases_are_measured_once_and_memory_alone(run, capsys):
    options = ["--V", "5", "7", "5", "--repeats", "1", "--providers", "right", "--calls", "0"]
    _, rows = run(benchmark(), *options)
    assert "1 of 2: square V=5 rows=3 float32" in capsys.readouterr().err
    assert rows["right", "peak_bytes"]["V"] == 7 and rows["right", "seconds"]["samples"] == "0"


# ---- in turns ------------------------------------------------------------------------------------


def test_in_turns(run):
    """One process a case: every round has a call of each provider, and rotates who is first."""
    order = []

    def noted(name):
        def loss(case, given):
            order.append(name)
            return square(case, given)

        return provider(loss)

    fake = benchmark(a=noted("a"), b=noted("b"), c=noted("c"), broken=provider(fails))
    fake = dataclasses.replace(fake, calls=3)
    names = ["--providers", "a", "b", "c", "broken", "peer"]
    status, rows = run(fake, "--in-turns", "--repeats", "1", *names)
    assert status == 1 and rows["broken", "seconds"]["status"] == "failed: no kernel image"
    assert order[-9:] == [*"abc", *"bca", *"cab"] and len(order) == 9 + 2 * 3
    metrics = {"loss", "loss_error", "gradient_error", "seconds", "cpu_seconds", "allocated_bytes"}
    for name in "abc":
        assert {metric for who, metric in rows if who == name} == metrics
        assert rows[name, "seconds"]["samples"] == "3" and rows[name, "seconds"]["status"] == "ok"
    assert rows["peer", "seconds"]["status"].endswith("is not installed")


def test_a_wrong_provider_is_not_timed_in_turns(run):
    options = ["--in-turns", "--repeats", "1", "--providers", "right", "wrong"]
    status, rows = run(benchmark(wrong=provider(WRONG["half"])), *options)
    assert status == 1 and rows["wrong", "gradient_error"]["status"].startswith("wrong: ")
    assert ("wrong", "seconds") not in rows and rows["right", "seconds"]["samples"] == "2"


def test_a_warm_up_calls_once_and_measures_nothing(run):
    calls = []

    def loss(case, given):
        calls.append(case)
        return square(case, given)

    options = ["--in-turns", "--warm-up", "--repeats", "1", "--providers", "a"]
    status, rows = run(benchmark(a=provider(loss)), *options)
    assert status == 0 and len(calls) == 1 and rows["a", "seconds"]["samples"] == "0"


def test_busy_processes_run_beside_and_end(run, monkeypatch):
    """And the rows say so."""
    started, running, popen = [], [], subprocess.Popen

    def noted(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    def loss(case, given):
        running.append([process.poll() for process in started])
        return square(case, given)

    monkeypatch.setattr(subprocess, "Popen", noted)
    options = ["--busy", "2", "--repeats", "1", "--providers", "a", "--commit", "abc"]
    _, rows = run(benchmark(a=provider(loss)), *options)
    assert running and all(one == [None, None] for one in running)
    assert None not in [process.poll() for process in started]
    assert rows["a", "seconds"]["setting"] == "busy=2"


# ---- a process for many --------------------------------------------------------------------------


class FakeWorker:
    """Stands for `run_worker`: (how many measurements it ends, what it dies of) a call."""

    def __init__(self, *script):
        self.script, self.lists = list(script), []

    def __call__(self, module, task, threads, repo=None):
        self.lists.append(task["measurements"])
        done, error = self.script.pop(0)
        for number in range(len(task["measurements"]) if done is None else done):
            yield number, Result({"seconds": [1.0]}, "ok")
        if error is not None:
            raise RuntimeError(f"the process ended with status {error}: said")


def run_of(tmp_path, *options):
    same = ["--csv", str(tmp_path / "rows.csv"), "--device", "cpu", "--repeats", "1", "--together"]
    many = {f"p{n}": provider(square) for n in range(8)}
    fake = benchmark(**many)
    return runner.Run(fake, runner.options(fake, [*same, "--providers", *many, *options]))


def test_a_process_that_dies_is_followed_by_another(tmp_path, monkeypatch):
    fake = FakeWorker((2, 1), (3, worker.DEVICE_LOST), (0, -11), (None, None))
    monkeypatch.setattr(runner, "run_worker", fake)
    run = run_of(tmp_path)
    run.measure_all()
    statuses = [record.status for record in run.records.values()]
    died = [number for number, status in enumerate(statuses) if status != "ok"]
    assert died == [2, 6]  # not the one after the process that reported before it ended
    assert "ended with status -11" in statuses[6]
    assert [8 - len(one) for one in fake.lists] == [0, 3, 6, 7]


def test_what_was_not_measured_in_time_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "run_worker", FakeWorker((3, None)))
    run = run_of(tmp_path, "--seconds", "60")
    rows = run.measure_all()
    assert [row["status"] for row in rows] == ["ok"] * 3 + [NO_TIME] * 5
    assert tables.read(tmp_path / "rows.csv")[-1]["status"] == NO_TIME
    run = run_of(tmp_path, "--seconds", "-1")
    assert {row["status"] for row in run.measure_all()} == {NO_TIME}


def task(**more):
    given = {"device": "cpu", "calls": 1, "repeat": 0, "folder": None, "seconds": None}
    given |= {"in_turns": False, "warm_up": False}
    return given | {"options": {}, "measurements": []} | more


def test_no_measurement_after_the_end(capsys):
    case = Case("square", 5, None, 3, None, "float32")
    worker.work(benchmark(), task(seconds=-1, measurements=[(case, "right")]))
    assert capsys.readouterr().out == ""


def test_a_measurement_that_never_ends_is_given_up():
    code = (
        "import time\nfrom benchmarks import declare, worker\nworker.STUCK = 0.5\n"
        "fake = declare.Benchmark('x', '', {}, None, None, measure=lambda *_: time.sleep(60))\n"
        "worker.work(fake, "
        f"{task(seconds=60, measurements=[(('a', 1, 1, 1, 1, 'b'), 'c')])})"
    )
    start = time.monotonic()
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and time.monotonic() - start < 30
    assert done.stdout == "" and "in <lambda>" in done.stderr  # where it was


def test_a_lost_device_ends_the_process(monkeypatch):
    def lost(device):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.accelerator, "synchronize", lost)
    with pytest.raises(SystemExit) as stopped:
        worker._go_on(torch.device("cuda"))
    assert stopped.value.code == worker.DEVICE_LOST


def test_providers_take_turns():
    turns = list(worker.turns(["a", "b", "c"], 4))
    assert [p for r, p in turns if r == 0] == ["a", "b", "c"]
    assert [p for r, p in turns if r == 1] == ["b", "c", "a"]
    for repeat in range(4):
        assert sorted(p for r, p in turns if r == repeat) == ["a", "b", "c"]


def test_a_worker_is_another_process_with_plain_settings(tmp_path, monkeypatch, capsys):
    """And it measures the packages of another checkout, with these benchmarks."""
    script = tmp_path / "echo.py"
    script.write_text(
        "import json, os, sys\n"
        "print('noise')\n"
        "said = {'pid': os.getpid(), 'task': json.loads(sys.argv[2]), **os.environ}\n"
        "if said['task']:\n"  # importing them takes long
        "    import palu_kernels\n    from benchmarks import runner\n"
        "    said |= {'kernels': palu_kernels.__file__, 'runner': runner.__file__}\n"
        "print(json.dumps([0, [{}, 'ok', said]]))\n"
    )
    other = tmp_path / "other"
    for package in ("palu", "palu_kernels", "benchmarks"):
        (other / package).mkdir(parents=True)
        (other / package / "__init__.py").touch()
    text = (machine.ROOT / "palu" / "__init__.py").read_text()
    (other / "palu" / "__init__.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{machine.ROOT}")
    monkeypatch.setenv("PALU_BACKEND", "triton")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    ((number, result),) = runner.run_worker("echo", {"shape": [1, 2]}, 3, other)
    said = result.environment
    assert number == 0 and said["task"] == {"shape": [1, 2]} and said["pid"] != os.getpid()
    assert said["OMP_NUM_THREADS"] == "3" and "OMP_WAIT_POLICY" not in said
    assert "PALU_BACKEND" not in said
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    ((_, result),) = runner.run_worker("echo", {}, None, other)
    assert result.environment["OMP_NUM_THREADS"] == "5"  # what is there already
    assert said["kernels"].startswith(str(other))
    assert said["runner"].startswith(str(machine.ROOT))
    script.write_text("raise SystemExit('no memory')\n")
    with pytest.raises(RuntimeError, match=r"ended with status 1: no memory"):
        list(runner.run_worker("echo", {}, 1))


# ---- memory and time -----------------------------------------------------------------------------


def touched(size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.uint8)


@pytest.mark.parametrize("megabytes", [8, 64])
def test_peak_is_what_was_there_at_once(megabytes):
    with timing.PeakMemory(CPU) as peak:
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
    with timing.PeakMemory(CPU) as peak:
        held += 1
    assert peak.extra < 4 * MEGABYTE
    with timing.PeakMemory(CPU) as peak:
        again = [torch.ones(MEGABYTE // 64) for _ in range(1024)]
    assert peak.extra > 60 * MEGABYTE and len(again) == 1024


def test_the_allocator_counts_tensors():
    with timing.AllocatorPeak() as peak:
        first = torch.ones(1000, 1000)
        del first
        second = torch.ones(1000, 1000)
        third = second + 1
    assert 8e6 <= peak.extra < 8.1e6 and third.numel() == 10**6
    with timing.AllocatorPeak() as peak:
        del second, third
    assert peak.extra == 0


def test_times_on_a_device(monkeypatch):
    """As a GPU is timed, its clock and memory played by the CPU."""
    events, make = [], torch.empty

    class Event:
        def __init__(self, device, enable_timing):
            assert device.type == "cuda" and enable_timing

        def record(self):
            events.append(time.perf_counter())
            self.at = events[-1]

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: make(4, dtype=dtype))
    call = Call(lambda: time.sleep(0.003))
    of_device, of_host = timing.device_times(call, torch.device("cuda"), 4)
    assert len(of_device) == len(of_host) == 4 and len(events) == 8
    assert min(of_device) >= 0.003 and min(of_host) >= 0.003


def test_environment_and_commit():
    place = machine.environment(CPU)
    assert {*place, "commit"} == set(tables.ENVIRONMENT)
    assert f"torch={torch.__version__}" in place["versions"] and place["processor"]
    assert place["threads"] == torch.get_num_threads()
    assert len(machine.commit().split()[-1]) == 12


def test_a_summary_and_a_check_are_printed(run, capsys):
    fake = dataclasses.replace(
        benchmark(), summary=lambda rows: "in short", check=lambda rows: ["they differ"]
    )
    assert run(fake, "--repeats", "1")[0] == 1
    out = capsys.readouterr().out
    assert "in short" in out and "DISAGREE: they differ" in out

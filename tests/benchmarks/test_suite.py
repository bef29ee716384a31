"""A declared benchmark measures what is right, says what is wrong, and drops nothing."""

import argparse
import csv
import sys
from typing import NamedTuple

import pytest
import torch

from benchmarks import runner as harness
from benchmarks import suite
from benchmarks.definitions import differentiated
from benchmarks.suite import Case, Provider

CASE = Case("square", 5, None, 3, None, "float32")


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


def swapped(case, given):
    return (given.x * given.x.detach().flip(0)).mean() * 2 - given.x.detach().square().mean()


KERNELS = {
    "square": {
        "right": provider(square),
        "double": provider(lambda case, given: given.x.double().square().mean()),
        "peer": provider(square, package="surely-not-installed"),
        "gpu": provider(square, lacks=lambda device: "needs a GPU"),
        "none": suite.NO_OPERATION,
    }
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

    def add_sizes(parser: argparse.ArgumentParser):
        parser.add_argument("--V", nargs="+", type=int, default=[5])

    return suite.Benchmark(
        name="fake",
        description="What does a square cost?",
        kernels={"square": KERNELS["square"] | more},
        add_sizes=add_sizes,
        cases=cases,
        inputs=inputs,
        truth=truth,
        dtypes=("float32",),
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`main` without processes -> (exit status, rows by provider and metric)."""

    def run(fake, *options):
        def run_worker(module, task, threads):
            assert module == "benchmarks.fake" and threads == 1
            try:
                return suite.work(fake, task)
            except RuntimeError as error:
                raise RuntimeError(f"the process ended with status 1: {error}") from error

        monkeypatch.setattr(harness, "run_worker", run_worker)
        path = tmp_path / "rows.csv"
        given = ["--csv", str(path), "--threads", "1", "--device", "cpu", "--calls", "2"]
        status = suite.main(fake, [*given, *options])
        with path.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert all(list(row) == list(suite.COLUMNS) for row in rows)
        return status, {(row["provider"], row["metric"]): row for row in rows}

    return run


def test_every_provider_is_reported(run, capsys):
    status, rows = run(benchmark(), "--repeats", "3")
    assert status == 0
    metrics = {"loss_error", "gradient_error", "peak_bytes", "allocated_bytes", "seconds"}
    for name in ("right", "double"):
        assert {metric for who, metric in rows if who == name} == metrics
        row = rows[name, "seconds"]
        assert row["samples"] == "6" and row["status"] == "ok" and row["commit"]
        assert 0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
        assert (row["kernel"], row["V"], row["D"], row["rows"]) == ("square", "5", "", "3")
        assert float(rows[name, "gradient_error"]["p50"]) < 1e-6
    why = {"peer": "surely-not-installed is not installed", "gpu": "needs a GPU"}
    why["none"] = "no such operation"
    out = capsys.readouterr().out
    for name, reason in why.items():
        row = rows[name, "seconds"]
        assert (row["samples"], row["p50"], row["status"]) == ("0", "", reason)
        assert row["processor"] and row["versions"]
        assert any(line.startswith(name) and line.endswith(reason) for line in out.splitlines())


WRONG = {
    "half": lambda case, given: given.x.square().mean() / 2 + square(case, given).detach() / 2,
    "no_gradient": lambda case, given: given.x.sum() * 0 + square(case, given).detach(),
    "swapped": swapped,
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
    assert "off by" in row["status"] and row["status"] in capsys.readouterr().out
    assert rows["right", "seconds"]["samples"] == "4"


def test_a_rough_output_is_timed_and_said(run):
    loss = {"loss": provider(WRONG["loss"], rough=("loss",))}
    status, rows = run(benchmark(**loss, half=provider(WRONG["half"], rough=("loss",))))
    assert status == 1  # the gradient of half is not rough
    assert rows["loss", "seconds"]["status"].startswith("rough: loss off by")
    assert rows["loss", "seconds"]["samples"] == "6" and ("half", "seconds") not in rows


def test_a_provider_that_fails_is_reported(run, capsys):
    status, rows = run(benchmark(broken=provider(fails)), "--repeats", "2")
    assert status == 1 and rows["broken", "seconds"]["status"] == "failed: no kernel image"
    assert rows["right", "seconds"]["status"] == "ok"
    assert "first line" in capsys.readouterr().err


def test_errors_of_what_is_missing_or_misshapen():
    truth = {"loss": torch.ones(()), "gradient": torch.zeros(2)}
    right = {"loss": torch.ones(()), "gradient": torch.zeros(2)}
    assert suite.relative_errors(CASE, None, right, truth) == {"loss": 0, "gradient": 0}
    for found in ({"loss": torch.ones(())}, right | {"gradient": torch.zeros(1)}):
        assert suite.relative_errors(CASE, None, found, truth)["gradient"] == float("inf")
    tiny = right | {"gradient": torch.tensor([0, 1e-9])}
    assert suite.relative_errors(CASE, None, tiny, truth)["gradient"] == float("inf")
    assert suite.relative_errors(CASE, None, right | {"more": torch.ones(1)}, truth)["more"] > 1


def test_an_input_that_is_overwritten_is_restored(run):
    def make(case, given):
        mine = torch.empty_like(given.x)

        def overwrite():
            loss = mine.square().mean()
            mine.mul_(2 / mine.numel())
            return {"loss": loss, "gradient": mine.clone()}

        return suite.Call(overwrite, reset=lambda: mine.copy_(given.x.detach()))

    _, rows = run(benchmark(overwriting=Provider(make)), "--repeats", "1")
    assert rows["overwriting", "seconds"]["status"] == "ok"


def test_an_unmeasured_choice_is_an_error(capsys):
    for options, words in [
        (["--kernels", "cube"], "invalid choice: 'cube'"),
        (["--V"], "expected at least one argument"),
        (["--device", "cuda:77"], "cannot be used on this machine"),
        (["--device", "abacus"], "device 'abacus'"),
    ]:
        with pytest.raises(SystemExit):
            suite.main(benchmark(), options)
        assert words in capsys.readouterr().err


def test_cases_are_measured_once(run, capsys):
    _, rows = run(benchmark(), "--V", "5", "7", "5", "--repeats", "1", "--providers", "right")
    assert "1 of 2: square V=5 rows=3 float32" in capsys.readouterr().err
    assert rows["right", "seconds"]["V"] == "7"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_allocator_counts_tensors():
    with harness.AllocatorPeak() as peak:
        first = torch.ones(1000, 1000)
        del first
        second = torch.ones(1000, 1000)
        third = second + 1
    assert 8e6 <= peak.extra < 8.1e6 and third.numel() == 10**6
    with harness.AllocatorPeak() as peak:
        del second, third
    assert peak.extra == 0

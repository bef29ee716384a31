"""A benchmark that is declared: kernels and their providers, sizes, inputs, a float64 truth.

A script makes a `Benchmark` and passes it to `main`. For every case the truth is computed once, in
a process of its own; then every measurement is a process of its own, and providers take turns
(``harness.py``). In it the first call, which loads and compiles the code, is compared with the
truth: a provider that is further from it than allowed is reported and not timed. Of the next calls
one is watched for its peak memory over what was there before (what a library keeps from the first
call was), on the CPU one more for what PyTorch's allocator handed out, and the last ones are timed.

A row of the CSV is a case, a provider and a metric: the quantiles of the samples of all processes.
``status`` is "ok" or why there are none: a peer that is not installed, needs a GPU or has no such
operation is a row like any other.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import runner as harness
from benchmarks import tables as report
from palu_kernels.check.__main__ import CAPS

DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in CAPS)
OK, NO_OPERATION = "ok", "no such operation"
TRUTH = "truth"  # the worker that computes it
Outputs = dict[str, Tensor]


class Case(NamedTuple):
    """What a provider is measured on; None where a kernel has no such size."""

    kernel: str
    V: int  # entries of a row of logits
    D: int | None  # entries of a hidden row
    rows: int
    k: int | None
    dtype: str


COLUMNS = ("kernel", "provider", *Case._fields[1:], "metric", "p20", "p50", "p80", "samples")
COLUMNS += ("status", *harness.ENVIRONMENT)


class Call(NamedTuple):
    """``run()``: forward plus backward -> what is compared with the truth. ``reset()`` is called
    before each run, unmeasured: it restores an input that the provider overwrites."""

    run: Callable[[], Outputs]
    reset: Callable[[], None] | None = None

    def ready(self) -> Callable[[], Outputs]:
        if self.reset is not None:
            self.reset()
        return self.run


@dataclass(frozen=True)
class Provider:
    """``make(case, inputs)`` gives the call. ``package``: the distribution it comes from;
    ``lacks(device)``: why it cannot run there, or None. ``rough`` names outputs which it is known
    to compute less exactly than allowed: the status says how far they are off, and it is timed."""

    make: Callable[[Case, Any], Call]
    package: str | None = None
    lacks: Callable[[torch.device], str | None] = lambda device: None
    rough: Sequence[str] = ()

    def why_not(self, device: torch.device) -> str | None:
        absent = None if self.package is None else harness.not_installed(self.package)
        return absent or self.lacks(device)


def relative_errors(case: Case, inputs: Any, found: Outputs, truth: Outputs) -> dict[str, float]:
    """In norm. Infinite where something is missing, too much, or not zero where the truth is."""
    errors = {}
    for name in dict.fromkeys([*truth, *found]):
        a, b = found.get(name), truth.get(name)
        if a is None or b is None or a.shape != b.shape:
            errors[name] = float("inf")
            continue
        off, size = float((a.double() - b).norm()), float(b.norm())
        errors[name] = off / size if size else (float("inf") if off else 0.0)
    return errors


def allowed(case: Case, name: str) -> float:
    """How far off any kernel may be (``palu_kernels.check``), whatever the output's name."""
    return CAPS[getattr(torch, case.dtype)]


@dataclass(frozen=True)
class Benchmark:
    """``kernels``: by name their providers, each a `Provider` or the reason why there is none. The
    first provider of a kernel is what the others' ratios are taken of."""

    name: str  # of the script
    description: str
    kernels: dict[str, dict[str, Provider | str]]
    add_sizes: Callable[[argparse.ArgumentParser], None]  # the options that `cases` reads
    cases: Callable[[argparse.Namespace], list[Case]]
    inputs: Callable[[Case, torch.device], Any]  # the same every time
    truth: Callable[[Case, Any], Outputs]  # in float64
    errors: Callable[[Case, Any, Outputs, Outputs], dict[str, float]] = relative_errors
    allowed: Callable[[Case, str], float] = allowed  # for each of the errors
    dtypes: Sequence[str] = ("float32", "bfloat16")
    repeats: int = 3
    calls: int = 5
    axes: Sequence[str] = report.AXES  # sizes that are an x-axis of the picture


# ---- one measurement -----------------------------------------------------------------------------


def work(benchmark: Benchmark, task: dict[str, Any]) -> dict[str, Any]:
    """Measures a provider in this process -> samples by metric, and what is wrong if anything is.
    ``TRUTH`` writes the truth instead."""
    case, device = Case(*task["case"]), torch.device(task["device"])
    inputs = benchmark.inputs(case, device)
    if task["provider"] == TRUTH:
        truth = benchmark.truth(case, inputs)
        save_file({name: t.contiguous() for name, t in truth.items()}, task["truth"])
        return {}
    provider = benchmark.kernels[case.kernel][task["provider"]]
    call = provider.make(case, inputs)
    place = harness.environment(device, provider.package)
    truth = load_file(task["truth"], device=str(device))
    errors = benchmark.errors(case, inputs, call.ready()(), truth)
    del truth
    samples = {f"{name}_error": [error] for name, error in errors.items()}
    status, wrong = OK, {}
    for name, error in errors.items():
        limit = benchmark.allowed(case, name)
        if not error <= limit:  # a NaN too
            wrong[name] = f"{name} off by {error:.1e}, more than {limit:.1e}"
    if wrong:
        kind = "rough" if set(wrong) <= set(provider.rough) else "wrong"
        status = f"{kind}: {'; '.join(wrong.values())}"
        if kind == "wrong":
            return {"samples": samples, "status": status, "place": place}
    run = call.ready()
    with harness.PeakMemory(device) as peak:
        run()
    samples["peak_bytes"] = [peak.extra]
    if device.type == "cpu":
        run = call.ready()
        with harness.AllocatorPeak() as allocated:
            run()
        samples["allocated_bytes"] = [allocated.extra]
    samples["seconds"] = [harness.timed(call.ready(), device)[1] for _ in range(task["calls"])]
    return {"samples": samples, "status": status, "place": place}


# ---- the run -------------------------------------------------------------------------------------


def is_bad(status: str) -> bool:
    return status.startswith(("wrong", "failed"))


class Record(NamedTuple):
    """What the processes of a provider found for a case."""

    status: str
    samples: dict[str, list[float]]
    place: dict[str, Any]  # of `harness.ENVIRONMENT`, all but the commit


def measure(
    benchmark: Benchmark, case: Case, given: argparse.Namespace, folder: Path
) -> dict[str, Record]:
    """A case -> a record for every provider, those that cannot run included."""
    records, able = {}, []
    here = harness.environment(given.device) | {"threads": given.threads}
    for name, provider in asked_for(benchmark, case, given).items():
        why = provider if isinstance(provider, str) else provider.why_not(given.device)
        records[name] = Record(why or OK, {}, here)
        able += [] if why else [name]
    task = {"case": case, "device": str(given.device), "calls": given.calls}
    task |= {"truth": str(folder / "truth.safetensors")}
    module = f"benchmarks.{benchmark.name}"
    if able:
        harness.run_worker(module, task | {"provider": TRUTH}, given.threads)
    for _, name in harness.turns(able, given.repeats):
        if is_bad(records[name].status):
            continue
        try:
            found = harness.run_worker(module, task | {"provider": name}, given.threads)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            reason = str(error).splitlines()[-1][:200]
            records[name] = records[name]._replace(status=f"failed: {reason}")
            continue
        samples = records[name].samples
        for metric, values in found["samples"].items():
            samples.setdefault(metric, []).extend(values)
        records[name] = Record(found["status"], samples, found["place"])
    return records


def rows_of(case: Case, records: dict[str, Record], commit: str) -> list[dict[str, Any]]:
    """Rows for the CSV: one a metric; a provider without samples has one for its status."""
    rows = []
    for provider, record in records.items():
        for metric, samples in (record.samples or {"seconds": []}).items():
            quantiles = report.quantiles(samples)
            row = {**case._asdict(), "provider": provider, "metric": metric, **quantiles}
            row |= {"samples": len(samples), "status": record.status, **record.place}
            rows.append(row | {"commit": commit})
    return rows


def run(benchmark: Benchmark, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures everything; the rows are written after each case."""
    rows: list[dict[str, Any]] = []
    commit, cases = harness.commit(), selected(benchmark, given)
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(cases, 1):
            print(f"{number} of {len(cases)}:", report.label(case), file=sys.stderr, flush=True)
            rows += rows_of(case, measure(benchmark, case, given, Path(folder)), commit)
            harness.write_csv(given.csv, COLUMNS, rows)
    return rows


def selected(benchmark: Benchmark, given: argparse.Namespace) -> list[Case]:
    """The cases that were asked for, each once, and that a provider which was asked for has."""
    cases = dict.fromkeys(benchmark.cases(given))
    return [c for c in cases if c.kernel in given.kernels and asked_for(benchmark, c, given)]


def asked_for(
    benchmark: Benchmark, case: Case, given: argparse.Namespace
) -> dict[str, Provider | str]:
    providers = benchmark.kernels[case.kernel]
    return {name: p for name, p in providers.items() if name in (given.providers or providers)}


def options(benchmark: Benchmark, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{benchmark.name}",
        description=benchmark.description.strip().splitlines()[0],
    )
    benchmark.add_sizes(parser)
    names = list(dict.fromkeys(name for them in benchmark.kernels.values() for name in them))
    dtypes = list(benchmark.dtypes)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=dtypes)
    kernels = list(benchmark.kernels)
    parser.add_argument("--kernels", nargs="+", choices=kernels, default=kernels)
    parser.add_argument("--providers", nargs="+", choices=names, help="default: all")
    calls = {"type": harness.positive, "default": benchmark.calls}
    parser.add_argument("--calls", **calls, help="timed calls a process")
    harness.add_options(parser, f"{benchmark.name}.csv", repeats=benchmark.repeats)
    given = parser.parse_args(arguments)
    try:
        given.device = harness.device_named(given.device)
    except ValueError as error:
        parser.error(f"--device: {error}")
    if not selected(benchmark, given):
        parser.error("these sizes, kernels and providers leave nothing to measure")
    return given


def main(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> int:
    """The script: runs it, prints its table, writes CSV and pictures. The exit status is 1 if a
    provider is wrong or fails."""
    if task := harness.worker_task(arguments):
        print(json.dumps(work(benchmark, task)))
        return 0
    given = options(benchmark, arguments)
    rows = run(benchmark, given)
    print(report.tables(rows, benchmark.axes))
    for picture in report.plot(rows, given.csv, benchmark.axes):
        print("picture:", picture)
    return int(any(is_bad(row["status"]) for row in rows))

"""The one way to measure: a process a measurement, providers that take turns, a float64 truth.

A script declares a `Benchmark` (kernels and their providers, sizes, inputs, the truth) and passes
it to `main`. For every case the truth is computed once, in a process of its own; then every
measurement is a process of its own, so that none sees the memory, the caches or the warm code of
another one, and repeat by repeat all providers have their turn, each time starting with another
one: what else the machine does is spread over all of them.

In a process the first call, which loads and compiles the code, is compared with the truth: a
provider that is further off than allowed is reported and not timed. The next call is watched for
its peak memory over what was there before (what a library keeps from the first call was), on the
CPU one more for what PyTorch's allocator handed out, and the last ones are timed.

`--repo DIR` measures the packages of another checkout. With `--together` one process measures
everything (where a process takes long to start), and with `--seconds` none begins after that time.
With `--in-turns` a process measures all cases of a dtype and a vocabulary, and the providers of a
case take turns call by call: what the machine does beside hits all of them alike, so ratios are
those of neighbours in time; resident memory, which they share, is not taken then. `--busy N` runs N
processes beside that never rest. Threads are PyTorch's own choice unless `--threads` names them,
and OpenMP waits as it does by default. On the CPU the time of the process on all its threads stands
beside the wall's: on a busy machine it is the one that tells.
A provider without an operation is a row that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import plot, tables
from benchmarks.declare import CAPS, NO_TIME, OK, Benchmark, Case, Provider, Result, is_bad
from benchmarks.machine import RESULTS, ROOT, commit, device_named, environment
from benchmarks.tables import Row
from benchmarks.worker import DEVICE_LOST, PREPARE, turns, work

WORKER = "--worker"
# Settings of the one who measures that would change what is measured.
_UNSET = ("TRITON_INTERPRET", "PALU_BACKEND", "PALU_CHECK", "PALU_TRITON_CPU")
_UNSET += ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# It ends with the process that started it.
_BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(10**6))"
# A worker whose palu and palu_kernels are another checkout's, and whose benchmarks are these.
_OF_A_REPO = (
    "import runpy, sys; repo, root, module = sys.argv[1:4]; sys.path.insert(0, repo); "
    "import palu, palu_kernels; sys.path[0] = root; sys.argv = [module, *sys.argv[4:]]; "
    "runpy.run_module(module, run_name='__main__', alter_sys=True)"
)


def run_worker(
    module: str, task: Mapping[str, Any], threads: int | None, repo: Path | None = None
) -> Iterator[tuple[int, Result]]:
    """Start a script again as a worker and yield what it prints: positions and results.

    Raises:
        RuntimeError: the process failed; with its status and the end of what it said.
    """
    variables = {name: value for name, value in os.environ.items() if name not in _UNSET}
    if threads is not None:
        variables |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    start = ["-m", module] if repo is None else ["-c", _OF_A_REPO, str(repo), str(ROOT), module]
    command = [sys.executable, *start, WORKER, json.dumps(task)]
    failed = False
    with tempfile.TemporaryFile("w+") as errors:
        pipes = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        with subprocess.Popen(command, cwd=ROOT, env=variables, **pipes) as process:
            try:
                for line in process.stdout:
                    if line.startswith("["):
                        number, result = json.loads(line)
                        failed |= is_bad(Result(*result).status)
                        yield number, Result(*result)
            finally:
                if process.poll() is None and sys.exc_info()[0] is not None:
                    process.kill()
        errors.seek(0)
        said = errors.read().strip()[-2000:]
    if process.returncode:
        raise RuntimeError(f"the process ended with status {process.returncode}: {said}")
    if failed:
        print(said, file=sys.stderr)


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Run `count` processes beside that never rest."""
    processes = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@dataclass
class Record:
    """What all processes of a provider measured for a case."""

    status: str
    environment: dict[str, Any]
    processes: dict[str, list[list[float]]] = field(default_factory=dict)  # by metric

    def rows(self, case: Case, provider: str, commit: str) -> list[Row]:
        """Return a row a metric; a provider without samples has one for its status."""
        place = self.environment | {"commit": commit}
        return [
            tables.row(case._asdict(), provider, metric, processes, self.status, place)
            for metric, processes in (self.processes or {"seconds": []}).items()
        ]


class Run:
    """A run of a benchmark: its records so far and the clock. `earlier`: rows that stand before
    its own in the file."""

    def __init__(
        self, benchmark: Benchmark, given: argparse.Namespace, earlier: Sequence[Row] = ()
    ) -> None:
        self.benchmark, self.given, self.earlier = benchmark, given, earlier
        self.end = None if given.seconds is None else time.monotonic() + given.seconds
        self.commit = given.commit or commit(given.repo or ROOT)
        self.records: dict[tuple[Case, str], Record] = {}
        here = environment(given.device)
        if given.threads is not None:
            here["threads"] = given.threads
        for case in selected(benchmark, given):
            for name, provider in asked_for(benchmark, case, given).items():
                why = provider if isinstance(provider, str) else provider.why_not(given.device)
                self.records[case, name] = Record(why or OK, here)
        self.able = [key for key, record in self.records.items() if record.status == OK]

    def rows(self) -> list[Row]:
        return [
            *self.earlier,
            *(
                row
                for (case, provider), record in self.records.items()
                for row in record.rows(case, provider, self.commit)
            ),
        ]

    def measure_all(self) -> list[Row]:
        """Measure everything and return the rows, which are written after each measurement."""
        tables.write(self.given.csv, self.rows())
        with busy(self.given.busy):
            self._measure_all()
        return self.rows()

    def _measure_all(self) -> None:
        if self.given.in_turns:
            groups = tables.grouped(self.able, lambda key: (key[0].dtype, key[0].V))
            for (dtype, V), keys in groups.items():
                print(f"{self.benchmark.name} V={V} {dtype}", file=sys.stderr, flush=True)
                for repeat in range(self.given.repeats):
                    self._measure(keys, repeat, None)
            return
        if self.given.together:
            for repeat in range(self.given.repeats):
                self._measure(self.able, repeat, None)
            return
        cases = list(dict.fromkeys(case for case, _ in self.able))
        for number, case in enumerate(cases, 1):
            said = f"{number} of {len(cases)}: {tables.label(case)}"
            print(said, file=sys.stderr, flush=True)
            names = [name for own, name in self.able if own == case]
            with tempfile.TemporaryDirectory() as folder:
                if self.benchmark.truth is not None or self.benchmark.prepare is not None:
                    self._prepare(case, names, folder)
                for repeat, name in turns(names, self.given.repeats):
                    self._measure([(case, name)], repeat, folder)

    def _prepare(self, case: Case, names: Sequence[str], folder: str) -> None:
        task = self._task([(case, PREPARE)], 0, folder) | {"providers": names}
        for _, result in self._worker(task):
            if is_bad(result.status):
                raise RuntimeError(f"the truth of {tables.label(case)}: {result.status}")

    def _measure(self, keys: Sequence[tuple[Case, str]], repeat: int, folder: str | None) -> None:
        """Measure in one process, or where it dies in more; the one at which it died is not tried
        again."""
        todo = [key for key in keys if not is_bad(self.records[key].status)]
        while todo:
            if self.end is not None and time.monotonic() >= self.end:
                break
            done = 0
            try:
                for number, result in self._worker(self._task(todo, repeat, folder)):
                    done = number + 1
                    self._add(todo[number], result)
            except RuntimeError as error:
                print(error, file=sys.stderr)
                reported = done and f"status {DEVICE_LOST}:" in str(error)
                if done < len(todo) and not reported:
                    reason = str(error).splitlines()[-1][:200]
                    self._add(todo[done], Result({}, f"failed: {reason}"))
                    done += 1
                todo = todo[done:]
            else:
                todo = todo[done:]
                break
        for key in todo:
            if not self.records[key].processes:
                self.records[key].status = NO_TIME
        tables.write(self.given.csv, self.rows())

    def _task(
        self, keys: Sequence[tuple[Case, str]], repeat: int, folder: str | None
    ) -> dict[str, Any]:
        own = {name: getattr(self.given, name) for name in self.given.own}
        return {
            "measurements": keys,
            "device": str(self.given.device),
            "calls": self.given.calls,
            "repeat": repeat,
            "folder": folder,
            "in_turns": self.given.in_turns,
            "warm_up": self.given.warm_up,
            "seconds": None if self.end is None else self.end - time.monotonic(),
            "options": {name: str(v) if isinstance(v, Path) else v for name, v in own.items()},
        }

    def _worker(self, task: dict[str, Any]) -> Iterator[tuple[int, Result]]:
        module = f"benchmarks.{self.benchmark.name}"
        return run_worker(module, task, self.given.threads, self.given.repo)

    def _add(self, key: tuple[Case, str], result: Result) -> None:
        record = self.records[key]
        record.status = result.status
        record.environment = result.environment or record.environment
        for metric, samples in result.samples.items():
            record.processes.setdefault(metric, []).append(samples)
        tables.write(self.given.csv, self.rows())


def selected(benchmark: Benchmark, given: argparse.Namespace) -> list[Case]:
    """Return the cases that were asked for, each once, and that a provider which was asked for
    has."""
    cases = benchmark.cases(given)
    if given.busy:
        beside = f"busy={given.busy}"
        cases = [case._replace(setting=f"{case.setting} {beside}".strip()) for case in cases]
    cases = dict.fromkeys(cases)
    return [c for c in cases if c.kernel in given.kernels and asked_for(benchmark, c, given)]


def asked_for(
    benchmark: Benchmark, case: Case, given: argparse.Namespace
) -> dict[str, Provider | str]:
    """Return the providers of a case; a name may have a variant behind a comma."""
    providers, names = benchmark.kernels[case.kernel], given.providers
    return {n: p for n, p in providers.items() if names is None or n.split(", ")[0] in names}


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def options(benchmark: Benchmark, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{benchmark.name}",
        description=benchmark.description.strip().splitlines()[0],
    )
    benchmark.add_options(parser)
    own = [action.dest for action in parser._actions if action.dest != "help"]
    add = parser.add_argument
    all_names = (name.split(", ")[0] for them in benchmark.kernels.values() for name in them)
    names = list(dict.fromkeys(all_names))
    kernels = list(benchmark.kernels)
    default = list(benchmark.default_kernels or kernels)
    add("--dtype", nargs="+", choices=CAPS, default=list(benchmark.dtypes))
    add("--kernels", nargs="+", choices=kernels, default=default)
    add("--providers", nargs="+", choices=names, help="default: all")
    calls = "timed calls a process; 0: memory only"
    add("--calls", type=_count, default=benchmark.calls, help=calls)
    add("--repeats", type=positive, default=benchmark.repeats, help="processes a provider")
    add("--threads", type=positive, help="default: PyTorch's own choice")
    add("--busy", type=_count, default=0, help="processes beside that never rest")
    add("--device", default="auto", help="auto, cpu, cuda, ...")
    csv = RESULTS / (benchmark.csv or f"{benchmark.name}.csv")
    add("--csv", type=Path, default=csv, help="rows, and pictures beside it")
    add("--repo", type=Path, help="checkout whose palu and palu_kernels are measured")
    add("--commit", help="what is measured, where git cannot tell")
    add("--together", action="store_true", help="one process for all measurements")
    together = "a process for a dtype and a vocabulary, in which providers take turns"
    add("--in-turns", action="store_true", help=together)
    add("--warm-up", action="store_true", help="with --in-turns: the first calls alone, untimed")
    add("--seconds", type=float, help="begin no measurement after this time")
    given = parser.parse_args(arguments)
    given.own = own
    if given.in_turns and (given.together or benchmark.measure is not None):
        parser.error("--in-turns is for providers that are calls, without --together")
    try:
        given.device = device_named(given.device)
    except ValueError as error:
        parser.error(f"--device: {error}")
    if given.repo is not None:
        if not (given.repo / "palu_kernels").is_dir():
            parser.error(f"--repo is {given.repo}; it must be a checkout with palu_kernels/")
        given.repo = given.repo.resolve()
    try:
        if not selected(benchmark, given):
            parser.error("these sizes, kernels and providers leave nothing to measure")
    except ValueError as error:
        parser.error(str(error))
    return given


def main(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> int:
    """Run the script: print its table, write CSV and pictures. The exit status is 1 if a provider
    is wrong or fails."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if len(words) == 2 and words[0] == WORKER:
        work(benchmark, json.loads(words[1]))
        return 0
    given = options(benchmark, words)
    rows = Run(benchmark, given).measure_all()
    wrong = benchmark.check(rows)
    tables.write(given.csv, rows)  # a check may have added what it found
    print(tables.tables(rows, benchmark.axes))
    if text := benchmark.summary(rows):
        print(f"\n{text}")
    for picture in plot.plot(rows, given.csv, benchmark.axes):
        print("picture:", picture)
    for line in wrong:
        print("DISAGREE:", line)
    return int(bool(wrong) or any(is_bad(row["status"]) for row in rows))

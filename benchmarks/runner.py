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
import ctypes
import faulthandler
import gc
import json
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import plot, tables
from benchmarks.tables import Row

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WORKER = "--worker"
# How far off a kernel may be, as `palu_kernels.check` has it: relative, in norm.
CAPS = {"bfloat16": 2**-6, "float16": 2**-9, "float32": 1e-4}
OK, NO_OPERATION, NO_TIME = "ok", "no such operation", "skipped: no time left"
PREPARE = ""  # stands for a provider: the worker that computes the truth
DEVICE_LOST = 3  # exit status: reported, but nothing can run here any more
STUCK = 60  # seconds after which a measurement with a time limit is given up, with its process
STUCK_CASE = 300  # the same of a case whose providers take turns, compiling included
FLUSH_BYTES = 256 * 2**20  # more than the L2 cache of any card
FLUSH_SECONDS = FLUSH_BYTES / 8e12  # at least, whatever the card
MOST_FLUSHES = 64
_PACKAGES = ("torch", "triton", "transformers")
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
Outputs = dict[str, Tensor]


# ---- declaring -----------------------------------------------------------------------------------


class Case(NamedTuple):
    """What a provider is measured on; None where a kernel has no such size. `setting` holds what
    else there is to say, `name=value` separated by blanks."""

    kernel: str
    V: int | None  # entries of a row of logits
    D: int | None  # entries of a hidden row
    rows: int
    k: int | None
    dtype: str
    setting: str = ""

    def given(self) -> dict[str, str]:
        return dict(word.split("=", 1) for word in self.setting.split())


class Call(NamedTuple):
    """`run()`: forward plus backward -> what is compared with the truth. `reset()` is called before
    each run, unmeasured: it restores an input that the provider overwrites."""

    run: Callable[[], Outputs | None]
    reset: Callable[[], None] | None = None

    def ready(self) -> Callable[[], Outputs | None]:
        if self.reset is not None:
            self.reset()
        return self.run


@dataclass(frozen=True)
class Provider:
    """`make(case, inputs)` gives the call. `package`: the distribution it comes from;
    `lacks(device)`: why it cannot run there, or None. `rough` names outputs which it is known to
    compute less exactly than allowed: the status says how far they are off, and it is timed.
    `allowed` replaces the benchmark's."""

    make: Callable[[Case, Any], Call]
    package: str | None = None
    lacks: Callable[[torch.device], str | None] = lambda device: None
    rough: Sequence[str] = ()
    allowed: Callable[[Case, str], float] | None = None

    def why_not(self, device: torch.device) -> str | None:
        absent = None if self.package is None else not_installed(self.package)
        return absent or self.lacks(device)


def relative_errors(case: Case, inputs: Any, outputs: Outputs, truth: Outputs) -> dict[str, float]:
    """Return the errors in norm. Infinite where something is missing, too much, or not zero where
    the truth is. A truth that has `rows` is of these rows of the gradient alone."""
    truth = dict(truth)
    rows = truth.pop("rows", None)
    if rows is not None:
        outputs = {"gradient": outputs["gradient"][rows]} if "gradient" in outputs else {}
    errors = {}
    for name in dict.fromkeys([*truth, *outputs]):
        a, b = outputs.get(name), truth.get(name)
        if a is None or b is None or a.shape != b.shape:
            errors[name] = float("inf")
            continue
        off, size = float((a.double() - b).norm()), float(b.norm())
        errors[name] = off / size if size else (float("inf") if off else 0.0)
    return errors


def allowed(case: Case, name: str) -> float:
    return CAPS[case.dtype]


class Result(NamedTuple):
    """What a process measured: the samples of each metric."""

    samples: dict[str, list[float]]
    status: str
    environment: dict[str, Any] | None = None


@dataclass(frozen=True)
class Benchmark:
    """`kernels`: by name their providers, each a `Provider` or the reason why there is none. The
    first provider of a kernel is what the others' ratios are taken of. A benchmark that is no call
    on inputs brings its own `measure` and `prepare`."""

    name: str  # of the script
    description: str
    kernels: Mapping[str, Mapping[str, Provider | str]]
    add_options: Callable[[argparse.ArgumentParser], None]  # those that `cases` reads
    cases: Callable[[argparse.Namespace], list[Case]]
    inputs: Callable[[Case, torch.device], Any] | None = None  # the same every time
    truth: Callable[[Case, Any], Outputs] | None = None  # in float64
    errors: Callable[[Case, Any, Outputs, Outputs], dict[str, float]] = relative_errors
    allowed: Callable[[Case, str], float] = allowed  # for each of the errors
    dtypes: Sequence[str] = ("float32", "bfloat16")
    repeats: int = 3
    calls: int = 5
    axes: Sequence[str] = tables.AXES  # sizes that are an x-axis of the picture
    csv: str = ""  # default: the script's name
    default_kernels: Sequence[str] | None = None
    measure: Callable[[Benchmark, Case, str, dict[str, Any]], Result] | None = None
    prepare: Callable[[Benchmark, Case, dict[str, Any]], None] | None = None
    check: Callable[[list[Row]], list[str]] = lambda rows: []  # what is wrong with all rows
    summary: Callable[[list[Row]], str] = lambda rows: ""  # printed after the tables


# ---- a process that measures ---------------------------------------------------------------------


def work(benchmark: Benchmark, task: dict[str, Any]) -> None:
    """Print, a JSON line each, the position of a measurement in the task's list and its result;
    begin none after `task["seconds"]`."""
    if task["in_turns"]:
        work_in_turns(benchmark, task)
        return
    start = time.monotonic()
    measure = benchmark.measure or measure_call
    for number, (values, provider) in enumerate(task["measurements"]):
        if task["seconds"] is not None:
            if time.monotonic() - start > task["seconds"]:
                return
            faulthandler.dump_traceback_later(STUCK, exit=True)
        case = Case(*values)
        try:
            if provider == PREPARE:
                (benchmark.prepare or prepare_truth)(benchmark, case, task)
                result = Result({}, OK)
            else:
                result = measure(benchmark, case, provider, task)
        except Exception as error:  # whatever it is, the others have their turn
            result = _failed(provider, error)
        print(json.dumps([number, result]), flush=True)
        if torch.device(task["device"]).type != "cpu":
            _go_on(torch.device(task["device"]))
    faulthandler.cancel_dump_traceback_later()


def _failed(provider: str, error: Exception) -> Result:
    logging.getLogger(__name__).error("%s failed", provider, exc_info=error)
    said = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return Result({}, f"failed: {said}"[:300])


def work_in_turns(benchmark: Benchmark, task: dict[str, Any]) -> None:
    """Do `work` case by case: the providers of a case, neighbours in the task's list, take turns
    call by call."""
    start, first = time.monotonic(), 0
    for values, keys in groupby(task["measurements"], lambda key: key[0]):
        names = [name for _, name in keys]
        if task["seconds"] is not None:
            if time.monotonic() - start > task["seconds"]:
                return
            faulthandler.dump_traceback_later(STUCK_CASE, exit=True)
        for number, result in enumerate(measure_in_turns(benchmark, Case(*values), names, task)):
            print(json.dumps([first + number, result]), flush=True)
        first += len(names)
        gc.collect()
    faulthandler.cancel_dump_traceback_later()


def _go_on(device: torch.device) -> None:
    """Give memory back; where a kernel has broken the device's context, end this process."""
    gc.collect()
    try:
        torch.accelerator.synchronize(device)
        torch.accelerator.empty_cache()
    except RuntimeError as failure:
        print(failure, file=sys.stderr)
        sys.exit(DEVICE_LOST)


def prepare_truth(benchmark: Benchmark, case: Case, task: dict[str, Any]) -> None:
    truth = benchmark.truth(case, benchmark.inputs(case, torch.device(task["device"])))
    tensors = {name: tensor.contiguous() for name, tensor in truth.items()}
    save_file(tensors, Path(task["folder"]) / "truth.safetensors")


_last_truth: dict[Case, Outputs] = {}


def _truth(benchmark: Benchmark, case: Case, inputs: Any, task: dict[str, Any]) -> Outputs:
    """The truth that another process left, or, in a process for all, one computed here."""
    if task["folder"] is not None:
        return load_file(Path(task["folder"]) / "truth.safetensors", device=task["device"])
    if case not in _last_truth:
        _last_truth.clear()
        _last_truth[case] = benchmark.truth(case, inputs)
    return _last_truth[case]


def measure_call(benchmark: Benchmark, case: Case, name: str, task: dict[str, Any]) -> Result:
    """Measure a provider in this process."""
    device = torch.device(task["device"])
    inputs = benchmark.inputs(case, device)
    call, result = first_call(benchmark, case, name, inputs, task)
    samples = result.samples
    if result.status.startswith("wrong"):
        return result
    run = call.ready()
    with PeakMemory(device) as peak:
        run()
    samples |= {"peak_bytes": [peak.extra], "bytes_before": [peak.before]}
    if device.type == "cpu" and task["repeat"] == 0:  # the same number every time
        samples["allocated_bytes"] = [allocated_by(call)]
    times = [timed(call.ready(), device)[1] for _ in range(task["calls"])]
    samples |= _seconds(times, device)
    if device.type != "cpu" and task["calls"]:
        of_device, of_host = device_times(call, device, task["calls"])
        samples |= {"device_seconds": of_device, "host_seconds": of_host}
    return result


def measure_in_turns(
    benchmark: Benchmark, case: Case, names: Sequence[str], task: dict[str, Any]
) -> list[Result]:
    """Measure the providers `names` of a case in this process: of each the first call, then
    `task["calls"]` rounds in which every provider has one call, each round starting with the next
    provider."""
    device = torch.device(task["device"])
    results, calls = {}, {}
    try:
        inputs = benchmark.inputs(case, device)
    except Exception as error:
        return [_failed(name, error) for name in names]
    for name in names:
        try:
            if task["warm_up"]:
                benchmark.kernels[case.kernel][name].make(case, inputs).ready()()
                results[name] = Result({}, OK)
                continue
            call, results[name] = first_call(benchmark, case, name, inputs, task)
            if is_bad(results[name].status):
                continue
            if device.type == "cpu" and task["repeat"] == 0:
                results[name].samples["allocated_bytes"] = [allocated_by(call)]
            calls[name] = call
        except Exception as error:
            results[name] = _failed(name, error)
    times: dict[str, list[Times]] = {name: [] for name in calls}
    for _, name in turns(list(calls), task["calls"]):
        times[name].append(timed(calls[name].ready(), device)[1])
    for name, own in times.items():
        results[name].samples.update(_seconds(own, device))
    return [results[name] for name in names]


def first_call(
    benchmark: Benchmark, case: Case, name: str, inputs: Any, task: dict[str, Any]
) -> tuple[Call, Result]:
    """Return a provider's call, and what its first run shows: how far off it is."""
    device = torch.device(task["device"])
    provider = benchmark.kernels[case.kernel][name]
    call = provider.make(case, inputs)
    with _logged_choice() as samples:
        outputs = call.ready()()
    status = OK
    if outputs is not None:  # a floor has none
        errors = benchmark.errors(case, inputs, outputs, _truth(benchmark, case, inputs, task))
        samples |= {f"{output}_error": [error] for output, error in errors.items()}
        samples |= {key: [float(t)] for key, t in outputs.items() if t.ndim == 0}
        status = _judge(errors, case, provider, provider.allowed or benchmark.allowed)
    return call, Result(samples, status, environment(device, provider.package))


def allocated_by(call: Call) -> int:
    run = call.ready()
    with AllocatorPeak() as peak:
        run()
    return peak.extra


def _seconds(times: Sequence[Times], device: torch.device) -> dict[str, list[float]]:
    samples = {"seconds": [one.wall for one in times]}
    if device.type == "cpu":
        samples["cpu_seconds"] = [one.process for one in times]
    return samples


def _judge(
    errors: dict[str, float],
    case: Case,
    provider: Provider,
    limit_of: Callable[[Case, str], float],
) -> str:
    limits = {name: limit_of(case, name) for name in errors}
    wrong = {
        name: f"{name} off by {error:.1e}, more than {limits[name]:.1e}"
        for name, error in errors.items()
        if not error <= limits[name]  # a NaN too
    }
    if not wrong:
        return OK
    kind = "rough" if set(wrong) <= set(provider.rough) else "wrong"
    return f"{kind}: {'; '.join(wrong.values())}"


@contextlib.contextmanager
def _logged_choice() -> Iterator[dict[str, list[float]]]:
    """Collect `sparse`, 1 or 0, where the kernels log which implementation their cost model chose
    for a loss on hidden rows."""
    samples: dict[str, list[float]] = {}

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            words = record.getMessage().split()
            if words and words[0] in ("sparse", "dense"):
                samples["sparse"] = [float(words[0] == "sparse")]

    logger, handler = logging.getLogger("palu_kernels"), Handler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield samples
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class Times(NamedTuple):
    """Seconds of a call."""

    wall: float  # until the device has done it
    process: float  # of this process on all its threads


def timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, Times]:
    """Return (what the call returns, what it took)."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start, used = time.perf_counter(), time.process_time()
    result = call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return result, Times(time.perf_counter() - start, time.process_time() - used)


def device_times(call: Call, device: torch.device, count: int) -> tuple[list[float], list[float]]:
    """Return the seconds between two events around each call, in the device's own time, and those
    that the host needs to issue it.

    The L2 cache is flushed before each call, and so often that the device is still at it when the
    host has issued the whole call: what the device takes is then free of waiting for the host.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    run = call.ready()
    start = time.perf_counter()
    run()
    flushes = min(MOST_FLUSHES, 2 + int((time.perf_counter() - start) / FLUSH_SECONDS))
    of_device, of_host = [], []
    for _ in range(count):
        run = call.ready()
        torch.accelerator.synchronize(device)
        for _ in range(flushes):
            flush.zero_()
        begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
        begin.record()
        start = time.perf_counter()
        run()
        of_host.append(time.perf_counter() - start)
        end.record()
        torch.accelerator.synchronize(device)
        of_device.append(begin.elapsed_time(end) / 1e3)
    return of_device, of_host


class PeakMemory:
    """`with PeakMemory(device) as peak: ...`, then `peak.before` and `peak.extra`, in bytes: what
    was there before the block, and how much more there was at most inside.

    On the CPU it is resident memory as the kernel counts it (VmHWM, which is set back first), so
    scratch space of libraries counts too. Memory that was freed earlier but is still held by the
    allocator is given back first, or the block would use it without being seen. On an accelerator
    it is what PyTorch's allocator has handed out.

    Raises:
        OSError: the CPU's memory is measured, and this is no Linux with /proc/self/clear_refs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = self.extra = 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cpu":
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
            self.before = _resident("VmRSS")
        else:
            torch.accelerator.synchronize(self.device)
            torch.accelerator.reset_peak_memory_stats(self.device)
            self.before = torch.accelerator.memory_allocated(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cpu":
            peak = _resident("VmHWM")
        else:
            torch.accelerator.synchronize(self.device)
            peak = torch.accelerator.max_memory_allocated(self.device)
        self.extra = peak - self.before


def _resident(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{name}:\s+(\d+) kB$", text, re.M)[1]) * 1024


class AllocatorPeak:
    """`with AllocatorPeak() as peak: ...`, then `peak.extra`: the bytes that PyTorch's CPU
    allocator had handed out at most inside the block, over what it had before.

    The allocator's own events, which `torch.profiler` collects: tensors and the buffers that
    operators ask it for, the same number every time. What libraries allocate by themselves is not
    in it; resident memory (`PeakMemory`) has that too.
    """

    def __init__(self) -> None:
        self.extra = 0

    def __enter__(self) -> AllocatorPeak:
        activities = [torch.profiler.ProfilerActivity.CPU]
        self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._profile.__exit__(*raised)
        events = self._profile.profiler.kineto_results.events()
        changes = [(one.start_ns(), one.nbytes()) for one in events if one.name() == "[memory]"]
        total = 0
        for _, change in sorted(changes, key=lambda pair: pair[0]):
            total += change
            self.extra = max(self.extra, total)


# ---- where it is measured ------------------------------------------------------------------------


def environment(device: torch.device, package: str | None = None) -> dict[str, Any]:
    """Return the columns of `tables.ENVIRONMENT` that a worker knows, all but the commit; `package`
    is a peer that is measured."""
    if device.type == "cpu":
        processor = f"{_processor()}, {len(os.sched_getaffinity(0))} CPUs, {_matrix_unit()}"
    else:
        processor = torch.get_device_module(device).get_device_name(device)
    packages = _PACKAGES if package is None else (*_PACKAGES, package)
    versions = [f"{name}={metadata.version(name)}" for name in packages]
    return {
        "device": device.type,
        "processor": processor,
        "threads": torch.get_num_threads(),
        "versions": " ".join([f"python={platform.python_version()}", *versions]),
    }


def not_installed(package: str) -> str | None:
    """Say so, if it is not."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"{package} is not installed"
    return None


def _processor() -> str:
    name = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    return name[1] if name else platform.processor() or platform.machine()


def _matrix_unit() -> str:
    """Say whether the processor multiplies matrices of bfloat16 by itself."""
    flags = re.search(r"^flags\s*:(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    return "AMX" if flags and "amx_bf16" in flags[1].split() else "no AMX"


def commit(repo: Path = ROOT) -> str:
    """Return the commit that is measured; say so where the tree differs from it (results aside)."""

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], cwd=repo, capture_output=True, text=True)
        except FileNotFoundError:  # no git here
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return f"uncommitted tree after {head}" if changed else head


def device_named(name: str) -> torch.device:
    """Return the device; `auto` is an accelerator where there is one, else the CPU.

    Raises:
        ValueError: the name is unknown, or this machine has no such device.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used on this machine: {reason}") from None
    return device


# ---- the run -------------------------------------------------------------------------------------


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


def turns(providers: Sequence[str], repeats: int) -> Iterator[tuple[int, str]]:
    """Yield (repeat, provider): in every repeat all providers, starting with the next one each
    time."""
    for repeat in range(repeats):
        first = repeat % max(len(providers), 1)
        for provider in [*providers[first:], *providers[:first]]:
            yield repeat, provider


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


def is_bad(status: str) -> bool:
    return status.startswith(("wrong", "failed"))


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


# ---- the command ---------------------------------------------------------------------------------


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

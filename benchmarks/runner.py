"""What the measuring scripts share: a fresh process a measurement, providers that take turns, peak
memory, and rows that say where they were taken. (A benchmark that is all declarations is run by
``suite.py``, on top of this.)

A script runs itself once more for every measurement, ``python -m benchmarks.NAME --worker TASK``,
and that process prints one JSON object. So no measurement sees the memory, the caches or the warm
code of another one. Repeat by repeat all providers have their turn, each time starting with another
one: what else the machine does is spread over all of them.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from palu.storage.files import new_file

Result = TypeVar("Result")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WORKER = "--worker"
# Columns that every CSV ends with; a worker gives all but the commit, which `add_commit` gives.
ENVIRONMENT = ("device", "processor", "threads", "versions", "commit")
_PACKAGES = ("torch", "triton", "transformers")
# Settings of the one who measures that would change what is measured.
_UNSET = ("TRITON_INTERPRET", "PALU_BACKEND", "PALU_CHECK", "PALU_TRITON_CPU")


def add_options(parser: argparse.ArgumentParser, csv_name: str, repeats: int) -> None:
    parser.add_argument("--repeats", type=positive, default=repeats, help="processes a provider")
    parser.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--csv", type=Path, default=RESULTS / csv_name, help="raw rows")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def device_named(name: str) -> torch.device:
    """``auto``: an accelerator where there is one, else the CPU.

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


# ---- processes -----------------------------------------------------------------------------------


def run_worker(module: str, task: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """What ``work(task)`` of a script returns, called in a process of its own.

    Raises:
        RuntimeError: the process failed; with the end of what it said.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _UNSET}
    environment |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    # Threads that spin while they wait take a busy machine from each other.
    environment["OMP_WAIT_POLICY"] = "PASSIVE"
    command = [sys.executable, "-m", module, WORKER, json.dumps(task)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"the process that measured {task.get('provider')} ended with status "
            f"{done.returncode}: {done.stderr.strip()[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def worker_task(arguments: Sequence[str] | None) -> dict[str, Any] | None:
    """The task, where this process was started by `run_worker`."""
    given = sys.argv[1:] if arguments is None else arguments
    return json.loads(given[1]) if len(given) == 2 and given[0] == WORKER else None


def turns(providers: Sequence[str], repeats: int) -> Iterator[tuple[int, str]]:
    """(repeat, provider): in every repeat all providers, starting with the next one each time."""
    for repeat in range(repeats):
        first = repeat % len(providers)
        for provider in [*providers[first:], *providers[:first]]:
            yield repeat, provider


# ---- measuring -----------------------------------------------------------------------------------


class PeakMemory:
    """``with PeakMemory(device) as peak: ...``, then ``peak.before`` and ``peak.extra``, in bytes:
    what was there before the block, and how much more there was at most inside.

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
            self.before = _status("VmRSS")
        else:
            torch.accelerator.synchronize(self.device)
            torch.accelerator.reset_peak_memory_stats(self.device)
            self.before = torch.accelerator.memory_allocated(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cpu":
            peak = _status("VmHWM")
        else:
            torch.accelerator.synchronize(self.device)
            peak = torch.accelerator.max_memory_allocated(self.device)
        self.extra = peak - self.before


class AllocatorPeak:
    """``with AllocatorPeak() as peak: ...``, then ``peak.extra``: the bytes that PyTorch's CPU
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


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{name}:\s+(\d+) kB$", text, re.M)[1]) * 1024


def timed(call: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """-> (what the call returns, seconds until the device has done it)."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    result = call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return result, time.perf_counter() - start


# ---- where it was measured -----------------------------------------------------------------------


def environment(device: torch.device, package: str | None = None) -> dict[str, Any]:
    """The columns of `ENVIRONMENT` that a worker knows; ``package`` is a peer that was measured."""
    if device.type == "cpu":
        processor = f"{_processor()}, {len(os.sched_getaffinity(0))} CPUs"
    else:
        processor = torch.get_device_module(device).get_device_name(device)
    versions = [f"python={platform.python_version()}"]
    packages = _PACKAGES if package is None else (*_PACKAGES, package)
    versions += [f"{name}={metadata.version(name)}" for name in packages]
    return {
        "device": device.type,
        "processor": processor,
        "threads": torch.get_num_threads(),
        "versions": " ".join(versions),
    }


def not_installed(package: str) -> str | None:
    """Says so, if it is not."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"{package} is not installed"
    return None


def _processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    return found[1] if found else platform.processor() or platform.machine()


def commit() -> str:
    """The commit that is measured; says so where the tree differs from it (results aside)."""

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:  # no git here
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return f"uncommitted tree after {head}" if changed else head


# ---- rows ----------------------------------------------------------------------------------------


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes beside the place and renames, so that the rows of a run that is cut short are whole.

    Raises:
        ValueError: a row has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and not path.read_bytes().startswith(",".join(columns[:2]).encode()):
        raise ValueError(f"{path} exists and holds no rows of this kind; name another file")
    with new_file(path) as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            if missing := [name for name in columns if name not in row]:
                raise ValueError(f"a row for {path} has no {', '.join(missing)}")
            writer.writerow(row)


def table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns side by side, the first one to the left, the others to the right."""
    cells = [list(headings), *map(list, lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )

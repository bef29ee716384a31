"""What do the kernels and operators cost on a GPU, and what should change? In ten minutes.

    benchmarks/gpu.sh OUT_DIR [--commit ID] [--sections compile kernels sweep ...]
    benchmarks/gpu.sh OUT_DIR --model smollm2-tofu --data tofu   # a whole training step too
    benchmarks/gpu.sh OUT_DIR --device cpu --tiny                # to test it where there is no GPU

Sections in their order, each with the second by which it must end (`plan`; what one leaves over is
the next one's), and each printed as it ends:

* `compile`: all that the next parts launch, in parallel processes (`gpu_kernels.py`).
* `kernels`: every kernel alone, and the sum of an operator's beside the physical floor.
* `sweep`: block, warps, programs a multiprocessor. The best are written to
  `OUT_DIR/tuned/ARCH.json` and this checkout's `palu_kernels/tuned/`, and used from there on.
* `loops`: random, level and one-exponent rows beside `torch.topk`; loads in a branch or pipelined.
* `head`: the ways to make the gradient of the head's weight.
* `ncu`: what NVIDIA's profiler counts in every kernel, where it is and is allowed.
* `check`: `python -m palu_kernels.check`, every operator against its float64 definition, in
  parallel processes.
* `operators`, `linear`: `bench_ops.py` and `bench_linear.py` beside eager, `torch.compile` and the
  peers that are installed.
* `loss`: `bench_loss.py`, the head frozen and training. `train_step`: `bench_train_step.py`, where
  `--model` and `--data` are given.

OUT_DIR receives `gpu.csv` (all rows), `table.txt`, `gpu.log` (what was printed), and for every part
`NAME.csv` and `NAME.log`. Device time is with a cold L2 cache.

The exit status is 1 if the check failed or a result of this library's is wrong, else 3 if a section
ran out of time; 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

from benchmarks import declare, machine, tables
from benchmarks.declare import NO_TIME
from benchmarks.gpu_kernels import FLOORS, OUT_OF_TIME
from benchmarks.tables import Row
from palu_kernels import tuned

LAST_START = 5  # seconds before its end after which a part starts no measurement
SHORTEST = 5  # a part is not tried with less
COMPARISON = re.compile(r"(\s\d\.\de[-+]\d\d\s*){2}")  # the check's error and what was allowed
LINEAR = [
    f"linear_{name}{trained}"
    for name in ("flatten", "kl_reverse", "cross_entropy")
    for trained in ("", "_trained")
]
METRICS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)
OTHERS = (
    "eager",
    "compile",
    "released",
    "torch",
    "liger",
    "fla",
    "cce",
    "sort",
    "topk",
    "products",
)


class Part(NamedTuple):
    """A command, and the second after the start by which it must be over. Parts of a section with
    the same end run at once."""

    section: str
    name: str  # of its files
    end: float
    module: str
    arguments: Sequence[str]


def plan(given: argparse.Namespace) -> Iterator[Part]:
    """Yield the parts in their order."""
    tiny = given.tiny
    ends = {"compile": 30, "kernels": 90, "sweep": 180, "loops": 215, "head": 275}
    for name, end in ends.items():
        yield Part(name, name, end, "benchmarks.gpu_kernels", [name])
    yield Part("ncu", "ncu", 335, "benchmarks.gpu_kernels", ["once"])
    shards = 1 if tiny else min(8, max(1, (os.cpu_count() or 2) // 2))
    for n in range(shards):
        shard = ["--shard", "0/60", "--quick"] if tiny else ["--shard", f"{n}/{shards}"]
        yield Part("check", f"check-{n}", 395, "palu_kernels.check", shard)
    same = ["--together", "--repeats", "1", "--dtype", "bfloat16"]
    few = ["--calls", "2" if tiny else "10"]
    compiler = [] if tiny else ["compile"]
    vocab, D, k = ("1003", "24", "9") if tiny else ("128256", "4096", "1000")
    rows = ["5", "300"] if tiny else ["226", "4096"]
    sizes = ["--vocab", vocab, "--rows", *rows, "--top-k", k]
    names = ["--kernels", *FLOORS, "--providers", "palu", "eager", "topk", "liger", "fla"]
    arguments = [*sizes, *names, *compiler, *same, *few]
    yield Part("operators", "operators", 480, "benchmarks.bench_ops", arguments)
    names = ["--kernels", *LINEAR, "--providers", "palu", "eager", "torch", "products"]
    names += ["liger", "cce", "fla"]
    sizes = [*sizes, "--hidden", D, "--grid"]
    arguments = [*sizes, *names, *compiler, *same, *few]
    yield Part("linear", "linear", 535, "benchmarks.bench_linear", arguments)
    sizes = ["--vocab", "1003", "--hidden", "24", "--positions", "160", "--forget", "19"]
    sizes = [*sizes, "--preserve", "71", "--top-k", "20"] if tiny else []
    both = ["--heads", "frozen", "trained"]
    yield Part("loss", "loss_step", 580, "benchmarks.bench_loss", [*sizes, *both, *same, *few])
    if given.model is not None:
        where = ["--model", str(given.model), "--data", str(given.data), "--repeats", "1"]
        yield Part("train_step", "train_step", 760, "benchmarks.bench_train_step", where)


SECTIONS = ("compile", "kernels", "sweep", "loops", "head", "ncu", "check", "operators", "linear")
SECTIONS += ("loss", "train_step")


# ---- the run -------------------------------------------------------------------------------------


class Run:
    """One run: its folder, its clock, and the rows that it has so far."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.out = given, given.out
        self.start = time.monotonic()
        self.rows: list[Row] = []
        self.failures: list[str] = []
        self.late: list[str] = []

    def say(self, text: str) -> None:
        print(text, flush=True)
        with (self.out / "gpu.log").open("a", encoding="utf-8") as stream:
            print(text, file=stream)

    def fail(self, text: str) -> None:
        self.failures.append(text)
        self.say(f"FAILED: {text}")

    def no_time(self, name: str) -> None:
        self.late.append(name)
        self.say(f"{name}: its time was up")

    def do(self, parts: Sequence[Part]) -> None:
        """Run parts of one section at once."""
        left = self.start + parts[0].end - time.monotonic()
        if left < SHORTEST:
            self.no_time(parts[0].section)
            return
        with ExitStack() as stack:
            logs = [self.out / f"{part.name}.log" for part in parts]
            streams = [stack.enter_context(log.open("a", encoding="utf-8")) for log in logs]
            commands = [self.command(part, left) for part in parts]
            statuses = run_logged(commands, left, streams)
        for part, log, status in zip(parts, logs, statuses, strict=True):
            self.judge(part, log.read_text(encoding="utf-8", errors="replace"), status)
        self.say(f"-- {parts[0].section} over after {time.monotonic() - self.start:.0f} s\n")

    def command(self, part: Part, left: float) -> list[str]:
        words = [sys.executable, "-m", part.module, *part.arguments]
        if part.section == "check":
            return [*words, "--device", self.given.device]
        words += ["--csv", str(self.out / f"{part.name}.csv")]
        words += ["--seconds", f"{max(left - LAST_START, 1):.0f}", "--device", self.given.device]
        words += ["--commit", self.given.commit] if self.given.commit else []
        if part.module == "benchmarks.gpu_kernels":
            words += ["--arch", self.given.arch, "--tuned", str(self.tuned)]
            words += ["--tiny"] * self.given.tiny
        if part.section == "ncu":
            words = ["ncu", "--clock-control", "none", "--csv", "--kernel-name", "regex:^_", *words]
            words[1:1] = ["--metrics", ",".join(METRICS)]
        return words

    @property
    def tuned(self) -> Path:
        return self.out / "tuned" / f"{self.given.arch}.json"

    def judge(self, part: Part, text: str, status: int | None) -> None:
        if part.section == "check":
            self.judge_check(part, text, status)
            return
        if part.section in ("operators", "linear", "loss", "train_step"):
            rows = self.out / f"{part.name}.csv"
            self.judge_rows(part, tables.read(rows) if rows.exists() else [], status)
            return
        rows = self.out / f"{part.name}.csv"
        self.rows += tables.read(rows) if rows.exists() else []
        lines = [line for line in text.splitlines()[1:] if "Warning" not in line]
        self.say("\n".join(profile(lines) if part.section == "ncu" else lines))
        if status in (None, OUT_OF_TIME):
            self.no_time(part.section)
        elif part.section == "ncu" and status != 0:
            self.say("ncu: not allowed, or not on this machine; nothing was counted")
        elif status != 0:
            self.fail(f"{part.name}: status {status}; see {part.name}.log")
        if part.section == "sweep" and self.tuned.exists() and not self.given.tiny:
            with suppress(OSError):  # a checkout that cannot be written is measured as it is
                shutil.copy(self.tuned, tuned.FOLDER)

    def judge_check(self, part: Part, text: str, status: int | None) -> None:
        failed = [line for line in text.splitlines() if line.endswith("FAILED")]
        for one in failed[:10]:
            self.say(one)
        if status is None:
            done = sum(map(bool, map(COMPARISON.search, text.splitlines())))
            said = f"{done} comparisons before its time was up, {len(failed)} of them failed"
            self.say(f"{part.name}: {said}")
            self.late.append(part.name)
        elif status == 0:
            self.say(f"{part.name}: {text.splitlines()[-1]}")
        if failed or status not in (0, None):
            said = f"{part.name}: {len(failed)} failed, status {status}; see {part.name}.log"
            self.fail(said)

    def judge_rows(self, part: Part, rows: list[Row], status: int | None) -> None:
        """Only this library's failures count: what else is wrong is in the table."""
        self.rows += rows
        keys = tables.grouped(rows, lambda row: (*(row[n] for n in tables.CASE), row["provider"]))
        skipped = sum(same[0]["status"] == NO_TIME for same in keys.values())
        done = len(keys) - skipped
        self.say(f"{part.name}: {done} of {len(keys)} measurements, {skipped} {NO_TIME}")
        self.say(tables.tables(rows, axes=()))
        for same in keys.values():
            row = same[0]
            if row["provider"] not in OTHERS and declare.is_bad(row["status"]):
                self.fail(f"{tables.label(row)} {row['provider']}: {row['status']}")
        if skipped or status is None:
            self.no_time(part.section)
        if not rows or status not in (0, 1, None):
            self.fail(f"{part.name}: status {status}; see {part.name}.log")


def profile(lines: Sequence[str]) -> list[str]:
    """Return a line a kernel of what `ncu --csv` printed; nothing where it printed none."""
    first = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        return list(lines[-3:])
    found: dict[str, list[str]] = {}
    for row in csv.DictReader(lines[first:]):
        words = f"{row['Metric Name'].split('.')[0]} {row['Metric Value']} {row['Metric Unit']}"
        found.setdefault(f"{row['ID']} {row['Kernel Name']}", []).append(words)
    return [f"{name}: {', '.join(words)}" for name, words in found.items()]


def run_logged(
    commands: Sequence[Sequence[str]], seconds: float, logs: Sequence[TextIO]
) -> list[int | None]:
    """Run commands at once; return their exit statuses, None of one whose time was up and which was
    ended with all that it started, 127 of one that is not on this machine."""
    end, processes = time.monotonic() + seconds, []
    try:
        for command, log in zip(commands, logs, strict=True):
            print("$", shlex.join(command), file=log, flush=True)
            options = {"cwd": machine.ROOT, "stdout": log, "stderr": log}
            try:
                processes.append(subprocess.Popen(command, start_new_session=True, **options))
            except FileNotFoundError:
                processes.append(None)
        return [_wait(process, end - time.monotonic()) for process in processes]
    finally:
        for process in processes:
            if process is not None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait(process: subprocess.Popen | None, seconds: float) -> int | None:
    if process is None:
        return 127
    try:
        return process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        return None


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("out", type=Path, metavar="OUT_DIR", help="new or empty")
    add("--device", default="auto", help="auto: the accelerator that is here")
    add("--tiny", action="store_true", help="tiny sizes, to test the run itself")
    add("--commit", help="what is measured, where git cannot tell")
    add("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    add("--model", type=Path, help="model folder, for a whole training step")
    add("--data", type=Path, help="TOFU's files, for a whole training step")
    given = parser.parse_args(arguments)
    if (given.model is None) != (given.data is None):
        parser.error("--model and --data go together")
    if given.device == "auto":
        if not torch.accelerator.is_available():
            parser.error(
                f"there is no GPU here (torch {torch.__version__} finds no accelerator); this "
                "measures one. `--device cpu --tiny` tests the run itself, on tiny sizes"
            )
        given.device = torch.accelerator.current_accelerator().type
    elif given.device == "cpu" and not given.tiny:
        parser.error("--device cpu only tests the run itself: it needs --tiny")
    try:
        machine.device_named(given.device)
    except ValueError as error:
        parser.error(f"--device: {error}")
    given.arch = tuned.architecture(torch.device(given.device)) or "sm_90"
    if given.out.exists() and (not given.out.is_dir() or any(given.out.iterdir())):
        parser.error(f"OUT_DIR is {given.out}, which is not empty; it must be new or empty")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    given = options(sys.argv[1:] if arguments is None else list(arguments))
    given.out.mkdir(parents=True, exist_ok=True)
    run = Run(given)
    place = machine.environment(torch.device(given.device))
    run.say(", ".join(map(str, [*place.values(), given.commit or machine.commit()])))
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
        if given.tiny:
            os.environ["TRITON_INTERPRET"] = "1"
        parts = tables.grouped(plan(given), lambda part: part.section)
        for section in [name for name in parts if name in given.sections]:
            run.do(parts[section])
            tables.write(run.out / "gpu.csv", run.rows)
    (run.out / "table.txt").write_text(tables.tables(run.rows, axes=()) + "\n", encoding="utf-8")
    for failure in run.failures:
        run.say(f"FAILED: {failure}")
    for name in run.late:
        run.say(f"its time was up: {name}")
    return 1 if run.failures else OUT_OF_TIME if run.late else 0


if __name__ == "__main__":
    sys.exit(main())

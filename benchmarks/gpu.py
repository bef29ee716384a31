"""What do the operators cost on a GPU? All there is to measure there, in under 9 minutes.

    benchmarks/gpu.sh OUT_DIR [--commit ID] [--sections card check operators linear loss_step]
    benchmarks/gpu.sh OUT_DIR --device cpu --tiny          # to test it where there is no GPU

The sections, in this order, each with the second by which it must end (``ENDS``; what one leaves
over is the next one's):

* ``card``: bandwidth of a copy, rate of matrix products. The floors of all that follows are made
  of these two.
* ``check``: ``python -m palu_kernels.check``, every operator against its float64 definition. Most
  of its time goes into compiling some 290 kernel variants.
* ``operators``: those on logits, ``linear``: those on hidden rows, at the sizes of
  ``gpu_cases.py``, by the providers of ``gpu_ops.py``.
* ``loss_step``: ``benchmarks/bench_loss.py`` with 20 timed calls.

A process measures one section (another goes on with the next measurement should it die); no
measurement starts after the section's end. What was not measured has a row that says why:
``skipped: no time left``, or what was wrong.

OUT_DIR receives ``gpu.csv`` (all rows), ``table.txt`` (all sizes; the first V is printed last),
``gpu.log`` (what was printed), ``workers.log``, ``check.log``, ``check.json``, ``loss_step.log``
and ``loss_step.csv``. Metrics of forward plus backward: ``ms`` is device time with a cold L2 cache,
``host ms`` how long the host takes to issue it, ``peak MiB`` what was allocated at most beyond what
was there before, ``share of floor`` the floor (``gpu_cases.floor_seconds``) over the time,
``error`` the relative distance from float64.

The exit status is 1 if the check failed, or a result of this library's is further from float64 than
``LIMIT`` says or missing for another reason than time; 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import json
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
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks import runner as harness
from benchmarks.gpu_cases import Case, Rates, floor_seconds, linear_cases, logits_cases
from benchmarks.gpu_ops import DEVICE_LOST, providers

# Seconds after the start by which a section must be over.
ENDS = {"card": 30, "check": 180, "operators": 310, "linear": 435, "loss_step": 525}
LAST_START = 5  # seconds before its end after which a section starts no measurement
LOSS_STEP_SECONDS = 45  # it is not tried with less
# How far from float64 a result may be: its own rounding to bfloat16. Where it comes from bfloat16
# products, also twice what `eager` is off by, or (it could not run) so much.
LIMIT, LIMIT_OF_PRODUCTS = 2**-7, 2**-4
COLUMNS = (
    *("kernel", "provider", "V", "D", "rows", "k", "dtype", "metric", "p20", "p50", "p80"),
    *("status", "versions", "hardware", "commit"),
)
COMPARISON = re.compile(r"(\s\d\.\de[-+]\d\d\s*){2}")  # its error and what was allowed
OK = "ok"
NO_TIME = "skipped: no time left"
TINY_LOSS_STEP = (
    *("--vocab", "1003", "--hidden", "24", "--positions", "160"),
    *("--forget", "19", "--preserve", "71", "--top-k", "20"),
)
Measurement = tuple[Case, str]


class Run:
    """One run: its folder, its clock, and the rows that it has so far."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.out: Path = given.out
        self.device = torch.device(given.device)
        self.tiny: bool = given.tiny
        self.start = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.rates: Rates | None = None
        where = harness.environment(self.device)
        self.environment = {
            "versions": where["versions"],
            "hardware": where["processor"],
            "commit": given.commit or (harness.commit() if shutil.which("git") else "unknown"),
        }

    def say(self, text: str) -> None:
        print(text, flush=True)
        with self.file("gpu.log") as stream:
            print(text, file=stream)

    def fail(self, text: str) -> None:
        self.failures.append(text)
        self.say(f"FAILED: {text}")

    def file(self, name: str) -> TextIO:
        return (self.out / name).open("a", encoding="utf-8")

    def left(self, section: str) -> float:
        """Seconds until the section must be over."""
        return self.start + ENDS[section] - time.monotonic()

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        empty = dict.fromkeys(COLUMNS) | {"status": OK}
        self.rows += [empty | row | self.environment for row in rows]
        harness.write_csv(self.out / "gpu.csv", COLUMNS, self.rows)


# ---- processes -----------------------------------------------------------------------------------


def run_logged(
    command: Sequence[str], seconds: float, stdout: TextIO, stderr: TextIO
) -> int | None:
    """Exit status of a command, or None where the time was up and it was ended with all that it
    started."""
    if seconds <= 0:
        return None
    print("$", shlex.join(command)[:2000], file=stderr, flush=True)
    process = subprocess.Popen(
        command, cwd=harness.ROOT, stdout=stdout, stderr=stderr, start_new_session=True
    )
    try:
        return process.wait(seconds)
    except BaseException as reason:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(reason, subprocess.TimeoutExpired):
            return None
        raise


def work(run: Run, section: str, measurements: Any) -> tuple[dict[int, list[dict]], int | None]:
    """What a process of ``gpu_ops`` printed before it ended -> (rows by the measurement's place in
    the list, exit status or None as above)."""
    task = {"device": str(run.device), "tiny": run.tiny, "measurements": measurements}
    task["seconds"] = run.left(section) - LAST_START
    command = [sys.executable, "-m", "benchmarks.gpu_ops", harness.WORKER, json.dumps(task)]
    with tempfile.TemporaryFile("w+") as stdout:
        with run.file("workers.log") as stderr:
            status = run_logged(command, run.left(section), stdout, stderr)
        stdout.seek(0)
        lines = [line for line in stdout if line.startswith("[")]
    found = {}
    for line in lines:
        with suppress(json.JSONDecodeError):  # the last one may be cut off
            number, rows = json.loads(line)
            found[number] = rows
    return found, status


# ---- sections ------------------------------------------------------------------------------------


def card(run: Run) -> None:
    found, status = work(run, "card", "rates")
    if 0 not in found:
        run.fail(f"the card's rates were not measured (status {status}): no floors. workers.log")
        return
    run.add([row | {"provider": "torch"} for row in found[0]])
    rate = {(row["kernel"], row["dtype"]): row["p50"] for row in found[0]}
    run.rates = Rates(1e9 * rate["copy", "uint8"], 1e12 * rate["matmul", "bfloat16"])
    for row in found[0]:
        run.say(f"{row['kernel']} {row['dtype']}: {row['p50']:.1f} {row['metric']}")


def check(run: Run) -> None:
    command = [sys.executable, "-m", "palu_kernels.check", "--device", str(run.device)]
    command += ["--json", str(run.out / "check.json"), *(["--quick"] if run.tiny else [])]
    with run.file("check.log") as log:
        status = run_logged(command, run.left("check"), log, log)
    text = (run.out / "check.log").read_text()
    failed = [line for line in text.splitlines() if line.endswith("FAILED")]
    for one in failed[:10]:
        run.say(one)
    if status is None:
        done = sum(map(bool, map(COMPARISON.search, text.splitlines())))
        run.say(f"check: {done} comparisons before its time was up, {len(failed)} of them failed")
    elif status == 0:
        run.say(f"check: {text.splitlines()[-1]}")
    if failed or status not in (0, None):
        run.fail(f"check: {len(failed)} failed, status {status}; see check.log")


def operators(run: Run) -> None:
    _measure(run, "operators", logits_cases(run.tiny))


def linear(run: Run) -> None:
    _measure(run, "linear", linear_cases(run.tiny))


def _measure(run: Run, section: str, cases: Iterator[Case]) -> None:
    """All measurements of a section: by one process, or where it dies by more."""
    todo: list[Measurement] = [(case, one) for case in cases for one in providers(case)]
    first, total = len(run.rows), len(todo)
    skipped = 0
    while todo:
        found, status = work(run, section, todo)
        for number, rows in found.items():
            run.add(described(*todo[number], rows, run.rates))
        todo = todo[len(found) :]
        if status == DEVICE_LOST:
            continue
        if status and todo:  # the one at which it died is not tried again
            said = f"the process ended with status {status}; see workers.log"
            run.add(described(*todo.pop(0), [{"metric": "ms", "status": said}], None))
            continue
        for one in todo:
            run.add(described(*one, [{"metric": "ms", "status": NO_TIME}], None))
        skipped, todo = len(todo), []
    run.say(f"{section}: {total - skipped} of {total} measurements, {skipped} {NO_TIME}")
    new = run.rows[first:]
    errors = {_where(row): row["p50"] for row in new if _what(row) == ("eager", "error")}
    for row in new:
        if row["provider"] == "palu" and is_wrong(row, errors.get(_where(row))):
            where = f"{row['kernel']}, V = {row['V']}, {row['rows']} rows"
            said = row["status"] if row["status"] != OK else f"off by {row['p50']:.1e}"
            run.fail(f"{where}: {said}")


def loss_step(run: Run) -> None:
    if run.left("loss_step") < LOSS_STEP_SECONDS:
        run.say(f"loss_step: {NO_TIME}")
        return
    command = [sys.executable, "-m", "benchmarks.bench_loss", "--device", str(run.device)]
    command += ["--calls", "20", "--repeats", "1", "--dtype", "bfloat16"]
    command += ["--csv", str(run.out / "loss_step.csv"), *(TINY_LOSS_STEP if run.tiny else ())]
    with run.file("loss_step.log") as log:
        status = run_logged(command, run.left("loss_step"), log, log)
    run.say((run.out / "loss_step.log").read_text().rstrip())
    if status is None:
        run.say("loss_step: its time was up; what it had is in loss_step.csv")
    elif status:
        run.fail(f"loss_step: status {status}; see loss_step.log")


SECTIONS = {one.__name__: one for one in (card, check, operators, linear, loss_step)}


# ---- rows ----------------------------------------------------------------------------------------


def described(
    case: Case, provider: str, rows: Sequence[dict[str, Any]], rates: Rates | None
) -> list[dict[str, Any]]:
    """Rows of a measurement with what it was of, and its share of the floor."""
    sizes = {"V": case.vocab, "D": case.hidden or None, "rows": case.rows, "k": case.k or None}
    names = {"kernel": case.kernel, "provider": provider, "dtype": "bfloat16"}
    rows = list(rows)
    for row in rows[:]:
        if row["metric"] == "ms" and rates and row.get("p50"):
            floor = 1e3 * floor_seconds(case, rates)
            shares = {name: floor / row[name] for name in ("p20", "p50", "p80")}
            rows.append({"metric": "share of floor", **shares})
    return [names | sizes | row for row in rows]


def _what(row: dict[str, Any]) -> tuple[str, str]:
    return row["provider"], row["metric"]


def _where(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["kernel"], row["V"], row["rows"]


def is_wrong(row: dict[str, Any], eager_error: float | None) -> bool:
    """A measurement of this library's that failed, or a result that is not right."""
    if row["status"] != OK:
        return row["status"] != NO_TIME
    limit = LIMIT
    if row["kernel"].startswith("topk_indices"):
        limit = 0.0
    elif row["D"] and "sparse" not in row["kernel"]:
        limit = LIMIT_OF_PRODUCTS if eager_error is None else LIMIT + 2 * eager_error
    return row["metric"] == "error" and not row["p50"] <= limit


def table(rows: Sequence[dict[str, Any]], vocab: int) -> str:
    """A line a case at one V: this library, `eager`, and what `eager` takes for one of it."""
    cases: dict[tuple, dict[tuple, dict[str, Any]]] = {}
    for row in rows:
        if row["V"] == vocab:
            case = cases.setdefault((row["kernel"], row["rows"]), {})
            case[_what(row)] = row
    lines = []
    for (kernel, count), case in cases.items():

        def value(provider: str, metric: str, how: str, case: dict = case) -> str:
            row = case.get((provider, metric))
            return "-" if row is None else format(row["p50"], how)

        ours, theirs = (case.get((name, "ms"), {}).get("p50") for name in ("palu", "eager"))
        lines.append(
            [
                kernel,
                str(count),
                *(_time(case.get((name, "ms"))) for name in ("palu", "eager")),
                f"{theirs / ours:.1f}" if ours and theirs else "-",
                value("palu", "share of floor", ".2f"),
                value("palu", "peak MiB", ".0f"),
                value("eager", "peak MiB", ".0f"),
                value("palu", "error", ".0e"),
            ]
        )
    headings = [f"V = {vocab}", "rows", "palu ms", "eager ms", "ratio", "of floor", "MiB"]
    return harness.table([*headings, "eager MiB", "error"], lines)


def _time(row: dict[str, Any] | None) -> str:
    """Milliseconds, or in a word why there are none."""
    if row is None:
        return "-"
    if row["status"] != OK:
        return "skipped" if row["status"] == NO_TIME else row["status"].split(":")[0][:16]
    return f"{row['p50']:.3f}"


# ---- the run -------------------------------------------------------------------------------------


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="new or empty")
    parser.add_argument("--device", default="auto", help="auto: the accelerator that is here")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to test the run itself")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    given = parser.parse_args(arguments)
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
        harness.device_named(given.device)
    except ValueError as error:
        parser.error(f"--device: {error}")
    if given.out.exists() and (not given.out.is_dir() or any(given.out.iterdir())):
        parser.error(f"OUT_DIR is {given.out}, which is not empty; it must be new or empty")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    given = options(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    run = Run(given)
    run.say(", ".join(run.environment.values()))
    for name, section in SECTIONS.items():
        if name in given.sections:
            section(run)
            run.say(f"-- {name} over after {time.monotonic() - run.start:.0f} s")
    sizes = list(dict.fromkeys(row["V"] for row in run.rows if row["V"]))
    tables = [table(run.rows, vocab) for vocab in sizes]
    (run.out / "table.txt").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    for one in tables[:1]:
        run.say(f"\n{one}")
    for failure in run.failures:
        run.say(f"FAILED: {failure}")
    return int(bool(run.failures))


if __name__ == "__main__":
    sys.exit(main())

"""What do the operators cost on a GPU? All there is to measure there, in under 9 minutes.

    benchmarks/gpu.sh OUT_DIR [--commit ID] [--sections card check operators linear loss]
    benchmarks/gpu.sh OUT_DIR --model smollm2-tofu --data tofu   # a whole training step too
    benchmarks/gpu.sh OUT_DIR --device cpu --tiny                # to test it where there is no GPU

A plan over the other benchmarks, each with the second by which it must end (`plan`; what one leaves
over is the next one's):

* `card`: bandwidth of a copy, rate of matrix products. The floors of all that follows are made of
  these two.
* `check`: `python -m palu_kernels.check`, every operator against its float64 definition. Most of
  its time goes into compiling some 290 kernel variants.
* `operators`, `linear`: `bench_ops.py` and `bench_linear.py` by `palu` and `eager`, at three
  vocabularies and rows of one batch of 8 questions and of a long one. One process measures one
  part (another goes on with the next measurement should it die), and none begins after its end.
* `loss`: `bench_loss.py` with 20 timed calls. `train_step`: `bench_train_step.py`, where `--model`
  and `--data` are given.

What was not measured has a row that says why: `skipped: no time left`, or what was wrong. OUT_DIR
receives `gpu.csv` (all rows), `table.txt` (all sizes; the first V is printed last), `gpu.log` (what
was printed), and for every part `NAME.csv` and `NAME.log`; `check.json`. Device time is with a cold
L2 cache, `of floor` is the floor (`floor_seconds`) over that time.

The exit status is 1 if the check failed, or a result of this library's is wrong or missing for
another reason than time; 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

from benchmarks import runner, tables
from benchmarks.runner import NO_TIME, Call, Case, Provider
from benchmarks.tables import Row

LAST_START = 5  # seconds before its end after which a part starts no measurement
SHORTEST = 10  # a part is not tried with less
COMPARISON = re.compile(r"(\s\d\.\de[-+]\d\d\s*){2}")  # the check's error and what was allowed
# Transfers of a row of logits, forward plus backward, as the kernels' docstrings count them for
# 16-bit types: selecting reads two rows, a bitmap of S is a sixteenth of one.
BITS = 1 / 16
_FORGET = {"": 2 + (2 + BITS) + (2 + BITS), "_indices": (1 + BITS) + (2 + BITS), "_current": 5}
TRANSFERS = {
    "topk_indices": 3,
    **{f"{name}{by}": n for name in ("flatten", "entropy") for by, n in _FORGET.items()},
    "kl_reverse": 2 + 3,
    "kl_forward": 2 + 3,
    "cross_entropy": 1 + 2,
}
_BY_K = ["topk_indices", *(f"{name}{by}" for by in _FORGET for name in ("flatten", "entropy"))]
_OTHERS = ["kl_reverse", "kl_forward", "cross_entropy"]
_LINEAR_BY_K = ["linear_flatten", "linear_flatten_trained"]
_LINEAR_OTHERS = [
    f"linear_{n}{t}" for n in ("kl_reverse", "cross_entropy") for t in ("", "_trained")
]


class Part(NamedTuple):
    """A command, and the second after the start by which it must be over."""

    section: str
    name: str  # of its files
    end: float
    module: str
    arguments: Sequence[str]


def plan(given: argparse.Namespace) -> Iterator[Part]:
    """Yield the parts in their order."""
    tiny = given.tiny
    on_logits = ["--providers", "palu", "eager", "topk", "sort"]
    on_hidden = ["--providers", "palu", "palu sparse", "palu dense", "eager"]
    same = ["--together", "--repeats", "1", "--dtype", "bfloat16"]
    few = ["--calls", "2" if tiny else "20"]
    k = ["--top-k", "9" if tiny else "1000"]
    vocab, wide, narrow = (
        (["1003", "257"], ["1003", "24"], ["257", "16"])
        if tiny
        else (["128256", "32000", "262144"], ["128256", "4096"], ["262144", "2560"])
    )
    by_k, others = (["5", "300"],) * 2 if tiny else (["50", "4096"], ["226", "4096"])
    yield Part("card", "card", 30, "benchmarks.gpu", [*same, "--card", *few])
    quick = ["--quick"] if tiny else []
    yield Part("check", "check", 180, "palu_kernels.check", quick)
    for name, end, kernels, rows in (
        ("operators", 255, _BY_K, by_k),
        ("operators-others", 310, _OTHERS, others),
    ):
        sizes = ["--vocab", *vocab, "--rows", *rows, *k, "--kernels", *kernels]
        yield Part(
            "operators", name, end, "benchmarks.bench_ops", [*sizes, *on_logits, *same, *few]
        )
    for name, end, kernels, rows, (V, D) in (
        ("linear", 350, _LINEAR_BY_K, by_k, wide),
        ("linear-others", 390, _LINEAR_OTHERS, others, wide),
        ("linear-narrow", 415, _LINEAR_BY_K, by_k, narrow),
        ("linear-narrow-others", 440, _LINEAR_OTHERS, others, narrow),
    ):
        more = [] if tiny or V != "128256" else ["32000"]
        sizes = ["--vocab", V, *more, "--hidden", D, "--rows", *rows, *k, "--grid"]
        arguments = [*sizes, "--kernels", *kernels, *on_hidden, *same, *few]
        yield Part("linear", name, end, "benchmarks.bench_linear", arguments)
    sizes = ["--vocab", "1003", "--hidden", "24", "--positions", "160", "--forget", "19"]
    sizes = [*sizes, "--preserve", "71", "--top-k", "20"] if tiny else []
    yield Part("loss", "loss_step", 525, "benchmarks.bench_loss", [*sizes, *same, *few])
    if given.model is not None:
        where = ["--model", str(given.model), "--data", str(given.data), "--repeats", "1"]
        yield Part("train_step", "train_step", 700, "benchmarks.bench_train_step", where)


SECTIONS = ("card", "check", "operators", "linear", "loss", "train_step")


# ---- the card ------------------------------------------------------------------------------------


class Rates(NamedTuple):
    """What the card was measured to do."""

    bytes_per_second: float  # of a copy, read plus written
    flops_per_second: float  # of a product of large bfloat16 matrices


def card_cases(given: argparse.Namespace) -> list[Case]:
    """A copy of 1 GiB and products of matrices of random numbers, as PyTorch does them unless told
    otherwise."""
    tiny = torch.device(given.device).type == "cpu"
    size = 64 if tiny else 8192
    copy = Case("copy", None, None, 2**16 if tiny else 2**30, None, "uint8")
    return [copy, *(Case("matmul", size, size, size, None, d) for d in ("bfloat16", "float32"))]


def card_call(case: Case, inputs: Sequence[torch.Tensor]) -> Call:
    *sources, target = inputs

    def run() -> None:
        if case.kernel == "copy":
            target.copy_(*sources)
        else:
            torch.mm(*sources, out=target)

    return Call(run)


def card_inputs(case: Case, device: torch.device) -> list[torch.Tensor]:
    if case.kernel == "copy":
        return [torch.empty(case.rows, dtype=torch.uint8, device=device) for _ in range(2)]
    shape, dtype = (case.rows, case.V), getattr(torch, case.dtype)
    return [torch.empty(shape, dtype=dtype, device=device).normal_() for _ in range(3)]


CARD = runner.Benchmark(
    name="gpu",
    description="What does the card do at best?",
    kernels={name: {"torch": Provider(card_call)} for name in ("copy", "matmul")},
    add_options=lambda parser: parser.add_argument("--card", action="store_true"),
    cases=card_cases,
    inputs=card_inputs,
    axes=(),
)


def rates(rows: Sequence[Row]) -> Rates | None:
    """Return what the rows of `card` say, None where they say nothing."""
    seconds = {(r["kernel"], r["dtype"]): r for r in rows if r["metric"] == _timed(rows)}
    copy, product = (seconds.get(k) for k in (("copy", "uint8"), ("matmul", "bfloat16")))
    if not (copy and product and copy["p50"] and product["p50"]):
        return None
    flops = 2 * product["rows"] * product["V"] * product["D"]
    return Rates(2 * copy["rows"] / copy["p50"], flops / product["p50"])


def _timed(rows: Sequence[Row]) -> str:
    """The device's own time where there is one."""
    device = any(row["metric"] == "device_seconds" for row in rows)
    return "device_seconds" if device else "seconds"


def floor_seconds(row: Row, rates: Rates) -> float | None:
    """Return the bandwidth floor of an operator on logits; of a linear one the matrix floor, that
    is every product at the card's rate of arithmetic or of memory, whichever is slower, and nothing
    beside them; of a sparse one the time to read the chosen rows of the head twice, and where the
    head trains to read all of it once (for its mean row) and to write its gradient."""
    kernel, item = row["kernel"], 2  # bytes of a bfloat16
    if kernel in TRANSFERS:
        return TRANSFERS[kernel] * row["rows"] * row["V"] * item / rates.bytes_per_second
    if not kernel.startswith("linear"):
        return None
    trained, weight = kernel.endswith("_trained"), row["V"] * row["D"]
    if row["provider"] == "palu sparse":
        moved = 2 * row["rows"] * row["k"] * row["D"] + trained * 2 * weight
        return moved * item / rates.bytes_per_second
    # logits, the reference's logits (for a KL), the gradients of hidden rows and weight
    products = 2 + kernel.startswith("linear_kl") + trained
    entries = row["rows"] * row["V"]
    arithmetic = 2 * entries * row["D"] / rates.flops_per_second
    operands = weight + row["rows"] * row["D"] + entries
    return products * max(arithmetic, operands * item / rates.bytes_per_second)


# ---- the run -------------------------------------------------------------------------------------


class Run:
    """One run: its folder, its clock, and the rows that it has so far."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.out = given, given.out
        self.start = time.monotonic()
        self.rows: list[Row] = []
        self.failures: list[str] = []

    def say(self, text: str) -> None:
        print(text, flush=True)
        with (self.out / "gpu.log").open("a", encoding="utf-8") as stream:
            print(text, file=stream)

    def fail(self, text: str) -> None:
        self.failures.append(text)
        self.say(f"FAILED: {text}")

    def do(self, part: Part) -> None:
        left = self.start + part.end - time.monotonic()
        if left < SHORTEST:
            self.say(f"{part.name}: {NO_TIME}")
            return
        log, csv = (self.out / f"{part.name}.{kind}" for kind in ("log", "csv"))
        command = [sys.executable, "-m", part.module, *part.arguments]
        command += ["--device", self.given.device]
        if part.section == "check":
            command += ["--json", str(self.out / "check.json")]
        else:
            command += ["--csv", str(csv), "--seconds", f"{left - LAST_START:.0f}"]
            command += ["--commit", self.given.commit] if self.given.commit else []
        with log.open("a", encoding="utf-8") as stream:
            status = run_logged(command, left, stream)
        if part.section == "check":
            self.judge_check(log.read_text(), status)
        else:
            self.judge_rows(part, tables.read(csv) if csv.exists() else [], status)
        self.say(f"-- {part.name} over after {time.monotonic() - self.start:.0f} s")

    def judge_check(self, text: str, status: int | None) -> None:
        failed = [line for line in text.splitlines() if line.endswith("FAILED")]
        for one in failed[:10]:
            self.say(one)
        if status is None:
            done = sum(map(bool, map(COMPARISON.search, text.splitlines())))
            said = f"{done} comparisons before its time was up, {len(failed)} of them failed"
            self.say(f"check: {said}")
        elif status == 0:
            self.say(f"check: {text.splitlines()[-1]}")
        if failed or status not in (0, None):
            self.fail(f"check: {len(failed)} failed, status {status}; see check.log")

    def judge_rows(self, part: Part, rows: list[Row], status: int | None) -> None:
        """Only this library's failures count: what else is wrong is in the table."""
        self.rows += rows
        tables.write(self.out / "gpu.csv", self.rows)
        keys = tables.grouped(rows, lambda row: (*(row[n] for n in tables.CASE), row["provider"]))
        skipped = sum(same[0]["status"] == NO_TIME for same in keys.values())
        done = len(keys) - skipped
        self.say(f"{part.name}: {done} of {len(keys)} measurements, {skipped} {NO_TIME}")
        if part.section in ("loss", "train_step"):
            self.say((self.out / f"{part.name}.log").read_text().rstrip())
        for same in keys.values():
            row = same[0]
            others = ("eager", "compile", "released", "torch", "liger", "sort")
            if row["provider"] not in others and runner.is_bad(row["status"]):
                self.fail(f"{tables.label(row)} {row['provider']}: {row['status']}")
        if not rows or status not in (0, 1, None):
            self.fail(f"{part.name}: status {status}; see {part.name}.log")


def run_logged(command: Sequence[str], seconds: float, log: TextIO) -> int | None:
    """Return the exit status of a command, or None where the time was up and it was ended with all
    that it started."""
    print("$", shlex.join(command), file=log, flush=True)
    process = subprocess.Popen(
        command, cwd=runner.ROOT, stdout=log, stderr=log, start_new_session=True
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


def shares_of_floor(rows: Sequence[Row], rates: Rates) -> list[Row]:
    """Return rows of the metric `of_floor`: the floor over the time."""
    shares = []
    for row in rows:
        floor = floor_seconds(row, rates) if row["metric"] == _timed(rows) and row["p50"] else None
        if floor is not None:
            processes = [[floor / value for value in p] for p in tables.by_process(row)]
            add = (row["provider"], "of_floor", processes, row["status"])
            shares.append(tables.row(row, *add, row))
    return shares


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
        runner.device_named(given.device)
    except ValueError as error:
        parser.error(f"--device: {error}")
    if given.out.exists() and (not given.out.is_dir() or any(given.out.iterdir())):
        parser.error(f"OUT_DIR is {given.out}, which is not empty; it must be new or empty")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else list(arguments)
    if "--card" in words or words[:1] == [runner.WORKER]:
        return runner.main(CARD, words)
    given = options(words)
    given.out.mkdir(parents=True, exist_ok=True)
    run = Run(given)
    place = runner.environment(torch.device(given.device))
    run.say(", ".join(map(str, [*place.values(), given.commit or runner.commit()])))
    for part in plan(given):
        if part.section in given.sections:
            run.do(part)
    speed = rates([row for row in run.rows if row["kernel"] in ("copy", "matmul")])
    if speed is None:
        run.say("the card's rates were not measured: no floors")
    else:
        copy, product = speed.bytes_per_second / 1e9, speed.flops_per_second / 1e12
        run.say(f"copy: {copy:.1f} GB/s; bfloat16 products: {product:.1f} TFLOP/s")
        run.rows += shares_of_floor(run.rows, speed)
        tables.write(run.out / "gpu.csv", run.rows)
    kinds = (*TRANSFERS, *_LINEAR_BY_K, *_LINEAR_OTHERS)
    rows = tables.grouped((r for r in run.rows if r["kernel"] in kinds), lambda row: row["V"])
    texts = [tables.tables(same, axes=()) for same in rows.values()]
    (run.out / "table.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    for one in texts[:1]:
        run.say(f"\n{one}")
    for failure in run.failures:
        run.say(f"FAILED: {failure}")
    return int(bool(run.failures))


if __name__ == "__main__":
    sys.exit(main())

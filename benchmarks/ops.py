"""Is every operator as fast as plain PyTorch? Each beside the formula as one writes it, in turns.

    python -m benchmarks run ops
    python -m benchmarks run ops --busy 1 --csv benchmarks/results/ops_busy.csv
    python -m benchmarks run ops --show benchmarks/results/ops.csv     # the last table again

`bench_ops` and `bench_linear` at the sizes that decide: V = 32,000 and 128,256, float32 and
bfloat16, k = 50 and 1000, a head that is frozen and one that trains. The providers of a case take
turns call by call in one process, under PyTorch's own choice of threads and OpenMP's own way to
wait, as users have them. A ratio is the median over rounds of our time over the neighbour's in the
same round; `wall` is of the time that passed, `process` of the time of all threads, which tells
more on a busy machine. What is promised stands in `LIMITS`, and the last lines say which rows are
above it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import bench_linear, bench_ops, declare, machine, runner, tables
from benchmarks.declare import Benchmark
from benchmarks.tables import Row

OURS = "palu"
# provider -> the most that ours may take of its time
LIMITS = {"eager": 1.0, "compile": 1.1, "topk": 1.0, "torch": 1.05, "products": 1.15}
# Where the limit holds: of peers of one kernel, and of the products only beside a head that trains.
TRAINED_ONLY = ("torch", "products")
METRICS = {"wall": "seconds", "process": "cpu_seconds"}
ON_LOGITS = (bench_ops.TOP_K, *bench_ops.FORGET, *bench_ops.BY_INDICES, *bench_ops.KL)
ON_LOGITS += (bench_ops.CROSS_ENTROPY,)
LINEAR = [
    f"linear_{name}{trained}"
    for name in ("cross_entropy", "kl_reverse", "flatten")
    for trained in ("", bench_linear.TRAINED)
]


def parts(given: argparse.Namespace) -> Iterator[tuple[Benchmark, list[str]]]:
    """Yield the benchmarks and their options, a vocabulary after the other."""
    few = ["--repeats", "1", "--in-turns", "--busy", str(given.busy), "--csv", str(given.csv)]
    few += ["--device", given.device, "--dtype", *given.dtype]
    few += ["--threads", str(given.threads)] if given.threads else []
    few += ["--commit", given.commit] if given.commit else []
    for V, rows in zip(given.vocab, given.rows, strict=True):
        ours = ["--vocab", str(V), "--rows", str(rows), *few]
        k = ["--top-k", *map(str, given.top_k)]
        others = asked(given, "eager", "compile", "topk")
        names = ["--kernels", *ON_LOGITS, "--providers", OURS, *others]
        yield bench_ops.BENCHMARK, [*ours, *k, *names, "--calls", str(given.calls)]
    for V in given.vocab:
        ours = ["--vocab", str(V), "--rows", str(given.linear_rows), *few]
        k = ["--top-k", str(given.top_k[-1]), "--hidden", str(given.hidden)]
        others = asked(given, "eager", "compile", "torch", "products")
        names = ["--kernels", *LINEAR, "--providers", OURS, *others]
        yield bench_linear.BENCHMARK, [*ours, *k, *names, "--calls", str(given.linear_calls)]


def asked(given: argparse.Namespace, *names: str) -> list[str]:
    return [name for name in names if name in given.providers]


def compile_all(given: argparse.Namespace, end: float) -> None:
    """Call what `torch.compile` compiles once, in as many processes as there are processors: its
    cache on disk has all of it then."""

    def warm_up(benchmark: Benchmark, words: list[str]) -> None:
        own = [*words, "--providers", "compile", "--warm-up", "--csv", str(Path(folder, words[1]))]
        own = runner.options(benchmark, [*own, "--seconds", f"{end - time.monotonic():.0f}"])
        runner.Run(benchmark, own).measure_all()

    with TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in [pool.submit(warm_up, *part) for part in parts(given)]:
            done.result()


def measure(given: argparse.Namespace) -> list[Row]:
    """Measure all parts in the time there is; the CSV holds what is done so far."""
    end, rows = time.monotonic() + given.seconds, []
    if "compile" in given.providers and not given.cached:
        compile_all(given, end)
    for benchmark, words in parts(given):
        left = max(end - time.monotonic(), 0)
        own = runner.options(benchmark, [*words, "--seconds", f"{left:.0f}"])
        rows = runner.Run(benchmark, own, rows).measure_all()
    return rows


# ---- the last table ------------------------------------------------------------------------------


def ratios(rows: Sequence[Row]) -> dict[str, dict[tuple[str, str], float]]:
    """Return label of a case -> (provider, `wall` or `process`) -> ratio."""
    found = {}
    for same in tables.grouped(rows, lambda row: tuple(row[n] for n in tables.CASE)).values():
        at = {(row["provider"], row["metric"]): row for row in same}
        own = {
            (name, kind): tables.round_ratio(at.get((OURS, metric)), at.get((name, metric)))
            for name in LIMITS
            for kind, metric in METRICS.items()
        }
        found[tables.label(same[0])] = {key: one for key, one in own.items() if one is not None}
    return found


def table(rows: Sequence[Row]) -> str:
    """Return ours over the others by case, and which cases are above the limits."""
    found, lines = ratios(rows), []
    times = {(tables.label(row), row["metric"]): row for row in rows if row["provider"] == OURS}
    for case, own in found.items():
        ours = [times.get((case, metric)) for metric in METRICS.values()]
        cells = [f"{row['p50'] * 1e3:.2f}" if row and row["p50"] else "-" for row in ours]
        for name in LIMITS:
            pair = [own.get((name, kind)) for kind in METRICS]
            cells.append(" / ".join("-" if one is None else f"{one:.2f}" for one in pair))
        lines.append([case, *cells])
    headings = ["wall / process", "ms", "process ms", *(f"of {name}" for name in LIMITS)]
    return "\n".join([tables.text(headings, lines), "", *verdicts(found)])


def verdicts(found: dict[str, dict[tuple[str, str], float]]) -> list[str]:
    lines = []
    for kind in METRICS:
        for name, limit in LIMITS.items():
            asked = {
                case: own[name, kind]
                for case, own in found.items()
                if (name, kind) in own
                and (name not in TRAINED_ONLY or bench_linear.TRAINED in case.split()[0])
            }
            if not asked:
                continue
            above = {case: one for case, one in asked.items() if one > limit}
            said = f"{len(above)} of {len(asked)} rows above {limit:.2f} of {name} ({kind} time)"
            lines.append("; ".join([said, *(f"{case} {one:.2f}" for case, one in above.items())]))
    return lines


# ---- the command ---------------------------------------------------------------------------------


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks run ops", description=__doc__.splitlines()[0]
    )
    several: dict[str, Any] = {"nargs": "+", "type": runner.positive}
    add = parser.add_argument
    add("--vocab", **several, default=[32000, 128256], help="V")
    add("--rows", **several, default=[128, 64], help="of logits, for each V")
    add("--top-k", **several, default=[50, 1000], help="k; the last one for the linear operators")
    add("--linear-rows", type=runner.positive, default=128, help="of the linear operators")
    add("--hidden", type=runner.positive, default=1024, help="D")
    others = {"nargs": "+", "choices": LIMITS, "default": list(LIMITS)}
    add("--providers", **others, help="beside ours")
    add("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    add("--calls", type=runner.positive, default=9, help="rounds on logits")
    add("--linear-calls", type=runner.positive, default=4, help="rounds on hidden rows")
    add("--threads", type=runner.positive, help="default: PyTorch's own choice")
    add("--busy", type=int, default=0, help="processes beside that never rest")
    add("--device", default="auto")
    add("--seconds", type=float, default=690, help="begin no case after this time")
    add("--csv", type=Path, default=machine.RESULTS / "ops.csv")
    cached = "an earlier run has compiled everything: do not begin with that"
    add("--cached", action="store_true", help=cached)
    add("--commit", help="what is measured, where git cannot tell")
    add("--show", type=Path, metavar="CSV", help="print the last table of these rows; run nothing")
    given = parser.parse_args(arguments)
    if len(given.rows) != len(given.vocab):
        parser.error(f"--rows has {len(given.rows)} numbers; it must have one for each of --vocab")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    given = options(arguments)
    if given.show is not None:
        print(table(tables.read(given.show)))
        return 0
    rows = measure(given)
    print(tables.tables(rows, axes=()), table(rows), sep="\n\n")
    return int(any(declare.is_bad(row["status"]) for row in rows if row["provider"] == OURS))


if __name__ == "__main__":
    sys.exit(main())

"""How long should an operator take on a card that nobody has asked?

    python -m benchmarks.static.predict [--csv benchmarks/results/instructions.csv]
        [--versions 3.6.0 3.9.0] [--dtype bf16] [--rows 1 50 256 4096] [--columns 32000 128256]

Forward and backward of every operator are run on CPU tensors with the launches of kernels noted
and not made (`compile_report.py`), and what PyTorch launches beside them is counted. A kernel that
walks rows takes the longer of two times: its bytes at the bandwidth of a copy, and the clocks of
its busiest pipe (`instructions.py`, the counts of that card's architecture) at the share of them
that such loops reach. Every launch, whoever makes it, costs two microseconds. Nothing here was
timed: bandwidths and share are those of the review that set the model up, and a wave of programs
that is not full, or shared memory that many threads want at once, is not in it. Kernels that look
at less than a row (`PARTLY`) count as launches alone, so what is said of top-k and of the forget
losses is a lower bound. "-" stands where the table lacks a kernel.
"""

from __future__ import annotations

import argparse
import csv
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.static import before_triton

if __name__ == "__main__":
    before_triton()

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import tables
from benchmarks.static import compile_report as report
from benchmarks.static.instructions import words_of
from palu_kernels import functional as operators
from palu_kernels import logits_op

LAUNCH = 2e-6  # seconds, of any kernel
# maxima of segments, S, and rows that more entries than usual may belong to
PARTLY = ("_pick_kernel", "_loss_kernel", "_search_kernel")
REACHED = 0.73  # of the clocks that a loop without waits would take
TOP_K = 1000
FILE = Path(__file__).parents[1] / "results" / "instructions.csv"


Costs = dict[tuple[str, str, str], dict[str, str]]  # by architecture, kernel and constants


@dataclass(frozen=True)
class Card:
    arch: str
    multiprocessors: int
    hertz: float
    bandwidth: float  # bytes a second, of a copy


CARDS = {
    "H100": Card("sm_90", 132, 1.98e9, 3.0e12),
    "H200": Card("sm_90", 132, 1.98e9, 4.3e12),
    "A100": Card("sm_80", 108, 1.41e9, 1.75e12),
}


class Launched(TorchDispatchMode):
    """Counts operators that launch something, those inside of custom ones too."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (custom := OPDEFS.get(func.name())) is not None:
            with self:
                return custom._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        quiet = func.is_view or "empty" in func.name() or "detach" in func.name()
        self.count += isinstance(result, Tensor) and not quiet
        return result


def calls(rows: int, columns: int, dtype: torch.dtype) -> Iterator[tuple[str, int, Callable]]:
    """(operator, transfers of a row that it cannot do without, call). The rows share memory."""
    rows_of = torch.empty(1, columns, dtype=dtype).expand(rows, columns)
    labels, options = torch.zeros(rows, dtype=torch.int64), {"backend": "triton"}
    forget = {"top_k": TOP_K, "ref_logits": rows_of, **options}

    def leaf() -> Tensor:
        return rows_of.detach().requires_grad_()

    def entropy(objective: str) -> Callable[[], Tensor]:
        return lambda: operators.local_entropy_loss(leaf(), objective=objective, **forget)

    yield "topk", 1, lambda: operators.topk_indices(rows_of, TOP_K, **options)
    yield "flatten", 3, entropy("flatten")
    yield "entropy", 3, entropy("entropy")
    yield "kl", 3, lambda: operators.kl_loss(leaf(), rows_of, **options)
    yield "cross-entropy", 2, lambda: operators.cross_entropy_loss(leaf(), labels, **options)


def launches(call: Callable[[], Tensor], dtype: str) -> tuple[list[tuple], int]:
    """-> (variant, grid and row length of every kernel of ours; how many others are launched)."""
    ours: list[tuple] = []
    # what an accelerator's call does not do
    unchecked = mock.patch.object(logits_op, "check_values", lambda device: False)
    with report.recording({}, dtype, 0, ours), unchecked, Launched() as others:
        out = call()
        if out.requires_grad:
            out.backward()
    return [one for one in ours if one[0].backend == "cuda"], others.count


def seconds(card: Card, launch: tuple, costs: Costs) -> float:
    """Raises KeyError where the launch walks rows and nothing was counted."""
    variant, grid, columns = launch
    if "BLOCK" not in variant.named or variant.kernel.endswith(PARTLY):
        return LAUNCH
    cost = costs[card.arch, variant.kernel, words_of(variant.named, variant.signature)]
    if not cost["clocks"]:  # no loop
        return LAUNCH
    entries = grid[0] * columns
    issue = float(cost["clocks"]) * entries / card.multiprocessors / card.hertz / REACHED
    return LAUNCH + max(issue, float(cost["bytes"]) * entries / card.bandwidth)


def cell(card: Card, ours: list[tuple], others: int, costs: Costs) -> str:
    """Microseconds of a call; "-" where the table lacks one of its kernels on that card."""
    try:
        kernels = sum(seconds(card, one, costs) for one in ours)
    except KeyError:
        return "-"
    return f"{1e6 * (kernels + others * LAUNCH):.0f}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=FILE, help="counts of instructions")
    parser.add_argument("--versions", nargs="+", default=["3.6.0", "3.9.0"], help="of Triton")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 50, 256, 4096])
    parser.add_argument("--columns", nargs="+", type=int, default=[32000, 128256])
    given = parser.parse_args(arguments)
    costs: dict[str, Costs] = {}
    with given.csv.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            if row["dtype"] == given.dtype:
                place = (row["arch"], row["kernel"], row["constants"])
                costs.setdefault(row["triton"], {})[place] = row
    # a compiler may branch around a load: the bytes are the most of any Triton's main path
    moved: dict[tuple, float] = {}
    for row in (row for of_one in costs.values() for row in of_one.values()):
        place = (row["kernel"], row["constants"])
        moved[place] = max(moved.get(place, 0.0), float(row["bytes"] or 0))
    for row in (row for of_one in costs.values() for row in of_one.values()):
        row["bytes"] = str(moved[row["kernel"], row["constants"]])
    if missing := [version for version in given.versions if version not in costs]:
        parser.error(f"{given.csv} has no rows of triton {', '.join(missing)}")
    warnings.simplefilter("ignore")
    lines = []
    for columns in given.columns:
        for rows in given.rows:
            dtype = report.DTYPES[given.dtype]
            for name, transfers, call in calls(rows, columns, dtype):
                ours, others = launches(call, given.dtype)
                floor = transfers * rows * columns * dtype.itemsize
                line = [name, str(columns), str(rows), f"{len(ours)} + {others}"]
                for card in CARDS.values():
                    line.append(f"{1e6 * floor / card.bandwidth:.0f}")
                    line += [cell(card, ours, others, costs[v]) for v in given.versions]
                lines.append(line)
    headings = ["operator", "V", "rows", "launches"]
    for name in CARDS:
        headings += [f"{name} floor", *given.versions]
    print(f"microseconds predicted, {given.dtype}, k = {TOP_K}; launches: kernels + PyTorch's")
    print(tables.text(headings, sorted(lines, key=lambda line: (line[0], *map(int, line[1:3])))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

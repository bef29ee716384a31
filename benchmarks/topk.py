"""What does it cost to find the k largest entries of every row?

    python -m benchmarks.topk
    python -m benchmarks.topk --vocab 262144 --k 1 10000 --dtype bfloat16

Forward only: there is no gradient. The providers:

* ``palu``: `palu_kernels.topk_indices`, on a GPU a radix select, on the CPU ``reference.py``.
  Exact, ascending, ties to the lowest index.
* ``topk``, ``topk unsorted``: `torch.topk`, which says nothing about ties.
* ``sort``: `torch.sort`, descending, of which k are kept.

Every row must have k different indices whose values are those of the k largest entries; for
``palu`` it must be the same indices.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import runner as harness
from benchmarks import suite
from benchmarks.definitions import normal
from benchmarks.suite import Call, Case, Outputs, Provider
from palu_kernels import reference, topk_indices

KERNEL = "topk_indices"


def scores(case: Case, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return normal(generator, 2, case.rows, case.V, dtype=getattr(torch, case.dtype))


def truth(case: Case, scores: Tensor) -> Outputs:
    return {"exact": reference.topk_indices(scores.double(), case.k)}


def errors(case: Case, scores: Tensor, found: Outputs, truth: Outputs) -> dict[str, float]:
    """The share of rows that are wrong."""
    ((name, indices),) = found.items()
    if indices.shape != truth["exact"].shape:
        return {"rows": 1.0}
    right = indices.int() == truth["exact"]
    if name == "any order":
        values, wanted = (
            scores.gather(-1, t.long()).sort(dim=-1).values for t in (indices, truth["exact"])
        )
        distinct = indices.sort(dim=-1).values.diff(dim=-1, prepend=indices[:, :1] * 0 - 1) > 0
        right = (values == wanted) & distinct
    return {"rows": 1 - float(right.all(-1).float().mean())}


def returning(order: str, find: Callable[[Tensor, int], Tensor], case: Case, given: Tensor) -> Call:
    return Call(lambda: {order: find(given, case.k)})


PROVIDERS: dict[str, Provider | str] = {
    "palu": Provider(partial(returning, "exact", topk_indices)),
    "topk": Provider(partial(returning, "any order", lambda rows, k: rows.topk(k, dim=-1).indices)),
    "topk unsorted": Provider(
        partial(returning, "any order", lambda rows, k: rows.topk(k, -1, sorted=False).indices)
    ),
    "sort": Provider(
        partial(
            returning,
            "any order",
            lambda rows, k: rows.sort(dim=-1, descending=True).indices[:, :k],
        )
    ),
}


def add_sizes(parser: argparse.ArgumentParser) -> None:
    count, ks = harness.positive, [1, 10, 100, 1000, 10000]
    parser.add_argument("--vocab", nargs="+", type=count, default=[32000, 128256, 262144])
    parser.add_argument("--rows", nargs="+", type=count, default=[50])
    parser.add_argument("--k", nargs="+", type=count, default=ks, help="those up to V")


def cases(given: argparse.Namespace) -> list[Case]:
    return [
        Case(KERNEL, V, None, rows, k, dtype)
        for dtype in given.dtype
        for V in given.vocab
        for rows in given.rows
        for k in given.k
        if k <= V
    ]


BENCHMARK = suite.Benchmark(
    name="topk",
    description=__doc__,
    kernels={KERNEL: PROVIDERS},
    add_sizes=add_sizes,
    cases=cases,
    inputs=scores,
    truth=truth,
    errors=errors,
    allowed=lambda case, name: 0.0,
    axes=("k",),
)


def main(arguments: Sequence[str] | None = None) -> int:
    return suite.main(BENCHMARK, arguments)


if __name__ == "__main__":
    sys.exit(main())

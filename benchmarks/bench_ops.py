"""What does each operator on logits cost, forward plus backward, beside PyTorch and peers?

    python -m benchmarks.bench_ops
    python -m benchmarks.bench_ops --vocab 32000 128256 262144 --dtype bfloat16
    python -m benchmarks.bench_ops --kernels topk_indices --csv benchmarks/results/topk.csv

Rows of logits `[rows, V]` meet reference rows, indices or labels; the loss is the mean over rows
and the gradient is that of the logits. The providers:

* `palu`: the operator of `palu_kernels`, by the backend that `auto` picks.
* `eager`: the formula as one writes it for speed (`providers.plain_loss`), S by `torch.topk`, under
  autograd.
* `compile`: the same under `torch.compile`.
* `liger`, `fla`: operators on logits of liger-kernel and flash-linear-attention.

`topk_indices`, forward only and measured when `--kernels` names it, finds the k largest entries of
every row, `palu` on a GPU by a search of keys, on the CPU by C loops or PyTorch: exact, ascending,
ties to the lowest index. `topk`, `topk unsorted`: `torch.topk`, which says nothing about ties.
`sort`: `torch.sort`, descending, of which k are kept. Every row must have k different indices whose
values are those of the k largest entries; for `palu` it must be the same indices.

cut-cross-entropy and `torch.nn.functional.linear_cross_entropy` take hidden rows: see
`bench_linear.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import declare, providers, runner
from benchmarks.declare import Call, Case, Outputs, Provider
from benchmarks.providers import CROSS_ENTROPY, FORGET, KL, normal, untied
from palu_kernels import cross_entropy_loss, kl_loss, local_entropy_loss, reference, topk_indices
from palu_kernels.backend import Backend

# S comes with the rows, or from the current logits, instead of from the reference's.
BY_INDICES = {f"{name}_indices": name for name in FORGET}
BY_CURRENT = {f"{name}_current": name for name in ("flatten", "entropy")}
LOSSES = (*FORGET, *BY_INDICES, *KL, CROSS_ENTROPY, *BY_CURRENT)
TOP_K = "topk_indices"
# V, rows, k
SIZES = {
    False: ([128256], [128], [1000]),
    True: ([32000, 128256, 262144], [50], [1, 10, 100, 1000, 10000]),  # of TOP_K
}


class Inputs(NamedTuple):
    logits: Tensor  # [rows, V], a leaf that wants its gradient
    ref_logits: Tensor  # [rows, V]
    indices: Tensor  # int64 [rows, k]
    labels: Tensor  # [rows]

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"gradient": self.logits}

    def exact(self) -> Callable[[Tensor], Inputs]:
        def piece(rows: Tensor) -> Inputs:
            logits, ref_logits, indices, labels = (t.detach()[rows] for t in self)
            return Inputs(logits.double().requires_grad_(), ref_logits.double(), indices, labels)

        return piece


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Logits with a standard deviation of 2, the current ones 1 away from the reference's."""
    generator, dtype = torch.Generator(device).manual_seed(0), getattr(torch, case.dtype)
    ref_logits = normal(generator, 2, case.rows, case.V, dtype=dtype)
    if case.kernel == TOP_K:
        return Inputs(ref_logits, ref_logits, ref_logits, ref_logits)
    ref_logits = untied(ref_logits, case.k)
    logits = ref_logits + normal(generator, 1, case.rows, case.V, dtype=dtype)
    if case.kernel in BY_CURRENT:
        logits = untied(logits, case.k)
    indices = ref_logits.topk(case.k or 1, dim=-1).indices.sort(dim=-1).values
    labels = torch.randint(case.V, (case.rows,), generator=generator, device=device)
    return Inputs(logits.requires_grad_(), ref_logits, indices, labels)


def palu(case: Case, given: Inputs, backend: Backend = "auto") -> Tensor:
    logits, ref_logits, indices, labels = given
    if case.kernel in KL:
        return kl_loss(logits, ref_logits, direction=KL[case.kernel], backend=backend)
    if case.kernel == CROSS_ENTROPY:
        return cross_entropy_loss(logits, labels, backend=backend)
    source = {"ref_logits": ref_logits, "backend": backend}
    if case.kernel in BY_INDICES:
        source = {"indices": indices, "backend": backend}
    elif case.kernel in BY_CURRENT:
        source = {"backend": backend}
    return local_entropy_loss(logits, top_k=case.k, **source, **FORGET[_loss(case)])


def eager(case: Case, given: Inputs) -> Tensor:
    return providers.plain_loss(_loss(case), given.logits, **_rest(case, given))


def definition(case: Case, given: Inputs) -> Tensor:
    return providers.row_losses(_loss(case), given.logits, **_rest(case, given)).mean()


def _rest(case: Case, given: Inputs) -> dict[str, Tensor | int | None]:
    logits, ref_logits, indices, labels = given
    return {
        "k": case.k,
        "ref_logits": logits.detach() if case.kernel in BY_CURRENT else ref_logits,
        "indices": indices if case.kernel in BY_INDICES else None,
        "labels": labels,
    }


def _loss(case: Case) -> str:
    return (BY_INDICES | BY_CURRENT).get(case.kernel, case.kernel)


# ---- top-k ---------------------------------------------------------------------------------------


def truth(case: Case, given: Inputs) -> Outputs:
    if case.kernel == TOP_K:
        pieces = given.ref_logits.split(providers.TRUTH_ROWS)
        exact = [reference.topk_indices(piece.double(), case.k) for piece in pieces]
        return {"exact": torch.cat(exact)}
    return providers.float64_truth(definition, case, given)


def errors(case: Case, given: Inputs, outputs: Outputs, truth: Outputs) -> dict[str, float]:
    """Of `topk_indices` the share of rows that are wrong."""
    if case.kernel != TOP_K:
        return declare.relative_errors(case, given, outputs, truth)
    ((name, indices),) = outputs.items()
    if indices.shape != truth["exact"].shape:
        return {"rows": 1.0}
    right = indices.int() == truth["exact"]
    if name == "any order":
        values, wanted = (
            given.ref_logits.gather(-1, t.long()).sort(dim=-1).values
            for t in (indices, truth["exact"])
        )
        distinct = indices.sort(dim=-1).values.diff(dim=-1, prepend=indices[:, :1] * 0 - 1) > 0
        right = (values == wanted) & distinct
    return {"rows": 1 - float(right.all(-1).float().mean())}


def allowed(case: Case, name: str) -> float:
    return 0.0 if case.kernel == TOP_K else declare.allowed(case, name)


def indices_by(order: str, find: Callable[[Tensor, int], Tensor]) -> Provider:
    return Provider(lambda case, given: Call(lambda: {order: find(given.ref_logits, case.k)}))


TOP_K_PROVIDERS = {
    "palu": indices_by("exact", topk_indices),
    "topk": indices_by("any order", lambda rows, k: rows.topk(k, dim=-1).indices),
    "topk unsorted": indices_by(
        "any order", lambda rows, k: rows.topk(k, -1, sorted=False).indices
    ),
    "sort": indices_by(
        "any order", lambda rows, k: rows.sort(dim=-1, descending=True).indices[:, :k]
    ),
}


# ---- the benchmark -------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    several = partial(parser.add_argument, nargs="+", type=runner.positive)
    several("--vocab", help="V; default 128256, of topk_indices 32000 128256 262144")
    several("--rows", help="default 128, of topk_indices 50")
    several("--top-k", help="k, those up to V; default 1000, of topk_indices 1 to 10000")


def cases(given: argparse.Namespace) -> list[Case]:
    result = []
    for kernel in (*LOSSES, TOP_K):
        asked = zip((given.vocab, given.rows, given.top_k), SIZES[kernel == TOP_K], strict=True)
        vocab, row_counts, ks = (sizes or default for sizes, default in asked)
        if kernel in KL or kernel == CROSS_ENTROPY:
            ks = [None]
        result += [
            Case(kernel, V, None, rows, k, dtype)
            for dtype in given.dtype
            for V in vocab
            for rows in row_counts
            for k in ks
            if k is None or k <= V
        ]
    return result


LIBRARIES = providers.ON_LOGITS
BENCHMARK = declare.Benchmark(
    name="bench_ops",
    description=__doc__,
    kernels={
        kernel: providers.own_providers(palu, eager) | providers.peers_of(kernel, LIBRARIES)
        for kernel in LOSSES
    }
    | {TOP_K: TOP_K_PROVIDERS},
    add_options=add_options,
    cases=cases,
    inputs=make_inputs,
    truth=truth,
    errors=errors,
    allowed=allowed,
    csv="logits_ops.csv",
    default_kernels=[name for name in LOSSES if name not in BY_CURRENT],
)


def main(arguments: Sequence[str] | None = None) -> int:
    return runner.main(BENCHMARK, arguments)


if __name__ == "__main__":
    sys.exit(main())

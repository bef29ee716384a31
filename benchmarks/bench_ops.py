"""What does each operator on logits cost, forward plus backward, beside plain PyTorch?

    python -m benchmarks.bench_ops
    python -m benchmarks.bench_ops --vocab 32000 128256 262144 --dtype bfloat16

Rows of logits ``[rows, V]`` meet reference rows, indices or labels; the loss is the mean over rows
and the gradient is that of the logits. The providers:

* ``palu``: the operator of `palu_kernels`, by the backend that ``auto`` picks.
* ``eager``: ``palu_kernels/reference.py`` under autograd, S by `torch.topk`.
* ``compile``: the same under `torch.compile`.
* ``liger``, ``fla``: operators on logits of liger-kernel and flash-linear-attention.

``topk_indices`` has a script of its own, ``topk.py``. cut-cross-entropy and
`torch.nn.functional.linear_cross_entropy` take hidden rows: see ``scaling.py``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import providers as peers
from benchmarks import runner as harness
from benchmarks import suite
from benchmarks.definitions import (
    CROSS_ENTROPY,
    FORGET,
    KL,
    compiled,
    differentiated,
    gradients,
    no_compiler,
    normal,
    row_losses,
    untied,
)
from benchmarks.suite import Case, Outputs, Provider
from palu_kernels import cross_entropy_loss, kl_loss, local_entropy_loss

# S comes with the rows instead of from the reference's.
BY_INDICES = {"flatten_indices": "flatten", "entropy_indices": "entropy"}
KERNELS = (*FORGET, *BY_INDICES, *KL, CROSS_ENTROPY)
TRUTH_ROWS = 16  # at once, in float64


class Inputs(NamedTuple):
    logits: Tensor  # [rows, V], a leaf that wants its gradient
    ref_logits: Tensor  # [rows, V]
    indices: Tensor  # int32 [rows, k]
    labels: Tensor  # [rows]

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"gradient": self.logits}


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Logits with a standard deviation of 2, the current ones 1 away from the reference's."""
    generator, dtype = torch.Generator(device).manual_seed(0), getattr(torch, case.dtype)
    ref_logits = untied(normal(generator, 2, case.rows, case.V, dtype=dtype), case.k)
    logits = ref_logits + normal(generator, 1, case.rows, case.V, dtype=dtype)
    indices = ref_logits.topk(case.k or 1, dim=-1).indices.sort(dim=-1).values.int()
    labels = torch.randint(case.V, (case.rows,), generator=generator, device=device)
    return Inputs(logits.requires_grad_(), ref_logits, indices, labels)


def palu(case: Case, given: Inputs) -> Tensor:
    logits, ref_logits, indices, labels = given
    if case.kernel in KL:
        return kl_loss(logits, ref_logits, direction=KL[case.kernel])
    if case.kernel == CROSS_ENTROPY:
        return cross_entropy_loss(logits, labels)
    if case.kernel in BY_INDICES:
        chooser = {"indices": indices, **FORGET[BY_INDICES[case.kernel]]}
    else:
        chooser = {"ref_logits": ref_logits, **FORGET[case.kernel]}
    return local_entropy_loss(logits, top_k=case.k, **chooser)


def eager(case: Case, given: Inputs) -> Tensor:
    logits, ref_logits, indices, labels = given
    return row_losses(
        BY_INDICES.get(case.kernel, case.kernel),
        logits,
        k=case.k,
        ref_logits=ref_logits,
        indices=indices.long() if case.kernel in BY_INDICES else None,
        labels=labels,
    ).mean()


def truth(case: Case, given: Inputs) -> Outputs:
    total, parts = 0.0, []
    for logits, ref_logits, *data in zip(*(t.split(TRUTH_ROWS) for t in given), strict=True):
        leaf = logits.detach().double().requires_grad_()
        exact = Inputs(leaf, ref_logits.double(), *data)
        share = len(leaf) / case.rows
        found = gradients(lambda case, given, share=share: eager(case, given) * share, case, exact)
        parts.append(found["gradient"])
        total = total + found["loss"]
    return {"loss": total, "gradient": torch.cat(parts)}


def providers(kernel: str) -> dict[str, Provider | str]:
    own = {
        "palu": Provider(partial(differentiated, palu)),
        "eager": Provider(partial(differentiated, eager)),
        "compile": Provider(partial(compiled, eager), lacks=no_compiler),
    }
    return own | {
        name: peers.ON_LOGITS[name].get(kernel, suite.NO_OPERATION) for name in peers.ON_LOGITS
    }


def add_sizes(parser: argparse.ArgumentParser) -> None:
    count = harness.positive
    parser.add_argument("--vocab", nargs="+", type=count, default=[128256], help="V")
    parser.add_argument("--rows", nargs="+", type=count, default=[128])
    parser.add_argument("--top-k", nargs="+", type=count, default=[1000], help="k, at most V")


def cases(given: argparse.Namespace) -> list[Case]:
    return [
        Case(kernel, V, None, rows, k, dtype)
        for kernel in KERNELS
        for dtype in given.dtype
        for V in given.vocab
        for rows in given.rows
        for k in (given.top_k if kernel in (*FORGET, *BY_INDICES) else [None])
        if k is None or k <= V
    ]


BENCHMARK = suite.Benchmark(
    name="bench_ops",
    description=__doc__,
    kernels={kernel: providers(kernel) for kernel in KERNELS},
    add_sizes=add_sizes,
    cases=cases,
    inputs=make_inputs,
    truth=truth,
)


def main(arguments: Sequence[str] | None = None) -> int:
    return suite.main(BENCHMARK, arguments)


if __name__ == "__main__":
    sys.exit(main())

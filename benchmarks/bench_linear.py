"""How do time and memory of the losses on hidden rows grow with positions, vocabulary and k?

    python -m benchmarks.bench_linear
    python -m benchmarks.bench_linear --kernels linear_cross_entropy --dtype bfloat16

The slope is the finding: bytes for one more position, one more entry of the vocabulary, one more k.
From a base point (the first of each list of sizes) one size varies at a time. Hidden rows
``[rows, D]`` meet a head ``[V, D]`` without bias; the loss is the mean over rows; the gradient is
that of the hidden rows, in ``linear_cross_entropy_trained`` that of the head's weight too. The
providers:

* ``palu``: the linear operator of `palu_kernels`; for the forget loss, with S given as indices,
  ``palu sparse`` and ``palu dense`` where the cost model chooses for ``palu``.
* ``eager``: logits by `torch.nn.functional.linear`, then ``palu_kernels/reference.py``, under
  autograd. ``compile``: the same under `torch.compile`.
* ``torch``, ``torch chunked``: `torch.nn.functional.linear_cross_entropy` without and with
  `LinearCrossEntropyOptions()`.
* ``liger``, ``cce``, ``fla``: liger-kernel, cut-cross-entropy, flash-linear-attention.
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
    compiled,
    differentiated,
    gradients,
    no_compiler,
    normal,
    row_losses,
)
from benchmarks.suite import Case, Outputs, Provider
from palu_kernels import (
    LMHead,
    linear_cross_entropy_loss,
    linear_kl_loss,
    linear_local_entropy_loss,
)

FORGET = "linear_flatten"
TRAINED = "linear_cross_entropy_trained"
SOFTCAP = 2.0  # of the order of the logits, so that a provider without it is found
# kernel -> the loss on logits, as ``definitions.py`` names it
KERNELS = {
    FORGET: "flatten",
    "linear_kl_reverse": "kl_reverse",
    "linear_kl_forward": "kl_forward",
    "linear_kl_softcap": "kl_reverse",
    "linear_cross_entropy": "cross_entropy",
    TRAINED: "cross_entropy",
}
TRUTH_ROWS = 64  # at once, in float64


class Inputs(NamedTuple):
    hidden: Tensor  # [rows, D], a leaf that wants its gradient
    head: LMHead
    ref_hidden: Tensor  # [rows, D]
    indices: Tensor | None  # int32 [rows, k]
    labels: Tensor  # [rows]

    @property
    def leaves(self) -> dict[str, Tensor]:
        weight = {"weight_gradient": self.head.weight} if self.head.requires_grad else {}
        return {"gradient": self.hidden} | weight


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Logits with a standard deviation near 1, the current ones 1 away from the reference's: what
    is lost by rounding logits to bfloat16 then stays below what is allowed."""
    generator, dtype = torch.Generator(device).manual_seed(0), getattr(torch, case.dtype)
    scale = 1 / (0.02 * case.D**0.5)
    weight = normal(generator, 0.02, case.V, case.D, dtype=dtype)
    ref_hidden = normal(generator, scale, case.rows, case.D, dtype=dtype)
    hidden = ref_hidden + normal(generator, scale, case.rows, case.D, dtype=dtype)
    labels = torch.randint(case.V, (case.rows,), generator=generator, device=device)
    head = LMHead(weight, softcap=SOFTCAP if case.kernel == "linear_kl_softcap" else None)
    indices = None
    if case.k is not None:
        parts = [head.logits(rows).topk(case.k, dim=-1).indices for rows in ref_hidden.split(64)]
        indices = torch.cat(parts).sort(dim=-1).values.int()
    weight.requires_grad_(case.kernel == TRAINED)
    return Inputs(hidden.requires_grad_(), head, ref_hidden, indices, labels)


def palu(case: Case, given: Inputs, implementation: str = "auto") -> Tensor:
    hidden, head, ref_hidden, indices, labels = given
    if case.kernel == FORGET:
        options = {"top_k": case.k, "indices": indices, "implementation": implementation}
        return linear_local_entropy_loss(hidden, head, **options)
    if case.kernel.startswith("linear_kl"):
        direction = KERNELS[case.kernel].removeprefix("kl_")
        return linear_kl_loss(hidden, head, ref_hidden, direction=direction)
    return linear_cross_entropy_loss(hidden, head, labels)


def eager(case: Case, given: Inputs) -> Tensor:
    hidden, head, ref_hidden, indices, labels = given
    needs_reference = case.kernel.startswith("linear_kl")
    return row_losses(
        KERNELS[case.kernel],
        head.logits(hidden),
        k=case.k,
        ref_logits=head.logits(ref_hidden) if needs_reference else None,
        indices=None if indices is None else indices.long(),
        labels=labels,
    ).mean()


def truth(case: Case, given: Inputs) -> Outputs:
    weight = given.head.weight.detach().double().requires_grad_(given.head.requires_grad)
    head = LMHead(weight, softcap=given.head.softcap)
    total: Outputs = {}
    parts = []
    for n in range(0, case.rows, TRUTH_ROWS):
        piece = slice(n, n + TRUTH_ROWS)
        hidden = given.hidden[piece].detach().double().requires_grad_()
        indices = None if given.indices is None else given.indices[piece]
        exact = Inputs(hidden, head, given.ref_hidden[piece].double(), indices, given.labels[piece])
        share = len(hidden) / case.rows
        found = gradients(lambda case, given, share=share: eager(case, given) * share, case, exact)
        parts.append(found.pop("gradient"))
        total = {name: total.get(name, 0) + t for name, t in found.items()}
    return total | {"gradient": torch.cat(parts)}


def providers(kernel: str) -> dict[str, Provider | str]:
    own: dict[str, Provider | str] = {"palu": Provider(partial(differentiated, palu))}
    if kernel == FORGET:
        for name in ("sparse", "dense"):
            road = partial(palu, implementation=name)
            own[f"palu {name}"] = Provider(partial(differentiated, road))
    own["eager"] = Provider(partial(differentiated, eager))
    own["compile"] = Provider(partial(compiled, eager), lacks=no_compiler)
    return own | {
        name: peers.ON_HIDDEN[name].get(kernel, suite.NO_OPERATION) for name in peers.ON_HIDDEN
    }


def add_sizes(parser: argparse.ArgumentParser) -> None:
    count = harness.positive
    sizes = {
        # up to more logits than a buffer of the linear operators holds
        "rows": [256, 64, 1024, 4096],
        "vocab": [64000, 16000, 256000],
        "top-k": [100, 1, 1000, 10000],
    }
    for name, values in sizes.items():
        parser.add_argument(
            f"--{name}", nargs="+", type=count, default=values, help="the base point first"
        )
    parser.add_argument("--hidden", type=count, default=256, help="D")


def cases(given: argparse.Namespace) -> list[Case]:
    found = []
    for kernel in KERNELS:
        has_k = kernel == FORGET
        for dtype in given.dtype:
            base = Case(
                *(kernel, given.vocab[0], given.hidden, given.rows[0]),
                *(given.top_k[0] if has_k else None, dtype),
            )
            found += [base._replace(rows=rows) for rows in sorted(given.rows)]
            found += [base._replace(V=V) for V in sorted(given.vocab)]
            found += [base._replace(k=k) for k in sorted(given.top_k) if has_k]
    return [case for case in found if case.k is None or case.k <= case.V]


BENCHMARK = suite.Benchmark(
    name="bench_linear",
    description=__doc__,
    kernels={kernel: providers(kernel) for kernel in KERNELS},
    add_sizes=add_sizes,
    cases=cases,
    inputs=make_inputs,
    truth=truth,
    dtypes=("bfloat16",),
    repeats=2,
    calls=3,
)


def main(arguments: Sequence[str] | None = None) -> int:
    return suite.main(BENCHMARK, arguments)


if __name__ == "__main__":
    sys.exit(main())

"""How do time and memory of the losses on hidden rows grow with positions, vocabulary and k?

    python -m benchmarks.bench_linear
    python -m benchmarks.bench_linear --kernels linear_cross_entropy --dtype bfloat16

The slope is the finding: bytes for one more position, one more entry of the vocabulary, one more k.
From a base point (the first of each list of sizes) one size varies at a time; with `--grid` every
combination is measured. Hidden rows `[rows, D]` meet a head `[V, D]` without bias; the loss is the
mean over rows; the gradient is that of the hidden rows, in the kernels that end in `_trained` that
of the head's weight too. The providers:

* `palu`: the linear operator of `palu_kernels`; for the forget loss, with S given as indices,
  `palu sparse` and `palu dense` where the cost model chooses for `palu`.
* `eager`: logits by `torch.nn.functional.linear`, then the formula as one writes it for speed
  (`providers.plain_loss`), under autograd. `compile`: the same under `torch.compile`.
* `products`: no loss. The matrix products that eager cannot avoid, into new memory: the logits (for
  a KL the reference's too) and, with the logits in the place of their gradient, the gradients.
* `torch`, `torch chunked`: `torch.nn.functional.linear_cross_entropy` without and with
  `LinearCrossEntropyOptions()`.
* `liger`, `cce`, `fla`: liger-kernel, cut-cross-entropy, flash-linear-attention.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import declare, providers, runner
from benchmarks.declare import Call, Case, Provider
from benchmarks.providers import differentiated, normal
from palu_kernels import (
    LMHead,
    linear_cross_entropy_loss,
    linear_kl_loss,
    linear_local_entropy_loss,
)

FORGET = "linear_flatten"
TRAINED = "_trained"
SOFTCAP = 2.0  # of the order of the logits, so that a provider without it is found
# kernel -> the loss on logits, as `providers.py` names it
KERNELS = {
    FORGET: "flatten",
    "linear_kl_reverse": "kl_reverse",
    "linear_kl_forward": "kl_forward",
    "linear_kl_softcap": "kl_reverse",
    "linear_cross_entropy": "cross_entropy",
    "linear_cross_entropy_trained": "cross_entropy",
}
DEFAULT = tuple(KERNELS)
KERNELS |= {f"{FORGET}{TRAINED}": "flatten", f"linear_kl_reverse{TRAINED}": "kl_reverse"}


class Inputs(NamedTuple):
    hidden: Tensor  # [rows, D], a leaf that wants its gradient
    head: LMHead
    ref_hidden: Tensor  # [rows, D]
    indices: Tensor | None  # int64 [rows, k]
    labels: Tensor  # [rows]

    @property
    def leaves(self) -> dict[str, Tensor]:
        weight = {"weight_gradient": self.head.weight} if self.head.requires_grad else {}
        return {"gradient": self.hidden} | weight

    def exact(self) -> Callable[[Tensor], Inputs]:
        weight = self.head.weight.detach().double().requires_grad_(self.head.requires_grad)
        head = LMHead(weight, softcap=self.head.softcap)

        def piece(rows: Tensor) -> Inputs:
            hidden = self.hidden.detach()[rows].double().requires_grad_()
            indices = None if self.indices is None else self.indices[rows]
            return Inputs(hidden, head, self.ref_hidden[rows].double(), indices, self.labels[rows])

        return piece


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
        indices = torch.cat(parts).sort(dim=-1).values
    weight.requires_grad_(case.kernel.endswith(TRAINED))
    return Inputs(hidden.requires_grad_(), head, ref_hidden, indices, labels)


def palu(case: Case, given: Inputs, implementation: str = "auto") -> Tensor:
    hidden, head, ref_hidden, indices, labels = given
    if head.requires_grad:
        # A head keeps the mean row of its weight; of one that trains it is taken anew every step.
        head = LMHead(head.weight, softcap=head.softcap)
    if case.kernel.startswith(FORGET):
        options = {"top_k": case.k, "indices": indices, "implementation": implementation}
        return linear_local_entropy_loss(hidden, head, **options)
    if case.kernel.startswith("linear_kl"):
        direction = KERNELS[case.kernel].removeprefix("kl_")
        return linear_kl_loss(hidden, head, ref_hidden, head.detach(), direction=direction)
    return linear_cross_entropy_loss(hidden, head, labels)


def eager(case: Case, given: Inputs) -> Tensor:
    return providers.plain_loss(KERNELS[case.kernel], **_operands(case, given))


def definition(case: Case, given: Inputs) -> Tensor:
    return providers.row_losses(KERNELS[case.kernel], **_operands(case, given)).mean()


def _operands(case: Case, given: Inputs) -> dict[str, Tensor | int | None]:
    softcap, ref_logits = given.head.softcap, None

    def logits(hidden: Tensor, weight: Tensor) -> Tensor:
        z = F.linear(hidden, weight)
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    if case.kernel.startswith("linear_kl"):
        ref_logits = logits(given.ref_hidden, given.head.weight.detach())
    own = {"logits": logits(given.hidden, given.head.weight), "ref_logits": ref_logits}
    return own | {"k": case.k, "indices": given.indices, "labels": given.labels}


def products(case: Case, given: Inputs) -> Call:
    hidden, weight = given.hidden.detach(), given.head.weight.detach()

    def run() -> None:
        logits = hidden @ weight.t()
        if case.kernel.startswith("linear_kl"):
            given.ref_hidden @ weight.t()
        logits @ weight
        if case.kernel.endswith(TRAINED):
            logits.t() @ hidden

    return Call(run)


def providers_of(kernel: str) -> dict[str, Provider | str]:
    own = providers.own_providers(palu, eager)
    if kernel.startswith(FORGET):
        for name in ("sparse", "dense"):
            loss = partial(palu, implementation=name)
            own[f"palu {name}"] = Provider(partial(differentiated, loss))
    order = sorted(own, key=lambda name: not name.startswith("palu"))
    peers = providers.peers_of(kernel, providers.ON_HIDDEN)
    return {name: own[name] for name in order} | {"products": Provider(products)} | peers


def add_options(parser: argparse.ArgumentParser) -> None:
    sizes = {
        # up to more logits than a buffer of the linear operators holds
        "rows": [256, 64, 1024, 4096],
        "vocab": [64000, 16000, 256000],
        "top-k": [100, 1, 1000, 10000],
    }
    for name, values in sizes.items():
        several = {"nargs": "+", "type": runner.positive, "default": values}
        parser.add_argument(f"--{name}", **several, help="the base point first")
    parser.add_argument("--hidden", type=runner.positive, default=256, help="D")
    parser.add_argument("--grid", action="store_true", help="every combination of sizes")


def cases(given: argparse.Namespace) -> list[Case]:
    result = []
    for kernel, dtype in product(KERNELS, given.dtype):
        ks = given.top_k if kernel.startswith(FORGET) else [None]
        base = Case(kernel, given.vocab[0], given.hidden, given.rows[0], ks[0], dtype)
        if given.grid:
            result += [
                base._replace(V=V, rows=rows, k=k)
                for V, rows, k in product(given.vocab, given.rows, ks)
            ]
            continue
        result += [base._replace(rows=rows) for rows in sorted(given.rows)]
        result += [base._replace(V=V) for V in sorted(given.vocab)]
        result += [base._replace(k=k) for k in sorted(ks)] if ks[0] else []
    return [case for case in result if case.k is None or case.k <= case.V]


BENCHMARK = declare.Benchmark(
    name="bench_linear",
    description=__doc__,
    kernels={kernel: providers_of(kernel) for kernel in KERNELS},
    add_options=add_options,
    cases=cases,
    inputs=make_inputs,
    truth=partial(providers.float64_truth, definition),
    dtypes=("bfloat16",),
    repeats=2,
    calls=3,
    csv="scaling.csv",
    default_kernels=DEFAULT,
)


def main(arguments: Sequence[str] | None = None) -> int:
    return runner.main(BENCHMARK, arguments)


if __name__ == "__main__":
    sys.exit(main())

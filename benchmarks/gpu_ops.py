"""The operators of ``gpu_cases.py`` by every provider, and the process that measures them.

Providers: ``palu`` is this library's public operator; ``eager`` are the formulas of
``palu_kernels/reference.py`` as one writes them in PyTorch, differentiated by autograd: bfloat16
logits are made float32 first, S comes from ``torch.topk`` (which takes any of equal entries), and
nothing is done for masked entries and NaNs (``reference.py`` itself takes more passes for them).
``sort`` is the definition of top-k, a stable sort.

Every provider's result is compared with ``reference.py`` in float64 before it is timed: the
gradients of all rows, the loss and the head's gradient where rows are few, else of three rows.
"""

from __future__ import annotations

import faulthandler
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import runner as harness
from benchmarks.gpu_cases import Case
from benchmarks.gpu_timing import rates, times
from benchmarks.tables import quantiles
from palu_kernels import (
    LMHead,
    cross_entropy_loss,
    kl_loss,
    linear_cross_entropy_loss,
    linear_kl_loss,
    linear_local_entropy_loss,
    local_entropy_loss,
    reference,
    topk_indices,
)

SECONDS, TINY_SECONDS = 0.25, 0.01  # of timed calls, a measurement
STUCK = 60  # seconds after which a measurement is given up, with its process
DEVICE_LOST = 3  # exit status: reported, but nothing can run here any more
ALL_ROWS = 256  # so many rows are compared with the truth, or three of them


class Inputs(NamedTuple):
    """``current`` wants its gradient, and so does the head's weight if the head trains."""

    current: Tensor  # logits [N, V], or hidden rows [N, D]
    reference: Tensor  # the frozen reference's
    indices: Tensor  # int32 [N, k], unique along a row
    labels: Tensor  # int64 [N]
    head: LMHead | None  # of a linear case

    def leaves(self) -> list[Tensor]:
        trained = self.head is not None and self.head.requires_grad
        return [self.current, self.head.weight] if trained else [self.current]


def inputs_of(case: Case, device: torch.device) -> Inputs:
    """Random, bfloat16: logits with a standard deviation near 2, the reference's near enough for
    a KL of order one."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(size: float, *shape: int) -> Tensor:
        out = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return out.normal_(0, size, generator=generator)

    width = case.hidden or case.vocab
    size = 2 / (0.02 * case.hidden**0.5) if case.hidden else 2.0
    ref = normal(size, case.rows, width)
    current = normal(size / 2, case.rows, width).add_(ref)
    head = None
    if case.hidden:
        weight = normal(0.02, case.vocab, case.hidden)
        head = LMHead(weight.requires_grad_(case.head == "trained"))

    def integers(below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=generator, device=device)

    # one anywhere in each of k equal stretches of the vocabulary
    stretch = case.vocab // max(case.k, 1)
    starts = torch.arange(case.k, device=device) * stretch
    indices = (starts + integers(stretch, case.rows, case.k)).to(torch.int32)
    labels = integers(case.vocab, case.rows)
    return Inputs(current.requires_grad_(), ref, indices, labels, head)


# ---- providers: a case and its inputs -> the mean loss, or S -------------------------------------


def ours(case: Case, x: Inputs) -> Tensor:
    name, option = case.operator, case.option
    if name == "topk_indices":
        return topk_indices(x.reference, case.k)
    if name == "kl":
        return kl_loss(x.current, x.reference, direction=option)
    if name == "cross_entropy":
        return cross_entropy_loss(x.current, x.labels)
    # an LMHead keeps the mean row of its weight; of one that trains it is taken anew every step
    head = LMHead(x.head.weight) if case.head == "trained" else x.head
    if name == "linear_kl":
        return linear_kl_loss(x.current, head, x.reference, head.detach(), direction=option)
    if name == "linear_cross_entropy":
        return linear_cross_entropy_loss(x.current, head, x.labels)
    if name == "linear_flatten":
        return linear_local_entropy_loss(
            x.current, head, top_k=case.k, indices=x.indices, implementation=option
        )
    chooser = {"reference": {"ref_logits": x.reference}, "indices": {"indices": x.indices}}
    return local_entropy_loss(x.current, top_k=case.k, objective=name, **chooser.get(option, {}))


def eager(case: Case, x: Inputs) -> Tensor:
    if case.operator == "topk_indices":
        return x.reference.topk(case.k).indices
    z = x.head.logits(x.current) if case.hidden else x.current
    if case.operator.endswith("cross_entropy"):
        return F.cross_entropy(z.float(), x.labels)
    if case.operator.endswith("kl"):
        r = x.head.detach().logits(x.reference) if case.hidden else x.reference
        log_p, log_q = z.float().log_softmax(-1), r.float().log_softmax(-1)
        a, b = (log_p, log_q) if case.option == "reverse" else (log_q, log_p)
        return (a.exp() * (a - b)).sum(-1).mean()
    if case.option in ("reference", "current"):
        chooser = x.reference if case.option == "reference" else z.detach()
        chosen = chooser.topk(case.k).indices
    else:
        chosen = x.indices.long()
    z = z.float()
    z_s = z.gather(-1, chosen)
    if case.operator == "entropy":
        log_q = z_s.log_softmax(-1)
        return (math.log(case.k) + (log_q.exp() * log_q).sum(-1)).mean()
    return (z_s - z.mean(-1, keepdim=True)).square().mean(-1).mean()


def by_sort(case: Case, x: Inputs) -> Tensor:
    return reference.topk_indices(x.reference, case.k)


PROVIDERS: dict[str, Callable[[Case, Inputs], Tensor]] = {
    "palu": ours,
    "eager": eager,
    "sort": by_sort,
}


def providers(case: Case) -> list[str]:
    """Those that compute a case; what `eager` is for a sparse case it is for the dense one."""
    if case.operator == "topk_indices":
        return ["palu", "eager", "sort"]
    return ["palu"] if case.option == "sparse" else ["palu", "eager"]


def caller(case: Case, provider: str, x: Inputs) -> Callable[[], Tensor]:
    """Forward, plus backward where there is one; the leaves' ``grad`` is then the gradient."""

    def call() -> Tensor:
        for leaf in x.leaves():
            leaf.grad = None
        out = PROVIDERS[provider](case, x)
        if out.requires_grad:
            out.backward()
        return out.detach()

    return call


# ---- the truth -----------------------------------------------------------------------------------


def error(case: Case, x: Inputs, out: Tensor) -> float:
    """How far the result of a call is from float64: the largest relative norm of a difference, or
    for S the share of wrong indices."""
    every = case.rows <= ALL_ROWS
    picks = list(range(case.rows)) if every else [0, case.rows // 2, case.rows - 1]
    if case.operator == "topk_indices":
        right = reference.topk_indices(x.reference[picks], case.k)
        return float((out[picks].sort(-1).values != right).double().mean())
    current = x.current.detach()[picks].double().requires_grad_()
    weight = None if x.head is None else x.head.weight.detach().double()
    trained = every and case.head == "trained"
    if trained:
        weight.requires_grad_()
    truth = definition(case, x, picks, current, weight).sum() / case.rows
    truth.backward()
    pairs = [(x.current.grad[picks], current.grad)]
    if every:
        pairs.append((out, truth.detach()))
    if trained:
        pairs.append((x.head.weight.grad, weight.grad))
    return max(float((found.double() - right).norm() / right.norm()) for found, right in pairs)


def definition(
    case: Case, x: Inputs, picks: list[int], current: Tensor, weight: Tensor | None
) -> Tensor:
    """Losses of the rows ``picks`` in float64."""
    ref = x.reference[picks].double()
    z = current
    if weight is not None:
        z = reference.head_logits(current, weight)
        ref = reference.head_logits(ref, weight.detach())
    if case.operator.endswith("cross_entropy"):
        return reference.cross_entropy_loss(z, x.labels[picks])
    if case.operator.endswith("kl"):
        return reference.kl_loss(z, ref, direction=case.option)
    return reference.local_entropy_loss(
        z,
        ref if case.option == "reference" else None,
        top_k=case.k,
        indices=None if case.option in ("reference", "current") else x.indices[picks],
        objective=case.operator.removeprefix("linear_"),
    )


# ---- measuring -----------------------------------------------------------------------------------


def measure(
    case: Case, provider: str, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """Rows of error, peak memory over what was there before (its gradients included), and time."""
    x = inputs_of(case, device)
    call = caller(case, provider, x)
    out = call()
    off = error(case, x, out)
    del out
    for leaf in x.leaves():
        leaf.grad = None
    with harness.PeakMemory(device) as peak:
        call()
    taken = times(call, device, seconds)
    return [
        {"metric": "error", "p50": off},
        {"metric": "peak MiB", "p50": peak.extra / 2**20},
        {"metric": "ms", **quantiles([1e3 * s for s in taken.device])},
        {"metric": "host ms", **quantiles([1e3 * s for s in taken.host])},
    ]


def work(task: dict[str, Any]) -> None:
    """Prints, a JSON line each, the place of a measurement in the list and its rows; begins none
    after ``task["seconds"]``."""
    start, device = time.monotonic(), torch.device(task["device"])
    if task["measurements"] == "rates":
        print(json.dumps([0, rates(device, task["tiny"])]), flush=True)
        return
    seconds = TINY_SECONDS if task["tiny"] else SECONDS
    for number, (case, provider) in enumerate(task["measurements"]):
        if time.monotonic() - start > task["seconds"]:
            return
        faulthandler.dump_traceback_later(STUCK, exit=True)
        try:
            rows = measure(Case(*case), provider, device, seconds)
        except Exception as failure:  # whatever it is, the others have their turn
            said = str(failure).strip().splitlines() or [""]
            rows = [{"metric": "ms", "status": f"{type(failure).__name__}: {said[0]}"[:300]}]
        print(json.dumps([number, rows]), flush=True)
        if device.type != "cpu":
            _go_on(device)
    faulthandler.cancel_dump_traceback_later()


def _go_on(device: torch.device) -> None:
    """Gives memory back; where a kernel has broken the device's context, ends this process."""
    try:
        torch.accelerator.synchronize(device)
        torch.accelerator.empty_cache()
    except RuntimeError as failure:
        print(failure, file=sys.stderr)
        sys.exit(DEVICE_LOST)


if __name__ == "__main__":
    work(harness.worker_task(None))

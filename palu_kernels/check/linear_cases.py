"""The linear operators against their float64 definition, for `check`.

The reference's logits are small integers, so that every dtype chooses the same S, ties included.
What is compared is the loss of every row and the gradients of hidden rows, weight and bias, by the
rule of `check` for norms (an entry of a product may cancel to nothing, so that its own size
says little). Spoiled cases have rows that are not finite among enough others to fill several tiles
of a product: those must not be finite in the result either, and all others right.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from palu_kernels import reference
from palu_kernels.backend import accum_dtype
from palu_kernels.linear import functional
from palu_kernels.linear.head import LMHead

OPERATORS = (
    ("linear_kl", "reverse"),
    ("linear_kl", "forward"),
    ("linear_cross_entropy", ""),
    ("linear_flatten", "global_mean"),
    ("linear_flatten", "local_mean"),
    ("linear_entropy", ""),
)
NAN, INFINITE, REF_NAN = 1, 20, 34  # the rows of a spoiled case that are so
HEADS = {"plain": (False, 1.0, None), "scaled": (True, -0.5, None), "capped": (True, 2.0, 5.0)}


@dataclass(frozen=True)
class LinearCase:
    """A linear operator with its option, on a kind of head."""

    operator: str
    option: str
    dtype: torch.dtype
    head: str
    implementation: str = "dense"
    rows: int = 5
    columns: int = 257
    width: int = 48
    k: int = 50
    spoiled: bool = False  # whether some rows are not finite

    def __str__(self) -> str:
        name = " ".join(part for part in (self.operator, self.option) if part)
        dtype = str(self.dtype).removeprefix("torch.")
        kind = "" if self.implementation == "dense" else f" {self.implementation}"
        kind += " spoiled rows" if self.spoiled else ""
        return f"{name} {dtype} V={self.columns} D={self.width} {self.head} head{kind}"


def linear_cases(dtypes: tuple[torch.dtype, ...]) -> Iterator[LinearCase]:
    """Every operator, dtype and kind of head; sparse too where it can serve."""
    for operator, option in OPERATORS:
        for dtype in dtypes:
            for head in HEADS:
                case = LinearCase(operator, option, dtype, head)
                forget = operator in ("linear_flatten", "linear_entropy")
                kinds = [case]
                if forget and not (option == "global_mean" and head == "capped"):
                    kinds.append(replace(case, implementation="sparse"))
                for kind in kinds:
                    yield kind
                    if head == "plain":
                        yield replace(kind, rows=40, k=9, spoiled=True)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, as it may at any time: what reads it shows."""
    mode, fill = torch.get_deterministic_debug_mode(), torch.utils.deterministic
    before = fill.fill_uninitialized_memory
    with warnings.catch_warnings():
        # only to warn: a product of CUDA's is no error here
        warnings.filterwarnings("ignore", message=".*deterministic")
        try:
            torch.use_deterministic_algorithms(True, warn_only=True)
            fill.fill_uninitialized_memory = True
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
            fill.fill_uninitialized_memory = before


def inputs_of(case: LinearCase, device: torch.device) -> dict[str, Tensor | None]:
    """Hidden rows and a head that trains, a frozen reference of both, labels: the same every
    time."""
    generator = torch.Generator().manual_seed(sum(map(ord, str(case))))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    has_bias = HEADS[case.head][0]
    made = {
        "hidden": normal(case.rows, case.width),
        "weight": normal(case.columns, case.width) * 3 / case.width**0.5,
        "bias": normal(case.columns) if has_bias else None,
        "ref_hidden": normal(case.rows, case.width).sign(),
        "ref_weight": (normal(case.columns, case.width) / 2).round().clamp(-1, 1),
        "ref_bias": normal(case.columns).round() if has_bias else None,
    }
    if case.spoiled:
        made["hidden"][NAN] = torch.nan
        made["hidden"][INFINITE, 7] = torch.inf
        made["ref_hidden"][REF_NAN] = torch.nan
    made = {k: None if t is None else t.to(device, case.dtype) for k, t in made.items()}
    labels = torch.randint(0, case.columns, (case.rows,), generator=generator)
    labels[0] = -100
    return made | {"labels": labels.to(device)}


def ours(case: LinearCase, made: dict[str, Tensor | None], backend: str) -> Tensor:
    """Row losses by the public operator."""
    _, scale, softcap = HEADS[case.head]
    head = LMHead(made["weight"], made["bias"], scale, softcap)
    frozen = made["ref_hidden"], LMHead(made["ref_weight"], made["ref_bias"], scale, softcap)
    options = {"reduction": "none", "backend": backend}
    if case.operator == "linear_kl":
        options["direction"] = case.option
        return functional.linear_kl_loss(made["hidden"], head, *frozen, **options)
    if case.operator == "linear_cross_entropy":
        return functional.linear_cross_entropy_loss(made["hidden"], head, made["labels"], **options)
    return functional.linear_local_entropy_loss(
        made["hidden"],
        head,
        *frozen,
        top_k=case.k,
        objective=case.operator.removeprefix("linear_"),
        center=case.option or "global_mean",
        implementation=case.implementation,
        **options,
    )


def definition(case: LinearCase, made: dict[str, Tensor | None], dtype: torch.dtype) -> Tensor:
    """Row losses by `reference.py` on logits in `dtype`."""
    _, scale, softcap = HEADS[case.head]
    frozen = [None if made[k] is None else made[k].to(dtype) for k in FROZEN]
    z = head_logits(made["hidden"], made["weight"], made["bias"], scale, softcap)
    if case.operator == "linear_cross_entropy":
        return reference.cross_entropy_loss(z, made["labels"])
    if case.operator == "linear_kl":
        r = head_logits(*frozen, scale, softcap)
        return reference.kl_loss(z, r, direction=case.option)
    # before the cap, which only makes more ties
    exact = [None if made[k] is None else made[k].double() for k in FROZEN]
    s = reference.topk_indices(reference.head_logits(*exact, scale), case.k)
    return reference.local_entropy_loss(
        z,
        top_k=case.k,
        indices=s,
        objective=case.operator.removeprefix("linear_"),
        center=case.option or "global_mean",
    )


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """`reference.head_logits`, its products as a half-precision one rounds, but in float32:
    PyTorch's own may be what is wrong here (`layout.READ`)."""
    work = accum_dtype(hidden.dtype)
    wide = (None if t is None else t.to(work) for t in (hidden, weight, bias))
    logits = F.linear(*wide).to(hidden.dtype) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


FROZEN = ("ref_hidden", "ref_weight", "ref_bias")
TRAINED = ("hidden", "weight", "bias")


def results(
    loss: Callable[[dict[str, Tensor | None]], Tensor],
    made: dict[str, Tensor | None],
    weights: Tensor,
) -> dict[str, Tensor]:
    """-> loss of every row and the gradients of their weighted sum, all in float64."""
    leaves = {k: made[k].detach().requires_grad_() for k in TRAINED if made[k] is not None}
    rows = loss(made | leaves)
    grads = torch.autograd.grad((rows * weights.to(rows.dtype)).sum(), list(leaves.values()))
    found = {"loss": rows.detach().double()}
    return found | {f"d {k}": g.double() for k, g in zip(leaves, grads, strict=True)}


def compare_linear(
    case: LinearCase,
    device: torch.device,
    backend: str,
    caps: dict[torch.dtype, float],
    floor: float,
) -> list[tuple[str, float, float]]:
    """-> (what, error, allowed) for the loss and every gradient, relative norms."""
    made = inputs_of(case, device)
    generator = torch.Generator().manual_seed(1)
    weights = (torch.rand(case.rows, generator=generator) - 0.3).to(device)
    exact = {
        k: t.double() if t is not None and t.is_floating_point() else t for k, t in made.items()
    }
    truth = results(lambda m: definition(case, m, torch.float64), exact, weights)
    plain = results(lambda m: definition(case, m, case.dtype), made, weights)
    with poisoned():
        found = results(lambda m: ours(case, m, backend), made, weights)
    cuts = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    extra = torch.finfo(case.dtype).eps if cuts and case.dtype == torch.bfloat16 else 0.0
    out = []
    if case.spoiled:
        lost = [NAN] if case.operator == "linear_cross_entropy" else [NAN, REF_NAN]
        for what in ("loss", "d hidden"):
            spared = found[what][lost].reshape(len(lost), -1).isfinite().all(-1).sum().item()
            out.append((f"{what[-6:]} NaN", float(spared), 0.5))
        # an infinite row may be all masked, or not; the head's gradient is lost with any row
        kept = [row for row in range(case.rows) if row not in (*lost, INFINITE)]
        truth = {what: truth[what][kept] for what in ("loss", "d hidden")}
        plain, found = ({what: t[what][kept] for what in truth} for t in (plain, found))
    for what, right in truth.items():
        norm = right.norm().item() or 1.0
        allowed = 2 * (plain[what] - right).norm().item() / norm + floor + extra
        error = (found[what] - right).norm().item() / norm
        out.append((what, error, min(allowed, caps[case.dtype] + extra)))
    return out

"""Compare compiled loops with the definition, on a few rows that are hard to get right."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from palu_kernels import reference

COLUMNS, K, CAP = 1301, 37, 4.0  # more than a block of the loops, and no whole number of anything
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def differences(loops: Callable) -> list[str]:
    """Return the names of operators, with dtypes, that are wrong."""
    return [name for name, right in _comparisons(loops) if not right]


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Return float32 logits and reference `[12, COLUMNS]`, and labels."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(12, COLUMNS, generator=generator) * 2
    r = z + torch.randn(12, COLUMNS, generator=generator)
    z[1], r[1] = z[1].round(), r[1].round()  # ties
    z[2, ::3] = r[2, ::3] = -torch.inf
    z[3, 700] = torch.nan
    z[4], r[4] = 300 + 100 * z[4], 100 * r[4]
    z[5, 1200], r[5, 1200] = -200, -torch.inf  # +inf, though p is 0 there
    r[6] = -torch.inf
    r[7, 5] = torch.nan
    z[8, 1100] = torch.inf
    z[9, :1100], r[9, :1100] = -60000, -30000  # masks that are finite, longer than a block
    z[10], r[10, 5] = -torch.inf, torch.nan
    z[11, 5], r[11] = torch.nan, -torch.inf
    labels = torch.arange(12) * 100
    labels[1] = -100
    return z, r, labels


def _comparisons(loops: Callable) -> Iterator[tuple[str, bool]]:
    for dtype, bound in BOUNDS.items():
        for cap in (0.0, CAP):
            z, r, labels = rows()
            if cap:  # a cap takes what is not finite to a number
                z, r = (t.nan_to_num(0.0, 9.0, -9.0) for t in (z, r))
            z, r = z.to(dtype), r.to(dtype)
            for name, (kind, values, loss, gradient) in _operators(z, r, labels, cap).items():
                values = {"logits": z, "softcap": cap, **values}
                right = _agrees(loops, kind, values, loss, gradient, bound)
                yield f"{name} {str(dtype)[6:]}", right
            if not cap:
                chosen = torch.empty(len(z), K, dtype=torch.int32)
                loops("topk", logits=r, chosen=chosen, k=K)
                yield f"top-k {str(dtype)[6:]}", torch.equal(chosen, reference.topk_indices(r, K))
    indices = torch.stack([torch.arange(K) * 35 + i for i in range(4)])
    indices[1, -1], indices[2, 3], indices[3, 5] = indices[1, 0], -1, COLUMNS
    bad = torch.empty(4, dtype=torch.int32)
    for values in (indices, indices.int()):
        loops("indices", indices=values, bad=bad, rows=4, columns=COLUMNS, k=K)
        yield "indices", bad.bool().tolist() == [False, True, True, True]


def _operators(z: Tensor, r: Tensor, labels: Tensor, cap: float) -> dict[str, tuple]:
    """Return of each operator: kind, arguments, losses and gradient by definition."""

    def under(t: Tensor) -> Tensor:
        t = t.double()
        return cap * torch.tanh(t / cap) if cap else t

    slope = 1 - torch.tanh(z.double() / cap).square() if cap else 1
    work, frozen, ones = under(z), under(r), torch.ones(len(z), dtype=torch.float64)
    made = {
        "cross-entropy": (
            "cross_entropy",
            {"labels": labels, "ignore_index": -100},
            reference.cross_entropy_loss(work, labels),
            reference.cross_entropy_gradient(work, labels, ones) * slope,
        )
    }
    for number, direction in enumerate(("reverse", "forward")):
        made[f"{direction} KL"] = (
            "kl",
            {"ref_logits": r, "ref_softcap": cap, "forward_kl": number},
            reference.kl_loss(work, frozen, direction=direction),
            reference.kl_gradient(work, frozen, ones, direction=direction) * slope,
        )
    chosen = reference.topk_indices(r, K)
    spoiled = work * torch.where(r.isnan().any(-1, keepdim=True), torch.nan, 1.0)
    for number, center in enumerate(("global_mean", "local_mean", 0.5, None)):
        options = {
            "top_k": K,
            "indices": chosen,
            "objective": "entropy" if center is None else "flatten",
            "center": center,
        }
        made[f"{options['objective']} {center or ''}"] = (
            "local_entropy",
            {"ref_logits": r, "k": K, "objective": number, "center": 0.5},
            reference.local_entropy_loss(spoiled, **options),
            reference.local_entropy_gradient(spoiled, None, ones, **options) * slope,
        )
    return made


def _agrees(
    loops: Callable, kind: str, values: dict, loss: Tensor, gradient: Tensor, bound: float
) -> bool:
    """Whether loss and gradient are right, made in two steps and in one over the logits."""
    losses, state = torch.empty(len(loss)), torch.zeros(len(loss), 4)
    chosen = torch.empty(len(loss), K, dtype=torch.int32)
    grad, in_place = torch.empty_like(values["logits"]), values["logits"].clone()
    loops(kind, **values, losses=losses, state=state, chosen=chosen)
    again = torch.empty_like(losses)
    loops(kind, **(values | {"logits": in_place}), losses=again, grad=in_place)
    if kind == "local_entropy":
        values = values | {"indices": chosen}
    weights = torch.full_like(losses, 0.5)
    loops(kind, **values, state=state, grad=grad, weights=weights)
    return (
        _close(losses, loss, BOUNDS[torch.float32])
        and _close(again, loss, BOUNDS[torch.float32])
        and _close(grad, gradient / 2, bound)
        and _close(in_place, gradient, bound)
    )


def _close(found: Tensor, right: Tensor, bound: float) -> bool:
    found, finite = found.double(), right.isfinite()
    losses = found.dim() == 1  # of which +inf and NaN are told apart
    if not torch.equal(found.isfinite(), finite) or (
        losses and not torch.equal(found.isnan(), right.isnan())
    ):
        return False
    error, right = (torch.where(finite, t, 0) for t in (found - right, right))
    if losses:
        return bool((error.abs() <= bound * (right.abs() + 1)).all())
    return bool((error.norm(dim=-1) <= bound * right.norm(dim=-1) + 1e-6).all())

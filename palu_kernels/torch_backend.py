"""The row losses in PyTorch, a few rows at a time: what serves the operators and the chunk loop
where Triton does not.

A tile of rows fits the cache, and its temporaries are all that is held beside the logits. The
formulas are those of `reference.py`; a tile whose losses are not finite (masked entries, NaN) is
done again by `reference.py` itself.

`grad` is where the gradient goes, which may be the logits themselves; None: none is made.
`weights [N]` of the rows go into it (None: 1 each), never into the losses that are returned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from palu_kernels import reference
from palu_kernels.backend import accum_dtype

TILE_ENTRIES = 2**19  # of a tile: 2 MB in float32


def tiles(logits: Tensor) -> Iterator[slice]:
    rows, columns = logits.shape
    step = max(1, TILE_ENTRIES // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def capped(x: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """-> logits in the dtype they are worked in, under the cap, and the cap's slope (None: 1)."""
    z = x.to(accum_dtype(x.dtype))
    if softcap is None:
        return z, None
    share = torch.tanh(z / softcap)
    return share * softcap, 1 - share.square()


def store(out: Tensor, grad: Tensor, slope: Tensor | None, weights: Tensor | None) -> None:
    """Writes a tile's gradient; `grad` is no longer needed."""
    if slope is not None:
        grad = grad.mul_(slope)
    if weights is None:
        out.copy_(grad)
    else:
        torch.mul(grad, weights[:, None], out=out)


def topk_indices(scores: Tensor, k: int) -> Tensor:
    """`reference.topk_indices` without a sort of the whole row."""
    rows, columns = scores.shape
    if k >= columns:
        return torch.arange(columns, dtype=torch.int32, device=scores.device).repeat(rows, 1)
    out = scores.new_empty((rows, k), dtype=torch.int32)
    for tile in tiles(scores):
        row = scores[tile]
        top = row.topk(k, sorted=False)
        threshold = top.values.amin(-1, keepdim=True)
        if bool(top.values.isnan().any()):
            out[tile] = reference.topk_indices(row, k)  # a NaN compares with nothing
            continue
        # topk takes any of the entries that equal the smallest it takes: replace them by the first
        taken = top.values == threshold
        need = taken.sum(-1)
        tie_row, tie_column = (row == threshold).nonzero(as_tuple=True)
        ties = torch.bincount(tie_row, minlength=row.shape[0])
        rank = torch.arange(tie_row.shape[0], device=row.device) - (ties.cumsum(0) - ties)[tie_row]
        chosen = top.indices.masked_scatter(taken, tie_column[rank < need[tie_row]])
        out[tile] = chosen.sort(-1).values
    return out


def local_entropy(
    logits: Tensor,
    ref_logits: Tensor | None,
    indices: Tensor | None,
    top_k: int,
    objective: str,
    center: str | float,
    softcap: float | None = None,
    grad: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    losses = logits.new_empty(logits.shape[0], dtype=accum_dtype(logits.dtype))
    for tile in tiles(logits):
        x, w = logits[tile], None if weights is None else weights[tile]
        z, slope = capped(x, softcap)
        if indices is not None:
            s = indices[tile].long()
        else:
            scores = x if ref_logits is None else ref_logits[tile]
            s = topk_indices(scores, top_k).long()
            has_nan = scores.gather(-1, s).isnan().any(-1, keepdim=True)
            z = torch.where(has_nan, torch.nan, z) if bool(has_nan.any()) else z
        total, z_s = z.sum(-1, keepdim=True), z.gather(-1, s)
        off_s = torch.zeros_like(total)
        if objective == "flatten":
            # (2/k) * ([j in S](z_j - c) - (1/V) * sum_S(z_i - c))
            if center == "global_mean":  # in two numbers, as reference.mean_in_two
                near = total / z.shape[1]
                deviation = (z_s - near) - (z - near).mean(-1, keepdim=True)
            elif center == "local_mean":
                deviation = z_s - z_s.mean(-1, keepdim=True)
                deviation -= deviation.mean(-1, keepdim=True)
            else:
                deviation = z_s - center
            rows = deviation.square().mean(-1)
            on_s = deviation * (2 / z_s.shape[1])
            if center == "global_mean":
                off_s = -on_s.sum(-1, keepdim=True) / z.shape[1]
        else:
            # q_j (log q_j + H) on S
            log_q = z_s.log_softmax(-1)
            q = log_q.exp()
            negative_entropy = (q * log_q).sum(-1, keepdim=True)
            rows = math.log(z_s.shape[1]) + negative_entropy[:, 0]
            on_s = q * (log_q - negative_entropy)
        if bool((rows + total[:, 0]).isfinite().all()):
            losses[tile] = rows
            if grad is not None and slope is None:
                on_s += off_s
                if w is not None:
                    on_s, off_s = on_s * w[:, None], off_s * w[:, None]
                grad[tile] = off_s
                grad[tile].scatter_(-1, s, on_s.to(grad.dtype))
            elif grad is not None:
                store(grad[tile], off_s.expand_as(z).scatter(-1, s, on_s + off_s), slope, w)
            continue
        options = {"top_k": top_k, "indices": s, "objective": objective, "center": center}
        losses[tile] = rows = reference.local_entropy_loss(z, None, **options)
        if grad is not None:
            ones = torch.ones_like(rows)
            right = reference.local_entropy_gradient(z, None, ones, **options)
            store(grad[tile], right, slope, w)
    return losses


def kl(
    logits: Tensor,
    ref_logits: Tensor,
    direction: str,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    grad: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    losses = logits.new_empty(logits.shape[0], dtype=accum_dtype(logits.dtype))
    for tile in tiles(logits):
        z, slope = capped(logits[tile], softcap)
        r, _ = capped(ref_logits[tile], ref_softcap)
        log_p, log_q = z.log_softmax(-1), r.log_softmax(-1)
        reverse = direction == "reverse"
        # softmax again is faster than exp
        first, difference = (z, log_p.sub_(log_q)) if reverse else (r, log_q.sub_(log_p))
        del log_p, log_q
        p = first.softmax(-1)
        losses[tile] = rows = torch.linalg.vecdot(p, difference)
        right = bool(rows.isfinite().all())
        if not right:
            losses[tile] = reference.kl_loss(z, r, direction=direction)
        if grad is None:
            continue
        w = None if weights is None else weights[tile]
        if not right:
            ones = torch.ones_like(rows)
            store(grad[tile], reference.kl_gradient(z, r, ones, direction=direction), slope, w)
        elif reverse:
            store(grad[tile], difference.sub_(rows[:, None]).mul_(p), slope, w)
        else:
            store(grad[tile], z.softmax(-1).sub_(p), slope, w)
    return losses


def kl_backward(
    weights: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    losses: Tensor,
    direction: str,
    softcap: float | None,
    ref_softcap: float | None,
    grad: Tensor,
) -> None:
    """Write the gradient alone; `losses [N]` are those of `kl`."""
    for tile in tiles(logits):
        z, slope = capped(logits[tile], softcap)
        r, _ = capped(ref_logits[tile], ref_softcap)
        if not bool(losses[tile].isfinite().all()):
            ones = torch.ones_like(weights[tile])
            out = reference.kl_gradient(z, r, ones, direction=direction)
        elif direction == "reverse":
            # p_j ((z_j - r_j) - sum_i p_i (z_i - r_i)): the logarithms of the sums cancel
            p, difference = z.softmax(-1), z - r
            found = torch.linalg.vecdot(p, difference)
            out = difference.sub_(found[:, None]).mul_(p)
        else:
            out = z.softmax(-1).sub_(r.softmax(-1))
        store(grad[tile], out, slope, weights[tile])


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    softcap: float | None = None,
    grad: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    losses = logits.new_empty(logits.shape[0], dtype=accum_dtype(logits.dtype))
    for tile in tiles(logits):
        z, slope = capped(logits[tile], softcap)
        counted = labels[tile] != ignore_index
        target = torch.where(counted, labels[tile], 0).long()[:, None]
        log_p = z.log_softmax(-1)
        losses[tile] = torch.where(counted, -log_p.gather(-1, target)[:, 0], 0)
        del log_p
        if grad is not None:
            w = None if weights is None else weights[tile]
            _cross_entropy_gradient(z, target, counted, slope, w, grad[tile])
    return losses


def cross_entropy_backward(
    weights: Tensor,
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    softcap: float | None,
    grad: Tensor,
) -> None:
    """Write the gradient alone."""
    for tile in tiles(logits):
        z, slope = capped(logits[tile], softcap)
        counted = labels[tile] != ignore_index
        target = torch.where(counted, labels[tile], 0).long()[:, None]
        _cross_entropy_gradient(z, target, counted, slope, weights[tile], grad[tile])


def _cross_entropy_gradient(
    z: Tensor,
    target: Tensor,
    counted: Tensor,
    slope: Tensor | None,
    weights: Tensor | None,
    grad: Tensor,
) -> None:
    """softmax(z) - onehot(label)"""
    out = z.softmax(-1)
    out.scatter_add_(-1, target, torch.full_like(out[:, :1], -1.0))
    if not bool(counted.all()):
        out.masked_fill_(~counted[:, None], 0)
    store(grad, out, slope, weights)

"""The row losses in PyTorch, a few rows at a time: what serves the operators and the chunk loop
where Triton does not.

A tile of rows fits the cache, and its temporaries are all that is held beside the logits. The
formulas are those of `reference.py`; a tile whose losses are not finite (masked entries, NaN) is
done again by `reference.py` itself.

`grad` is where the gradient goes, which may be the logits themselves; None: none is made.
`weights [N]` of the rows go into it (None: 1 each), never into the losses that are returned.

Where a C compiler is found, `cpu/` computes the same in fused loops. Its forward leaves in `state`
what its backward reads; a backward goes the way its forward went.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from palu_kernels import cpu, reference, validation
from palu_kernels.backend import accum_dtype

TILE_ENTRIES = 2**19  # of a tile: 2 MB in float32
SEGMENTS = 16  # entries whose maximum is looked at first where the largest are sought


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


def loops_that_made(state: Tensor, *tensors: Tensor) -> cpu.Loops | None:
    """Return the compiled loops where they take these rows and also made `state [N, 4]`, whose last
    column nobody else sets: what a backward reads."""
    return cpu.loops_for(*tensors) if len(state) and float(state[0, 3]) else None


def topk_indices(scores: Tensor, k: int) -> Tensor:
    """`reference.topk_indices` without a sort of the whole row."""
    rows, columns = scores.shape
    out = scores.new_empty((rows, min(k, columns)), dtype=torch.int32)
    if loops := cpu.loops_for(scores):
        loops("topk", logits=scores, chosen=out, k=out.shape[1])
        return out
    if k >= columns:
        return out.copy_(torch.arange(columns, device=scores.device))
    for tile in tiles(scores):
        out[tile] = _chosen(scores[tile], k)
    return out


def _chosen(row: Tensor, k: int) -> Tensor:
    """Of a tile, int64 `[n, k]`."""
    length = row.shape[1] // SEGMENTS
    if 4 * k > length:
        return _chosen_of_all(row, k)
    # the k-th largest of the maxima of segments is no larger than the k-th largest entry
    strided = row[:, : SEGMENTS * length].unflatten(-1, (SEGMENTS, length))
    maxima = torch.cat([strided.amax(1), row[:, SEGMENTS * length :]], 1)
    bound = maxima.topk(k, sorted=False).values.amin(-1, keepdim=True)
    if bool(maxima.isnan().any()):
        return reference.topk_indices(row, k)  # a NaN compares with nothing
    numbers, columns = (row >= bound).nonzero(as_tuple=True)
    counts = torch.bincount(numbers, minlength=len(row))
    place = torch.arange(len(numbers), device=row.device) - (counts.cumsum(0) - counts)[numbers]
    # shorter rows end with their first column, behind those that count
    candidates = columns.new_zeros((len(row), int(counts.max())))
    candidates[numbers, place] = columns
    values = row.gather(-1, candidates)
    filled = torch.arange(candidates.shape[1], device=row.device) < counts[:, None]
    values = values.masked_fill_(~filled, -math.inf)
    return candidates.gather(-1, _chosen_of_all(values, k))


def _chosen_of_all(row: Tensor, k: int) -> Tensor:
    top = row.topk(k, sorted=False)
    threshold = top.values.amin(-1, keepdim=True)
    if bool(top.values.isnan().any()):
        return reference.topk_indices(row, k).long()  # a NaN compares with nothing
    # topk takes any of the entries that equal the smallest it takes: replace them by the first
    taken = top.values == threshold
    need = taken.sum(-1)
    tie_row, tie_column = (row == threshold).nonzero(as_tuple=True)
    ties = torch.bincount(tie_row, minlength=row.shape[0])
    rank = torch.arange(tie_row.shape[0], device=row.device) - (ties.cumsum(0) - ties)[tie_row]
    chosen = top.indices.masked_scatter(taken, tie_column[rank < need[tie_row]])
    return chosen.sort(-1).values


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
    state: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """`kept` int32 `[N, min(top_k, V)]` is for backward: of S the indices, or if those are given
    its entries."""
    work = accum_dtype(logits.dtype)
    losses = logits.new_empty(logits.shape[0], dtype=work)
    if loops := cpu.loops_for(logits, None if indices is not None else ref_logits, grad):
        rows = {"logits": logits, "grad": grad, "weights": weights}
        rows["chosen" if indices is None else "values"] = kept
        options = _local_entropy_options(logits, ref_logits, indices, top_k, objective, center)
        loops("local_entropy", **rows, losses=losses, state=state, softcap=softcap, **options)
        return losses
    is_global = objective == "flatten" and center == "global_mean"
    for tile in tiles(logits):
        x, w = logits[tile], None if weights is None else weights[tile]
        z, slope = (x, None) if softcap is None else capped(x, softcap)
        # of S alone; of the rest, whether it is finite, and a mean in float64: entries far from 0
        # lie nearer to it than float32 can tell
        total = z.sum(-1, keepdim=True, dtype=torch.float64 if is_global else work)
        by_reference = indices is None and ref_logits is not None
        scores = ref_logits[tile] if by_reference else x
        s = (topk_indices(scores, top_k) if indices is None else indices[tile]).long()
        if indices is None and kept is not None:
            kept[tile] = s
        z_s = z.gather(-1, s).to(work)
        rows, on_s, off_s = _on_s(z_s, total, z.shape[1], objective, center)
        wrong = ~(rows + total[:, 0]).isfinite()
        if by_reference:  # whose NaN ranks first
            has_nan = scores.gather(-1, s).isnan().any(-1)
            wrong |= has_nan
        spoiled = wrong.nonzero()[:, 0]
        fixed = None
        if len(spoiled):  # before the logits are overwritten
            options = {"top_k": top_k, "objective": objective, "center": center}
            again = x[spoiled]
            if by_reference:
                again.masked_fill_(has_nan[spoiled, None], torch.nan)
            by = (again, s[spoiled], None if w is None else w[spoiled])
            rows[spoiled], fixed = _by_definition(*by, softcap, grad is not None, options)
        if grad is not None and slope is None:
            on_s += off_s
            if w is not None:
                on_s, off_s = on_s * w[:, None], off_s * w[:, None]
            grad[tile] = off_s
            grad[tile].scatter_(-1, s, on_s.to(grad.dtype))
        elif grad is not None:
            store(grad[tile], off_s.expand_as(z).scatter(-1, s, on_s + off_s), slope, w)
        if fixed is not None:
            grad[tile].index_copy_(0, spoiled, fixed)
        losses[tile] = rows
    if state is not None:
        state[:, 0] = losses
    return losses


def _by_definition(
    logits: Tensor,
    s: Tensor,
    weights: Tensor | None,
    softcap: float | None,
    gradient: bool,
    options: dict,
) -> tuple[Tensor, Tensor | None]:
    """Of rows that are not finite, hold masked entries, or are NaN for a NaN of the reference's."""
    z, slope = capped(logits, softcap)
    rows = reference.local_entropy_loss(z, None, indices=s, **options)
    if not gradient:
        return rows, None
    ones, out = torch.ones_like(rows), torch.empty_like(logits)
    right = reference.local_entropy_gradient(z, None, ones, indices=s, **options)
    store(out, right, slope, weights)
    return rows, out


def _on_s(
    z_s: Tensor, total: Tensor, columns: int, objective: str, center: str | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses, and what the gradient is at S beyond its value off S `[N, 1]`."""
    off_s = torch.zeros_like(z_s[:, :1])
    if objective == "entropy":
        # q_j (log q_j + H) on S
        log_q = z_s.log_softmax(-1)
        q = log_q.exp()
        negative_entropy = (q * log_q).sum(-1, keepdim=True)
        rows = math.log(z_s.shape[1]) + negative_entropy[:, 0]
        return rows, q * (log_q - negative_entropy), off_s
    # (2/k) * ([j in S](z_j - c) - (1/V) * sum_S(z_i - c))
    if center == "global_mean":
        deviation = (z_s - total / columns).to(z_s.dtype)
    elif center == "local_mean":
        deviation = z_s - z_s.mean(-1, keepdim=True)
        deviation -= deviation.mean(-1, keepdim=True)
    else:
        deviation = z_s - center
    on_s = deviation * (2 / z_s.shape[1])
    if center == "global_mean":
        off_s = -on_s.sum(-1, keepdim=True) / columns
    return deviation.square().mean(-1), on_s, off_s


def local_entropy_backward(
    weights: Tensor,
    logits: Tensor,
    indices: Tensor,
    values: Tensor | None,
    state: Tensor,
    top_k: int,
    objective: str,
    center: str | float,
    softcap: float | None,
    grad: Tensor,
) -> None:
    """Write the gradient alone; `state` is that of `local_entropy`, `indices` are its S and
    `values`, where it kept those, S's entries."""
    if loops := loops_that_made(state, logits, grad):
        rows = {"logits": logits, "grad": grad, "weights": weights, "values": values}
        options = _local_entropy_options(logits, None, indices, top_k, objective, center)
        loops("local_entropy", **rows, state=state, softcap=softcap, **options)
        return
    # the gradient of a row whose loss is NaN is NaN, also where the reference's row held it
    weights = torch.where(state[:, 0].isnan(), torch.nan, weights)
    local_entropy(
        logits, None, indices, top_k, objective, center, softcap, grad=grad, weights=weights
    )


def check_indices(indices: Tensor, columns: int) -> None:
    """Raise ValueError unless indices `[N, k]` are in range and unique along a row."""
    bad = None
    if loops := cpu.loops_for_indices(indices):
        bad = indices.new_zeros(len(indices), dtype=torch.int32)
        rows, k = indices.shape
        loops("indices", indices=indices, bad=bad, rows=rows, columns=columns, k=k)
    if bad is None or bool(bad.any()):
        validation.index_values(indices, columns)


def _local_entropy_options(
    logits: Tensor,
    ref_logits: Tensor | None,
    indices: Tensor | None,
    top_k: int,
    objective: str,
    center: str | float,
) -> dict:
    number = not isinstance(center, str)
    kind = "entropy" if objective == "entropy" else "number" if number else center
    return {
        "objective": cpu.OBJECTIVES[kind],
        "center": float(center) if number else None,
        "k": min(top_k, logits.shape[1]),
        "indices": indices,
        "ref_logits": ref_logits if indices is None else None,
        "select_by_current": int(ref_logits is None),
    }


def kl(
    logits: Tensor,
    ref_logits: Tensor,
    direction: str,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    grad: Tensor | None = None,
    weights: Tensor | None = None,
    state: Tensor | None = None,
) -> Tensor:
    losses = logits.new_empty(logits.shape[0], dtype=accum_dtype(logits.dtype))
    if loops := cpu.loops_for(logits, ref_logits, grad):
        options = _kl_options(direction, softcap, ref_softcap)
        rows = {"logits": logits, "ref_logits": ref_logits, "grad": grad, "weights": weights}
        loops("kl", **rows, losses=losses, state=state, **options)
        return losses
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
        if state is not None:
            state[tile, 0] = losses[tile]
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
    state: Tensor,
    direction: str,
    softcap: float | None,
    ref_softcap: float | None,
    grad: Tensor,
) -> None:
    """Write the gradient alone; `state` is that of `kl`."""
    if loops := loops_that_made(state, logits, ref_logits, grad):
        options = _kl_options(direction, softcap, ref_softcap)
        rows = {"logits": logits, "ref_logits": ref_logits, "grad": grad, "weights": weights}
        loops("kl", **rows, state=state, **options)
        return
    for tile in tiles(logits):
        z, slope = capped(logits[tile], softcap)
        r, _ = capped(ref_logits[tile], ref_softcap)
        if direction == "reverse":
            # p_j ((z_j - r_j) - sum_i p_i (z_i - r_i)): the logarithms of the sums cancel
            p, difference = z.softmax(-1), z - r
            found = torch.linalg.vecdot(p, difference)
            out = difference.sub_(found[:, None]).mul_(p)
        else:
            out = z.softmax(-1).sub_(r.softmax(-1))
        # an entry that both mask makes its row NaN here, though its loss is finite
        if not bool((state[tile, 0] + out[:, 0]).isfinite().all()):
            ones = torch.ones_like(weights[tile])
            out = reference.kl_gradient(z, r, ones, direction=direction)
        store(grad[tile], out, slope, weights[tile])


def _kl_options(direction: str, softcap: float | None, ref_softcap: float | None) -> dict:
    return {
        "forward_kl": int(direction == "forward"),
        "softcap": softcap,
        "ref_softcap": ref_softcap,
    }


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    softcap: float | None = None,
    grad: Tensor | None = None,
    weights: Tensor | None = None,
    state: Tensor | None = None,
) -> Tensor:
    losses = logits.new_empty(logits.shape[0], dtype=accum_dtype(logits.dtype))
    if loops := cpu.loops_for(logits, grad):
        rows = {"logits": logits, "labels": labels, "grad": grad}
        options = {"ignore_index": ignore_index, "softcap": softcap, "weights": weights}
        loops("cross_entropy", **rows, losses=losses, state=state, **options)
        return losses
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
    state: Tensor,
    ignore_index: int,
    softcap: float | None,
    grad: Tensor,
) -> None:
    """Write the gradient alone; `state` is that of `cross_entropy`."""
    if loops := loops_that_made(state, logits, grad):
        rows = {"logits": logits, "labels": labels, "grad": grad}
        options = {"ignore_index": ignore_index, "softcap": softcap, "weights": weights}
        loops("cross_entropy", **rows, state=state, **options)
        return
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
    store(grad, out, slope, weights)
    if not bool(counted.all()):  # last: the slope at a NaN is one
        grad.masked_fill_(~counted[:, None], 0)

"""Row losses of which every rank has a slice of the row: statistics of slices, put together.

A slice is to a row what a row is to a batch: KL, logsumexp, means and squares of the row follow
from those of its slices (the chain rule of the KL divergence; the parallel algorithm for variances
of Chan, Golub and LeVeque), and then every rank writes the gradient of its own slice. What is
gathered of a row are a few numbers in float64, in the order of the vocabulary: all ranks put the
same numbers together in the same way.

A loss is two functions: `*_forward` returns losses `[N]` and what the gradient needs, `*_backward`
writes the gradient, times `weights [N]`, into `grad`, which may be the logits. The kernels walk the
slice where Triton serves, else plain PyTorch does, tile by tile. A rank may have no entry at all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from palu_kernels import reference
from palu_kernels.backend import accum_dtype
from palu_kernels.distributed import Vocabulary
from palu_kernels.reference import NEG_INF
from palu_kernels.row_loss import LocalEntropy, Operands, kernels, topk_indices
from palu_kernels.torch_backend import capped, store, tiles

GATHERED_K = 64  # up to so many keys a row and rank are gathered; beyond, the k-th is searched for
DIGIT = 4  # bits of a key that are found with one exchange of 2**DIGIT - 1 counts


def wide_dtype(t: Tensor) -> torch.dtype:
    """float64 where the device has it: what rows have in common cancels in their differences."""
    return torch.float64 if t.device.type in ("cpu", "cuda") else accum_dtype(t.dtype)


def log_sum(z: Tensor, wide: torch.dtype) -> Tensor:
    """logsumexp of `z [..., n]` -> `[...]`: of nothing, or of masked entries alone, -inf; of +inf
    NaN, as its softmax is."""
    if z.shape[-1] == 0:
        return z.new_full(z.shape[:-1], NEG_INF, dtype=wide)
    top = z.amax(-1)
    shift = torch.where(top == NEG_INF, 0, top)
    return shift.to(wide) + (z - shift[..., None]).exp().sum(-1).to(wide).log()


def _zero_if_masked(log_sums: Tensor) -> Tensor:
    return torch.where(log_sums == NEG_INF, 0, log_sums)


def in_two(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x` as a number of `dtype` and what it lacks: their difference to another number keeps its
    digits."""
    high = x.to(dtype)
    return high, torch.where(high.isfinite(), x - high.to(x.dtype), 0).to(dtype)


# ---- Kullback-Leibler divergence ----


def kl_of_slices(log_a: Tensor, log_b: Tensor, kl: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Put slices together: of each the logsumexp of either row and KL(a || b), all `[S, N]`.

    KL = sum_s w_s KL_s + KL(w || v), w and v the slices' shares of a and b: no term is negative.
    """
    all_a, all_b = log_sum(log_a.t(), log_a.dtype), log_sum(log_b.t(), log_b.dtype)
    log_w = log_a - _zero_if_masked(all_a)
    log_v = log_b - _zero_if_masked(all_b)
    infinite = kl == torch.inf  # also where a's share is too small for a number
    part = (log_a == NEG_INF) | infinite
    terms = torch.where(part, 0, log_w.exp() * (kl + log_w - log_v))
    total = torch.where(infinite.any(0), torch.inf, terms.sum(0))
    spoiled = (log_a.isnan() | log_b.isnan() | kl.isnan()).any(0)
    return all_a, all_b, torch.where(spoiled, torch.nan, total)


def kl_forward(x: Operands, direction: str) -> tuple[Tensor, tuple[Tensor]]:
    wide, rows = wide_dtype(x.logits), len(x.logits)
    own = x.logits.new_zeros((3, rows), dtype=wide)
    if x.logits.shape[-1] == 0:
        own[:2] = NEG_INF
    elif x.backend == "triton":
        pair = (x.logits, x.softcap), (x.ref_logits, x.ref_softcap)
        a, b = pair if direction == "reverse" else pair[::-1]
        partial = kernels("kl_div").statistics(a[0], b[0], a[1], b[1]).to(wide)
        top_a, sum_a, top_b, sum_b, dot, lacking = partial[..., :6].unbind(-1)
        kl = dot / sum_a - sum_a.log() + sum_b.log()
        kl = torch.where(sum_a == 0, 0, torch.where(lacking > 0, torch.inf, kl))
        splits = top_a + sum_a.log(), top_b + sum_b.log(), kl + (sum_a + sum_b) * 0
        own = torch.stack(kl_of_slices(*(t.t() for t in splits)))
    else:
        for tile in tiles(x.logits):
            z, r = (
                capped(x.logits[tile], x.softcap)[0],
                capped(x.ref_logits[tile], x.ref_softcap)[0],
            )
            a, b = (z, r) if direction == "reverse" else (r, z)
            own[0, tile], own[1, tile] = log_sum(a, wide), log_sum(b, wide)
            own[2, tile] = reference.kl_loss(z, r, direction=direction)
    every = x.vocabulary.gather(own.t(), "statistics")
    stats = torch.stack(kl_of_slices(*every.unbind(-1)), 1)
    return stats[:, 2].to(accum_dtype(x.logits.dtype)), (stats,)


def kl_backward(
    weights: Tensor, x: Operands, direction: str, made: tuple[Tensor], grad: Tensor
) -> None:
    work, (stats,) = accum_dtype(x.logits.dtype), made
    kl = stats[:, 2]
    nothing = stats[:, 0] == NEG_INF  # the first distribution is masked as a whole
    high_a, low_a = in_two(_zero_if_masked(stats[:, 0]), work)
    high_b, low_b = in_two(_zero_if_masked(stats[:, 1]), work)
    spoiled = torch.where(kl.isfinite(), 0, torch.nan).to(work)
    if x.backend == "triton":
        if direction == "reverse":
            columns = high_a, low_a + spoiled, high_b, (kl + low_a - low_b).to(work)
        else:  # without a first distribution exp(z - 1e30) is 0
            columns = high_b, torch.where(nothing, 1e30, low_b) + spoiled, high_a, low_a
        state = torch.stack(columns, 1).contiguous()
        options = (state, direction, grad, x.softcap, x.ref_softcap)
        kernels("kl_div").backward(weights, x.logits, x.ref_logits, *options)
        return
    for tile in tiles(x.logits):
        z, slope = capped(x.logits[tile], x.softcap)
        r, _ = capped(x.ref_logits[tile], x.ref_softcap)
        a, b = (z, r) if direction == "reverse" else (r, z)
        log_a = (a - high_a[tile, None]) - low_a[tile, None]
        log_b = (b - high_b[tile, None]) - low_b[tile, None]
        if direction == "reverse":
            out = log_a.exp() * (log_a - log_b - kl[tile, None].to(work))
        else:
            out = torch.where(nothing[tile, None], 0, log_b.exp() - log_a.exp())
        out = torch.where(z == NEG_INF, 0, out) + spoiled[tile, None]
        store(grad[tile], out, slope, weights[tile])


# ---- cross-entropy ----


def cross_entropy_forward(x: Operands, ignore_index: int) -> tuple[Tensor, tuple[Tensor]]:
    vocabulary, wide, rows = x.vocabulary, wide_dtype(x.logits), len(x.logits)
    local = x.data.long() - vocabulary.start
    mine = (x.data != ignore_index) & (local >= 0) & (local < vocabulary.rows)
    own = x.logits.new_full((2, rows), NEG_INF, dtype=wide)
    own[1] = torch.nan  # not mine
    if x.logits.shape[-1]:
        picked = x.logits.gather(-1, torch.where(mine, local, 0)[:, None])[:, 0]
        own[1] = torch.where(mine, capped(picked, x.softcap)[0].to(wide), torch.nan)
        if x.backend == "triton":
            top, total = kernels("cross_entropy").statistics(x.logits, x.softcap).unbind(-1)
            own[0] = log_sum(top.to(wide) + total.to(wide).log(), wide)
        else:
            for tile in tiles(x.logits):
                own[0, tile] = log_sum(capped(x.logits[tile], x.softcap)[0], wide)
    log_sums, targets = vocabulary.gather(own.t(), "statistics").unbind(-1)
    stats = log_sum(log_sums.t(), wide)
    found = ~targets.isnan()
    target = torch.where(found.any(0), torch.where(found, targets, 0).sum(0), torch.nan)
    losses = torch.where(x.data != ignore_index, stats - target, 0)
    stats = torch.where(target.isnan(), torch.nan, stats)  # also of a label that is no class
    return losses.to(accum_dtype(x.logits.dtype)), (stats,)


def cross_entropy_backward(
    weights: Tensor, x: Operands, ignore_index: int, made: tuple[Tensor], grad: Tensor
) -> None:
    """softmax(z) - onehot(label)"""
    vocabulary, (stats,) = x.vocabulary, made
    work, counted = accum_dtype(x.logits.dtype), x.data != ignore_index
    local = x.data.long() - vocabulary.start
    mine = counted & (local >= 0) & (local < vocabulary.rows)
    high, low = in_two(stats, work)
    if x.backend == "triton":
        state = torch.stack([high, low, *torch.zeros_like(high).expand(2, -1)], 1)
        # a label beside the slice meets no entry of it
        local = torch.where(mine, local, torch.where(counted, vocabulary.rows, -100))
        options = (local, state, -100, grad, x.softcap)
        kernels("cross_entropy").backward(weights, x.logits, *options)
        return
    for tile in tiles(x.logits):
        z, slope = capped(x.logits[tile], x.softcap)
        out = ((z - high[tile, None]) - low[tile, None]).exp()
        one = mine[tile, None].to(out.dtype)
        out.scatter_add_(-1, torch.where(mine, local, 0)[tile, None], -one)
        store(grad[tile], out, slope, weights[tile])
        grad[tile].masked_fill_(~counted[tile, None], 0)


# ---- the k largest ----


class Chosen(NamedTuple):
    """S of rows, as far as it lies in this rank's slice."""

    indices: Tensor  # int64 [N, m], in the slice; those that are not `mine` are anywhere in it
    mine: Tensor  # bool [N, m]
    has_nan: Tensor  # bool [N], whether the scores of this slice hold a NaN


def sort_keys(scores: Tensor) -> Tensor:
    """int64 that order as the scores do: -0.0 as 0.0, NaN above all."""
    size = scores.dtype.itemsize
    bits = (scores + 0.0).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
    most = torch.iinfo(bits.dtype).max
    keys = bits ^ ((bits >> (8 * size - 1)) & most)
    return torch.where(scores.isnan(), most, keys).long()


def select(scores: Tensor, top_k: int, vocabulary: Vocabulary, backend: str) -> Chosen:
    """Return S of the whole rows, of which `scores [N, rows]` are slices; ties go to the lowest
    index in the whole vocabulary.

    What a rank may have in S are its own k largest. Few keys are gathered; of many the k-th largest
    is found digit by digit, by counts.
    """
    k, bits = min(top_k, vocabulary.size), 8 * scores.dtype.itemsize
    rows, columns = scores.shape
    own = torch.empty((rows, 0), dtype=torch.long, device=scores.device)
    if columns:
        own = topk_indices(scores, k, backend).long()
    keys, order = sort_keys(scores.gather(-1, own)).sort(dim=-1, descending=True, stable=True)
    own = own.gather(-1, order)
    least = -(2 ** (bits - 1))  # no number has this key
    if k <= GATHERED_K:
        mine = keys.new_full((rows, k), least)
        mine[:, : keys.shape[1]] = keys
        every = vocabulary.gather(mine.to(torch.int64 if bits == 64 else torch.int32), "select")
        together = every.transpose(0, 1).flatten(1)
        kth = together.topk(k, sorted=True).values[:, -1]
        larger = (every > kth[:, None]).sum(-1)
        ties = (every == kth[:, None]).sum(-1)
    else:
        kth = _kth_largest(keys, k, bits, least, vocabulary)[:, None]
        counts = torch.stack([(keys > kth).sum(-1), (keys == kth).sum(-1)], 1).int()
        larger, ties = vocabulary.gather(counts, "select").unbind(-1)
    before = (ties.cumsum(0) - ties)[vocabulary.place]
    left = (k - larger.sum(0) - before).clamp(min=0)
    taken = larger[vocabulary.place] + torch.minimum(left, ties[vocabulary.place])
    mine = torch.arange(own.shape[1], device=own.device) < taken[:, None]
    has_nan = (keys == 2 ** (bits - 1) - 1).any(-1)
    return Chosen(own, mine, has_nan)


def global_indices(scores: Tensor, top_k: int, vocabulary: Vocabulary, backend: str) -> Tensor:
    """Return S of the whole rows, ascending indices in the whole vocabulary, int32 `[N, k]`."""
    chosen = select(scores, top_k, vocabulary, backend)
    own = torch.where(chosen.mine, chosen.indices + vocabulary.start, vocabulary.size).sort(-1)[0]
    counts = vocabulary.gather(chosen.mine.sum(-1).int(), "select")
    before = (counts.cumsum(0) - counts)[vocabulary.place]
    out = own.new_zeros((len(own), min(top_k, vocabulary.size) + 1))  # one column to throw away
    at = before[:, None] + torch.arange(own.shape[1], device=own.device)
    at = torch.where(own < vocabulary.size, at, out.shape[1] - 1)
    out.scatter_(1, at, own)
    return vocabulary.sum(out[:, :-1].int(), "select")


def _kth_largest(keys: Tensor, k: int, bits: int, least: int, vocabulary: Vocabulary) -> Tensor:
    """The k-th largest key over all ranks, `[N]`; `keys [N, m]`, descending, are the largest
    here."""
    ascending = keys.flip(-1).contiguous()
    found = keys.new_full((len(keys),), least)
    digits = torch.arange(1, 2**DIGIT, device=keys.device)
    for shift in range(bits - DIGIT, -1, -DIGIT):
        candidates = found[:, None] + digits * 2**shift
        counts = keys.shape[1] - torch.searchsorted(ascending, candidates)
        counts = vocabulary.sum(counts.int(), "select")
        found = found + (counts >= k).sum(-1) * 2**shift
    return found


def given(indices: Tensor, vocabulary: Vocabulary) -> Chosen:
    """S as it was given, `[N, k]` in the whole vocabulary."""
    local = indices.long() - vocabulary.start
    mine = (local >= 0) & (local < vocabulary.rows)
    beside = ((indices < 0) | (indices >= vocabulary.size)).any(-1)  # as if it were a NaN
    if vocabulary.rows == 0:
        local, mine = local[:, :0], mine[:, :0]
    return Chosen(torch.where(mine, local, 0), mine, beside)


# ---- PALU's forget loss ----


class OnS(NamedTuple):
    """Rows of the forget loss, and the derivatives to the entries of S that are here."""

    losses: Tensor  # [N]
    slopes: Tensor  # [N, m], without what a global mean adds; 0 where not mine
    off_s: Tensor  # [N], what a global mean adds everywhere
    spoiled: Tensor  # [N], NaN where a slice holds one, else 0


def forget(
    z: Tensor,
    chosen: Chosen,
    row: tuple[Tensor, Tensor] | None,
    vocabulary: Vocabulary,
    objective: str,
    center: str | float,
    spoiled: Tensor,
) -> OnS:
    """Compute the forget loss from the entries of S, float64.

    Args:
        z: `[N, m]`, entries of the slice at `chosen.indices`, under the cap.
        row: of the whole slice the number of live entries and their sum, `[N]` each, where the
            center is the global mean.
        spoiled: bool `[N]`, rows of which a slice holds a NaN.
    """
    member = chosen.mine & (z != NEG_INF)
    live = member.sum(-1).to(z.dtype)
    live = torch.where(spoiled | (member & z.isnan()).any(-1), torch.nan, live)
    if objective == "entropy":
        return _entropy(z, member, live, vocabulary)
    zeros = torch.zeros_like(live)
    fixed = not isinstance(center, str)
    mean = zeros + center if fixed else torch.where(member, z, 0).sum(-1) / live.clamp(min=1)
    square = torch.where(member, z - mean[:, None], 0).square().sum(-1)
    own = torch.stack([live, mean, square, *(row or (zeros, zeros))], 1)
    live, means, squares, lives, totals = vocabulary.gather(own, "statistics").unbind(-1)
    count = live.sum(0)
    k = count.clamp(min=1)
    if center == "global_mean":
        c = totals.sum(0) / lives.sum(0).clamp(min=1)
    else:
        c = center if fixed else (live * means).sum(0) / k
    distance = torch.where(live == 0, 0, means - c)  # c may be infinite, where entries are
    losses = (squares + live * distance.square()).sum(0) / k
    off_s = zeros
    if center == "global_mean":
        off_s = -2 * (live * distance).sum(0) / k / lives.sum(0).clamp(min=1)
    about = c if fixed else c[:, None]
    slopes = torch.where(member, (z - about) * (2 / k)[:, None], 0)
    return OnS(losses, slopes, off_s, count * 0)


def _entropy(z: Tensor, member: Tensor, live: Tensor, vocabulary: Vocabulary) -> OnS:
    own_log = log_sum(z.masked_fill(~member, NEG_INF), z.dtype)
    log_q = torch.where(member, z - own_log[:, None], 0)
    negative = (torch.where(member, log_q.exp(), 0) * log_q).sum(-1)
    own = torch.stack([live, own_log, negative], 1)
    live, logs, negatives = vocabulary.gather(own, "statistics").unbind(-1)
    count = live.sum(0)
    log_all = _zero_if_masked(log_sum(logs.t(), z.dtype))
    log_w = logs - log_all
    part = log_w == NEG_INF
    negative = torch.where(part, 0, log_w.exp() * (negatives + log_w)).sum(0)
    losses = count.clamp(min=1).log() + negative
    log_q = z - log_all[:, None]
    slopes = torch.where(member, log_q.exp() * (log_q - negative[:, None]), 0)
    return OnS(losses, slopes, torch.zeros_like(losses), count * 0)


def local_entropy_forward(x: Operands, loss: LocalEntropy) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What the gradient needs: S here and whether it is mine, the gradient to it before the
    softcap, and everywhere else."""
    vocabulary, wide = x.vocabulary, wide_dtype(x.logits)
    if x.data is not None:
        chosen = given(x.data, vocabulary)
    else:
        scores = x.logits if x.ref_logits is None else x.ref_logits
        chosen = select(scores, loss.top_k, vocabulary, x.backend)
    live, total = _row_sums(x, wide)
    z, slope = capped(x.logits.gather(-1, chosen.indices), x.softcap)
    spoiled = chosen.has_nan | live.isnan()
    center = loss.center_value if loss.center_kind == "number" else loss.center_kind
    row = (live, total) if center == "global_mean" else None
    found = forget(z.to(wide), chosen, row, vocabulary, loss.objective, center, spoiled)
    on_s = torch.where(chosen.mine & (z != NEG_INF), found.slopes + found.off_s[:, None], 0)
    on_s = on_s if slope is None else on_s * slope
    by_row = torch.stack([found.off_s, found.spoiled, live], 1)
    made = chosen.indices, chosen.mine, on_s + found.spoiled[:, None], by_row
    return found.losses.to(accum_dtype(x.logits.dtype)), made


def _row_sums(x: Operands, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """The number of live entries of every slice, NaN if it holds one, and their sum."""
    live = x.logits.new_zeros(len(x.logits), dtype=wide)
    total = torch.zeros_like(live)
    if x.logits.shape[-1] and x.backend == "triton":
        partial = kernels("local_entropy").row_sums(x.logits, x.softcap).to(wide)
        splits, sums, near = partial[..., :3].unbind(-1)
        return splits.sum(-1), (sums + splits * near).sum(-1)
    for tile in tiles(x.logits) if x.logits.shape[-1] else ():
        z, _ = capped(x.logits[tile], x.softcap)
        masked = z == NEG_INF
        has_nan = z.isnan().any(-1)
        live[tile] = torch.where(has_nan, torch.nan, (~masked).sum(-1).to(wide))
        total[tile] = z.masked_fill(masked, 0).sum(-1, dtype=wide)
    return live, total


def local_entropy_backward(
    weights: Tensor, x: Operands, made: tuple[Tensor, ...], grad: Tensor
) -> None:
    indices, mine, on_s, by_row = made
    off_s, spoiled, live = by_row.unbind(1)
    if x.backend == "triton":
        kept = torch.stack(
            [torch.where(mine, indices, -1).int(), on_s.float().view(torch.int32)], 1
        )
        masked = (live != x.logits.shape[-1]).to(live.dtype)
        columns = [off_s, spoiled, masked, torch.zeros_like(off_s)]
        state = torch.stack(columns, 1).float()
        kernels("local_entropy").backward(weights, x.logits, state, kept, grad, x.softcap)
        return
    for tile in tiles(x.logits):
        z, slope = capped(x.logits[tile], x.softcap)
        w = weights[tile, None].to(z.dtype)
        out = off_s[tile, None].to(z.dtype).expand_as(z)
        out = (out if slope is None else out * slope) * w
        out = torch.where(z == NEG_INF, 0, out)
        row, place = mine[tile].nonzero(as_tuple=True)
        here = on_s[tile][row, place].to(z.dtype) * w[row, 0]
        out[row, indices[tile][row, place]] = here
        grad[tile] = out + spoiled[tile, None].to(z.dtype)


# ---- the reference's most likely token ----


def most_likely(x: Operands) -> tuple[Tensor, Tensor]:
    """The lowest index of the largest entry of the reference's row, -100 where all of it is masked;
    and whether the row holds a NaN."""
    scores, wide = x.ref_logits, wide_dtype(x.logits)
    own = scores.new_full((2, len(scores)), NEG_INF, dtype=wide)
    if scores.shape[-1]:
        top = topk_indices(scores, 1, x.backend).long()
        own[0], own[1] = scores.gather(-1, top)[:, 0], top[:, 0] + x.vocabulary.start
    values, indices = x.vocabulary.gather(own.t(), "select").unbind(-1)
    largest = values.amax(0)
    has_nan = largest.isnan()
    first = torch.where((values == largest) | has_nan, indices, torch.inf).amin(0)
    return torch.where(largest == NEG_INF, -100, first).long(), has_nan

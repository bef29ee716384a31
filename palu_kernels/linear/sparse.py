"""Forget losses from the selected rows of the head alone, without a logit outside S.

Entropy and flatten need z_S = cap(logit_scale * (h W_S^T + b_S)) and, for the global mean, one
number more: without a softcap the mean of all logits is logit_scale * (h . mean(W) + mean(b)).
Loss and hidden gradient of a row then cost k * D of the head instead of V * D.

Plain tensors, no autograd: what is differentiated is x = h W^T + b, of which a row needs
`dloss_dx` (d loss / d x_i for i in S) and `mean_coeff` (d loss / d mean of x, for the global
mean). Then, with the row's weight w:

* hidden gradient: dloss_dx @ W_S + mean_coeff * mean(W);
* weight gradient: w * dloss_dx_i * h added to row i of S, w * mean_coeff / V * h to every row;
* bias gradient: the same without h.

float64 is worked in float64, everything else in float32. A bias of -inf masks its entry, which
then takes no part in a mean, a sum or a count, as everywhere in this package.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from palu_kernels import reference, torch_backend
from palu_kernels.backend import accum_dtype, on_device_of
from palu_kernels.distributed import Vocabulary
from palu_kernels.linear.cost_model import BLOCK_BYTES, needs_mean
from palu_kernels.reference import NEG_INF

if TYPE_CHECKING:
    from palu_kernels.slices import Chosen

GROUP_ROWS = 64  # of the head, whose sum is taken in float32


class SparseResult(NamedTuple):
    """What a forward leaves, one entry a row; the dtype is the one that is worked in."""

    losses: Tensor  # [N]
    dloss_dx: Tensor  # [N, k]
    mean_coeff: Tensor  # [N], 0 where the loss has no global mean
    grad_hidden: Tensor | None  # [N, D], of each row's own loss, unweighted


@torch.no_grad()
def mean_row(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean over the vocabulary of `weight [V, D]` and `bias [V]`: `[D]` and 0-dim."""
    return mean_of_sums(sums_of_rows(weight, bias))


def mean_of_sums(sums: Tensor, vocabulary: Vocabulary | None = None) -> tuple[Tensor, Tensor]:
    """What `sums_of_rows` makes -> the two means; of a sharded head, those of all its rows."""
    if vocabulary is not None:
        sums = vocabulary.sum(sums.clone(), "mean row")
    means = sums[:-1] / sums[-1].clamp(min=1)
    return means[:-1], means[-1]


@torch.no_grad()
def sums_of_rows(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The sums over the vocabulary of `weight [V, D]` and `bias [V]`, and how many rows that is,
    `[D + 2]`, in float64 where the device has it: what rows have in common may be thousands of
    times what they differ by, and cancels in the deviations.

    Entries that the bias masks are left out. Without a bias an accelerator reads the weight once;
    otherwise it is taken piece by piece, without a copy of the whole.
    """
    wide = torch.float64 if weight.device.type in ("cpu", "cuda") else accum_dtype(weight.dtype)
    total = weight.new_zeros(weight.shape[1], dtype=wide)
    whole = bias is None and weight.device.type != "cpu"  # there a sum in another dtype copies
    step = max(1, BLOCK_BYTES // (weight.shape[1] * accum_dtype(weight.dtype).itemsize))
    for start in range(0, len(weight), max(len(weight), 1) if whole else step):
        piece = weight[start:] if whole else weight[start : start + step]
        if bias is not None:
            piece = torch.where(bias[start : start + step, None] == NEG_INF, 0, piece)
        total += _sum_of_rows(piece, wide)
    if bias is None:
        return torch.cat([total, total.new_zeros(1), total.new_full((1,), len(weight))])
    live = bias != NEG_INF
    of_bias = torch.where(live, bias, 0).sum(dtype=wide)
    return torch.cat([total, torch.stack([of_bias, live.sum().to(wide)])])


def _sum_of_rows(rows: Tensor, wide: torch.dtype) -> Tensor:
    """`[n, D]` -> `[D]`: groups of few rows in float32, whose sums lose no more than one rounding
    or two, and those in `wide`."""
    groups = len(rows) // GROUP_ROWS
    work, first = accum_dtype(rows.dtype), groups * GROUP_ROWS
    sums = rows[:first].view(groups, GROUP_ROWS, rows.shape[1]).sum(1, dtype=work)
    return sums.sum(0, dtype=wide) + rows[first:].sum(0, dtype=work)


def _parts_of_mean(
    vocab_size: int, bias: Tensor | None, like: Tensor, count: Tensor | int | None
) -> Tensor:
    """What each entry's share in the mean is: one over the number of live ones, or 0. `[V]`."""
    dtype = accum_dtype(like.dtype)
    if bias is None:
        share = 1 / (vocab_size if count is None else count)
        return torch.full((vocab_size,), share, dtype=dtype, device=like.device)
    live = (bias != NEG_INF).to(dtype)
    return live / (live.sum().clamp(min=1) if count is None else count)


def live_entries(bias: Tensor | None, vocabulary: Vocabulary) -> Tensor | int:
    """How many entries of the whole vocabulary the bias does not mask, at least 1."""
    if bias is None:
        return vocabulary.size
    live = (bias != NEG_INF).sum()[None].to(torch.int32)
    return vocabulary.sum(live, "mean row")[0].clamp(min=1)


@torch.no_grad()
def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    indices: Tensor,
    mean: tuple[Tensor, Tensor] | None,
    *,
    objective: str,
    center_kind: str,
    center_value: float,
    backend: str,
    want_hidden: bool,
) -> SparseResult:
    """Loss and derivatives of every row.

    Args:
        hidden: `[N, D]`.
        weight, bias, logit_scale, softcap: the head, as in `LMHead`; the weight may have any
            strides.
        indices: S, int32 or int64 `[N, k]`, unique and in range along a row.
        mean: `mean_row(weight, bias)` where `needs_mean` says so, else None.
        objective, center_kind, center_value: as `arguments.center` leaves them.
        backend: `triton` or `torch`.
        want_hidden: whether to return `grad_hidden` too, from the rows of W that are at hand.
    """
    loss = _Loss(logit_scale, softcap, objective, center_kind, center_value)
    global_mean = None
    with torch.autocast(hidden.device.type, enabled=False):
        if needs_mean(objective, center_kind):
            global_mean = hidden.to(mean[0].dtype) @ mean[0] + mean[1]
        if backend == "triton":
            rows = _by_kernels(hidden, weight, bias, indices, global_mean, loss, want_hidden)
        else:
            rows = _by_torch(hidden, weight, bias, indices, global_mean, loss, want_hidden)
        if want_hidden and global_mean is not None:
            rows.grad_hidden.addr_(rows.mean_coeff, mean[0].to(rows.mean_coeff.dtype))
    return rows


class _Loss(NamedTuple):
    """x = h W_S^T + b_S of some rows -> their losses, dloss_dx and mean_coeff."""

    logit_scale: float
    softcap: float | None
    objective: str
    center_kind: str
    center_value: float

    def __call__(self, x: Tensor, global_mean: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        z, slope = x * self.logit_scale, self.logit_scale
        if self.softcap is not None:
            t = torch.tanh(z / self.softcap)
            z, slope = self.softcap * t, slope * (1 - t) * (1 + t)
        center = self.center_kind if self.center_kind == "local_mean" else self.center_value
        if global_mean is not None:
            wide = x.to(global_mean.dtype) - global_mean[:, None]
            z, center = (self.logit_scale * wide).to(x.dtype), 0.0
        # on S alone a row is one of k logits with all of them in its S
        everything = torch.arange(z.shape[1], device=z.device).expand_as(z)
        z, everything = reference.choose(z, None, z.shape[1], everything)
        if self.objective == "flatten":
            deviation, k = reference.deviations(z, everything, center)
            losses, on_s = deviation.square().sum(-1) / k, 2 * deviation / k[:, None]
        else:
            log_q, q, k = reference.local_distribution(z, everything)
            negative_entropy = (q * log_q).sum(-1)
            losses = k.to(z.dtype).log() + negative_entropy
            on_s = q * (log_q - negative_entropy[:, None])
        if global_mean is None:
            mean_coeff = torch.zeros_like(losses)
        else:
            mean_coeff = -self.logit_scale * on_s.sum(-1)
        return losses, on_s * slope, mean_coeff


def _by_kernels(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    global_mean: Tensor | None,
    loss: _Loss,
    want_hidden: bool,
) -> SparseResult:
    from palu_kernels.triton import gathered_matmul as gathered

    with on_device_of(hidden):
        rows = loss(gathered.products(hidden, weight, bias, indices), global_mean)
        grad = gathered.combine(rows[1], weight, indices) if want_hidden else None
    return SparseResult(*rows, grad)


def _by_torch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    global_mean: Tensor | None,
    loss: _Loss,
    want_hidden: bool,
) -> SparseResult:
    """A block of chosen rows at a time: of several hidden rows where S is short, of one otherwise,
    and a part of S where even one does not fit (its other parts are then gathered twice)."""
    dtype = accum_dtype(hidden.dtype)
    rows, k = indices.shape
    width = weight.shape[1]
    step = max(1, BLOCK_BYTES // (width * dtype.itemsize))
    group = max(1, step // k)
    step = min(step, k)
    gather = _Gather(weight, dtype, min(group, max(rows, 1)) * step)
    h = hidden.to(dtype)
    grad = h.new_zeros((rows, width)) if want_hidden else None
    done = []
    for first in range(0, rows, group):
        here = slice(first, first + group)
        parts = indices[here].split(step, 1)
        x = []
        for part in parts:
            block = gather(part)
            x.append(torch.stack([torch.mv(w, v) for w, v in zip(block, h[here], strict=True)]))
        x = torch.cat(x, 1)
        if bias is not None:
            x += bias[indices[here].long()]
        done.append(loss(x, None if global_mean is None else global_mean[here]))
        if want_hidden:
            # backwards: the last part is still in the block
            pairs = list(zip(parts, done[-1][1].split(step, 1), strict=True))[::-1]
            for number, (part, dloss_dx) in enumerate(pairs):
                block = gather(part) if number else block
                for out, w, slope in zip(grad[here], block, dloss_dx, strict=True):
                    out.addmv_(w.T, slope)
    if not done:
        return SparseResult(h.new_zeros(0), h.new_zeros((0, k)), h.new_zeros(0), grad)
    return SparseResult(*(torch.cat(column) for column in zip(*done, strict=True)), grad)


class _Gather:
    """Rows of a weight, in the dtype they are worked in, in memory that is used again."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, rows: int) -> None:
        self.weight = weight
        # zeros: a product may read beyond the rows of the last, shorter block (layout.READ)
        self.raw = weight.new_zeros((rows, weight.shape[1]))
        self.block = self.raw if weight.dtype == dtype else torch.zeros_like(self.raw, dtype=dtype)

    def __call__(self, indices: Tensor) -> Tensor:
        """`[G, k]` -> `[G, k, D]`, valid until the next call."""
        raw, block = (t[: indices.numel()] for t in (self.raw, self.block))
        torch.index_select(self.weight, 0, indices.reshape(-1), out=raw)
        if block.dtype != raw.dtype:
            block.copy_(raw)
        return block.view(*indices.shape, -1)


@torch.no_grad()
def forward_of_slices(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    chosen: Chosen,
    mean: tuple[Tensor, Tensor] | None,
    vocabulary: Vocabulary,
    *,
    objective: str,
    center_kind: str,
    center_value: float,
    backend: str,
    want_hidden: bool,
) -> SparseResult:
    """What `forward` does, from this rank's rows of the head: `dloss_dx` and `grad_hidden` are this
    rank's part (0 where an entry is not `chosen.mine`), all else is of the whole row."""
    from palu_kernels import slices

    wide = slices.wide_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False), on_device_of(hidden):
        x = _products(hidden, weight, bias, chosen.indices, backend)
        z, cap_slope = torch_backend.capped(x * logit_scale, softcap)
        z = z.to(wide) if softcap is not None else x.to(wide) * logit_scale
        row = None
        if needs_mean(objective, center_kind):
            # as a slice of one entry, the mean: it is that of the whole row already
            first = float(vocabulary.place == 0)
            center = hidden.to(mean[0].dtype) @ mean[0] + mean[1]
            row = torch.full_like(z[:, :1].sum(-1), first), center.to(wide) * logit_scale * first
        center = center_value if center_kind == "number" else center_kind
        found = slices.forget(z, chosen, row, vocabulary, objective, center, chosen.has_nan)
        slope = logit_scale if cap_slope is None else cap_slope * logit_scale
        slopes = (found.slopes + found.spoiled[:, None]).to(x.dtype)
        dloss_dx = torch.where(chosen.mine, slopes * slope, 0)
        mean_coeff = (logit_scale * (found.off_s + found.spoiled)).to(x.dtype)
        grad = None
        if want_hidden:
            grad = _combine(dloss_dx, weight, chosen.indices, backend)
            if row is not None and vocabulary.place == 0:
                grad.addr_(mean_coeff, mean[0].to(grad.dtype))
    return SparseResult(found.losses.to(x.dtype), dloss_dx, mean_coeff, grad)


def _products(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor, backend: str
) -> Tensor:
    """h W_S^T + b_S, `[N, m]` in the dtype that is worked in."""
    dtype = accum_dtype(hidden.dtype)
    if indices.numel() and backend == "triton":
        from palu_kernels.triton import gathered_matmul as gathered

        return gathered.products(hidden, weight, bias, indices)
    x = torch.zeros(indices.shape, dtype=dtype, device=hidden.device)
    for row, first, block in _blocks(weight, dtype, indices):
        torch.mv(block, hidden[row].to(dtype), out=x[row, first : first + len(block)])
    return x if bias is None else x + (bias[indices] if indices.numel() else 0)


def _combine(slopes: Tensor, weight: Tensor, indices: Tensor, backend: str) -> Tensor:
    """Sum over S of slope_i W_i, `[N, D]`."""
    if indices.numel() and backend == "triton":
        from palu_kernels.triton import gathered_matmul as gathered

        return gathered.combine(slopes, weight, indices)
    grad = slopes.new_zeros((len(slopes), weight.shape[1]))
    for row, first, block in _blocks(weight, slopes.dtype, indices):
        grad[row].addmv_(block.T, slopes[row, first : first + len(block)])
    return grad


def _blocks(
    weight: Tensor, dtype: torch.dtype, indices: Tensor
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield rows of the weight that a row of indices `[N, m]` names: which row, from which of its
    indices on, and `[n, D]` until the next."""
    if indices.numel() == 0:
        return
    step = max(1, BLOCK_BYTES // (weight.shape[1] * dtype.itemsize))
    gather = _Gather(weight, dtype, min(step, indices.shape[1]))
    for row, own in enumerate(indices):
        for first in range(0, len(own), step):
            yield row, first, gather(own[None, first : first + step])[0]


@torch.no_grad()
def write_logits_gradient(
    out: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    indices: Tensor,
    dloss_dx: Tensor,
    mean_coeff: Tensor | None,
    mine: Tensor | None = None,
    count: Tensor | int | None = None,
) -> None:
    """Write the gradient of each row's own loss to its logits (after the scale, before the cap)
    into `out [N, V]`; the rest as for `add_weight_gradient`. Of `indices` that are not `mine
    [N, k]` nothing is written."""
    on_s = dloss_dx / logit_scale
    # an index out of range has made its row NaN
    inside = indices.long().clamp(0, out.shape[1] - 1)
    if mean_coeff is None:
        out.zero_()
    else:
        live = None if bias is None else bias != NEG_INF
        if count is None:
            count = out.shape[1] if live is None else live.sum().clamp(min=1)
        share = (mean_coeff / (logit_scale * count))[:, None]
        out.copy_(share)
        if live is not None:
            out.masked_fill_(~live, 0)
            share = torch.where(live[inside], share, 0)
        on_s = on_s + share
    if mine is None:
        out.scatter_(1, inside, on_s.to(out.dtype))
    else:
        row, place = mine.nonzero(as_tuple=True)
        out[row, inside[row, place]] = on_s[row, place].to(out.dtype)


@torch.no_grad()
def add_weight_gradient(
    acc_weight: Tensor | None,
    acc_bias: Tensor | None,
    hidden: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    dloss_dx: Tensor,
    mean_coeff: Tensor | None,
    row_weights: Tensor,
    *,
    backend: str,
    mine: Tensor | None = None,
    count: Tensor | int | None = None,
) -> None:
    """Adds the gradient of the sum of row_weights * losses, in place; the same sums every time.

    Args:
        acc_weight, acc_bias: `[V, D]` and `[V]` in the dtype that is worked in, or None where
            no gradient is wanted.
        hidden, bias, indices: as `forward` had them.
        dloss_dx, mean_coeff: as `forward` left them; None for the latter without a global mean,
            which spares every row of the accumulator a visit.
        row_weights: `[N]`.
        backend: `triton` or `torch`.
        mine: bool `[N, k]`, which of the indices count; None: all.
        count: of a sharded head, how many of all its entries the bias does not mask.
    """
    accumulators = [t for t in (acc_weight, acc_bias) if t is not None]
    if not accumulators or (indices.numel() == 0 and mean_coeff is None):
        return
    vocab_size = accumulators[0].shape[0]
    coefficients = dloss_dx * row_weights.to(dloss_dx.dtype)[:, None]
    with torch.autocast(hidden.device.type, enabled=False):
        if backend == "triton" and indices.numel():
            from palu_kernels.triton import gathered_matmul as gathered

            indices = indices if mine is None else torch.where(mine, indices, -1)
            with on_device_of(hidden):
                gathered.scatter(acc_weight, acc_bias, hidden, indices, coefficients, vocab_size)
        else:
            _scatter(acc_weight, acc_bias, hidden, indices, coefficients, mine)
        if mean_coeff is not None:
            weighted = mean_coeff * row_weights.to(mean_coeff.dtype)
            parts = _parts_of_mean(vocab_size, bias, dloss_dx, count)
            if acc_weight is not None:
                acc_weight.addr_(parts, weighted @ hidden.to(dloss_dx.dtype))
            if acc_bias is not None:
                acc_bias.add_(parts * weighted.sum())


def _scatter(
    acc_weight: Tensor | None,
    acc_bias: Tensor | None,
    hidden: Tensor,
    indices: Tensor,
    coefficients: Tensor,
    mine: Tensor | None,
) -> None:
    """Row by row: the indices of a row are unique, so that no two additions meet."""
    step = max(1, BLOCK_BYTES // (hidden.shape[1] * coefficients.element_size()))
    rows = zip(hidden.to(coefficients.dtype), indices, coefficients, strict=True)
    for number, (h, chosen, c) in enumerate(rows):
        if mine is not None:  # 0 times a NaN of the hidden row would be one
            chosen, c = chosen[mine[number]], c[mine[number]]
        if acc_weight is not None:
            for part, c_part in zip(chosen.split(step), c.split(step), strict=True):
                acc_weight.index_add_(0, part, torch.outer(c_part, h))
        if acc_bias is not None:
            acc_bias.index_add_(0, chosen, c)

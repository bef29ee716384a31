"""Hidden rows meet the output head chunk by chunk: the one loop behind every linear operator.

A chunk of logits is made in a buffer, each part's row loss (`row_loss.py`) turns its share of
it into losses and overwrites it with the gradient, and a product carries the gradient to the
hidden rows. What the head's gradient needs is kept or summed as `head_gradient.py` says. Buffers
are made once a call; unless they are kept, no more logits than one chunk of the current model, and
one of the reference, exist at a time.

The gradient to the hidden rows is kept unweighted, a row as its own loss gives it; averages,
weights and whatever comes from upstream are applied in float32 afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from palu_kernels import row_loss as row_losses
from palu_kernels.backend import accum_dtype, on_device_of
from palu_kernels.distributed import Vocabulary
from palu_kernels.layout import READ
from palu_kernels.linear import sparse
from palu_kernels.row_loss import Operands, RowLoss

if TYPE_CHECKING:
    from palu_kernels.linear.head_gradient import HeadGradAccumulator
    from palu_kernels.slices import Chosen

CHUNK_BYTES = 256 * 2**20
TILE_ROWS = 64  # of a matrix product: a chunk is a whole number of them
HEAD_BLOCK_BYTES = 16 * 2**20  # of a float32 piece of the head or of its gradient


@dataclass(frozen=True)
class Head:
    """An `LMHead`'s tensors in the dtype of the products."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """scale * (h W^T + b) into `out`; the cap is left to the row losses."""
        if self.in_float32:
            for block in blocks(self.weight.shape[0], hidden.shape[1]):
                x = hidden.float() @ self.weight[block].float().t()
                x = x if self.bias is None else x + self.bias[block]
                out[:, block] = x * self.scale
            return out
        if self.bias is None:
            return torch.addmm(out, hidden, self.weight.t(), beta=0, alpha=self.scale, out=out)
        bias = self.bias
        return torch.addmm(
            bias, hidden, self.weight.t(), beta=self.scale, alpha=self.scale, out=out
        )

    def backward_hidden(self, grad: Tensor, out: Tensor) -> None:
        """Gradient of the logits -> that of the hidden rows, into `out`."""
        if self.in_float32:
            total = torch.zeros_like(out, dtype=torch.float32)
            for block in blocks(self.weight.shape[0], out.shape[1]):
                total.addmm_(grad[:, block].float(), self.weight[block].float())
            out.copy_(total * self.scale)
            return
        torch.addmm(out, grad, self.weight, beta=0, alpha=self.scale, out=out)

    @cached_property
    def in_float32(self) -> bool:
        """PyTorch's float16 products on the CPU are hundreds of times slower than float32's."""
        return self.weight.dtype == torch.float16 and self.weight.device.type == "cpu"

    def to(self, dtype: torch.dtype) -> Head:
        """Return the head with its tensors in `dtype`."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, weight=self.weight.to(dtype), bias=bias)


@dataclass(frozen=True)
class Part:
    """Consecutive rows with one loss; `data` are its integers (indices `[rows, k]` or labels
    `[rows]`), `ref_hidden` the reference's rows, where the loss needs them."""

    loss: RowLoss
    start: int
    stop: int
    data: Tensor | None
    ref_hidden: Tensor | None


def parts_of(
    losses: Sequence[RowLoss],
    counts: list[int],
    data: list[Tensor | None],
    ref_hidden: Tensor | None,
) -> list[Part]:
    parts, start, ref_start = [], 0, 0
    for loss, count, own in zip(losses, counts, data, strict=True):
        refs = None
        if loss.needs_reference and ref_hidden is not None:
            refs = ref_hidden[ref_start : ref_start + count]
            ref_start += count
        parts.append(Part(loss, start, start + count, own, refs))
        start += count
    return parts


def chunk_rows(rows: int, columns: int, element_size: int, chunk_bytes: int) -> int:
    """Rows in a chunk: whole tiles, as many as `chunk_bytes` holds but at least one, and no more
    than even out over the chunks that are needed."""
    most = chunk_bytes // (padded(columns) * element_size) // TILE_ROWS * TILE_ROWS
    chunks = -(-rows // max(most, TILE_ROWS))
    tiles = -(-rows // (max(chunks, 1) * TILE_ROWS))
    return min(tiles * TILE_ROWS, rows)


def chunk_shape(
    rows: int, columns: int, element_size: int, chunk_bytes: int = CHUNK_BYTES
) -> tuple[int, int]:
    """Return the shape of a buffer of logits for so many rows."""
    return chunk_rows(rows, columns, element_size, chunk_bytes), padded(columns)


def padded(columns: int) -> int:
    """Leading dimension of a buffer: its rows start on 16 bytes and end before zeros."""
    return -(-columns // READ) * READ


def blocks(columns: int, width: int) -> Iterator[slice]:
    """Stretches of the vocabulary of which `width` float32 entries each fit
    `HEAD_BLOCK_BYTES`."""
    step = max(1, HEAD_BLOCK_BYTES // (4 * max(width, 1)))
    for start in range(0, columns, step):
        yield slice(start, min(start + step, columns))


def buffer(like: Tensor, rows: int, columns: int) -> Tensor:
    """`[rows, padded(columns)]`, uninitialised but for the zeros from `columns` on, which a product
    with the rows before them may read."""
    whole = like.new_empty((rows, padded(columns)))
    whole[:, columns:] = 0
    return whole


def apart(rows: Tensor) -> Tensor:
    """`rows [R, D]`, or where a product reads on into the next row, whose NaN would then be the
    row's too, a copy with zeros between."""
    if rows.device.type != "cpu" or rows.shape[1] % READ == 0:
        return rows
    return buffer(rows, *rows.shape)[:, : rows.shape[1]].copy_(rows)


@dataclass(frozen=True)
class LoopInputs:
    """What the loop is given: hidden rows, heads and parts, in the dtype of the products."""

    hidden: Tensor  # [R, D]
    head: Head
    own_head: Head  # in its own dtype, for sparse parts, which work in float32
    ref_head: Head
    parts: list[Part]
    mean: tuple[Tensor, Tensor] | None  # of the head's rows, where a sparse part needs it
    chunk_bytes: int
    backend: str
    vocabulary: Vocabulary | None  # of which the heads have this rank's rows

    @property
    def columns(self) -> int:
        """What the number of chunks is decided by, the same on all ranks."""
        return self.head.weight.shape[0] if self.vocabulary is None else self.vocabulary.largest


def run(
    rows: LoopInputs,
    want_hidden: bool,
    kept: Tensor | None = None,
    sums: HeadGradAccumulator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return losses `[R]`, and the gradient of every row's own loss to its hidden row `[R, D]`
    (dtype of the products), empty where not wanted.

    Args:
        kept: `[R, V]`, where the gradient of every row's own loss to its logits is left.
        sums: what the head's gradient is added to, instead.
    """
    hidden = rows.hidden
    losses = hidden.new_empty(hidden.shape[0], dtype=accum_dtype(hidden.dtype))
    grad_hidden = torch.empty_like(hidden) if want_hidden else None
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False), on_device_of(hidden):
        for part in rows.parts:
            if part.loss.sparse and part.stop > part.start:
                compute = _sparse if rows.vocabulary is None else _sparse_slices
                compute(rows, part, losses, grad_hidden, kept, sums)
        for parts in _runs(rows.parts):
            if parts:
                _dense(rows, parts, losses, grad_hidden, kept, sums)
    if grad_hidden is None:
        return losses, hidden.new_empty(0)
    if rows.vocabulary is not None:
        work = accum_dtype(hidden.dtype)
        whole = rows.vocabulary.sum(grad_hidden.to(work), "hidden gradient")
        grad_hidden = whole.to(hidden.dtype)
    return losses, grad_hidden


def _runs(parts: list[Part]) -> list[list[Part]]:
    """Neighbouring parts that share chunks; a run may be of none."""
    runs: list[list[Part]] = [[]]
    for part in parts:
        if part.loss.sparse:
            runs.append([])
        elif part.stop > part.start:
            runs[-1].append(part)
    return runs


def _dense(
    rows: LoopInputs,
    parts: list[Part],
    losses: Tensor,
    grad_hidden: Tensor | None,
    kept: Tensor | None,
    sums: HeadGradAccumulator | None,
) -> None:
    hidden, head = rows.hidden, rows.head
    gradient = grad_hidden is not None or kept is not None or sums is not None
    first, last = parts[0].start, parts[-1].stop
    columns = head.weight.shape[0]
    step = chunk_rows(last - first, rows.columns, hidden.element_size(), rows.chunk_bytes)
    chunk = buffer(hidden, step, columns)[:, :columns] if kept is None else None
    ref_rows = max([0 if part.ref_hidden is None else len(part.ref_hidden) for part in parts])
    ref_chunk = buffer(hidden, min(step, ref_rows), columns)[:, :columns] if ref_rows else None
    for start in range(first, last, step):
        stop = min(start + step, last)
        out = kept[start:stop] if chunk is None else chunk[: stop - start]
        logits = head.logits(hidden[start:stop], out)
        for part in parts:
            a, b = max(start, part.start), min(stop, part.stop)
            if a >= b:
                continue
            ref_logits, own = None, slice(a - part.start, b - part.start)
            if part.ref_hidden is not None:
                ref_logits = rows.ref_head.logits(part.ref_hidden[own], ref_chunk[: b - a])
            operands = Operands(
                logits[a - start : b - start],
                ref_logits,
                None if part.data is None else part.data[own],
                rows.backend,
                head.softcap,
                rows.ref_head.softcap,
                rows.vocabulary,
            )
            losses[a:b] = part.loss.fused(operands, gradient)
        if grad_hidden is not None:
            head.backward_hidden(logits, grad_hidden[start:stop])
        if sums is not None:
            sums.add(slice(start, stop), logits)


def _sparse(
    rows: LoopInputs,
    part: Part,
    losses: Tensor,
    grad_hidden: Tensor | None,
    kept: Tensor | None,
    sums: HeadGradAccumulator | None,
) -> None:
    head, loss = rows.own_head, part.loss
    part_rows = slice(part.start, part.stop)
    hidden, indices = rows.hidden[part_rows], part.data
    if loss.select_by == "reference":
        indices, has_nan = _chosen(rows, part)
        hidden = torch.where(has_nan[:, None], torch.nan, hidden)
    result = sparse.forward(
        hidden,
        head.weight,
        head.bias,
        head.scale,
        head.softcap,
        indices,
        rows.mean,
        **_sparse_options(rows, loss, grad_hidden),
    )
    losses[part_rows] = result.losses
    if grad_hidden is not None:
        grad_hidden[part_rows] = result.grad_hidden
    made = indices, result.dloss_dx, result.mean_coeff if loss.needs_mean else None
    if kept is not None:
        sparse.write_logits_gradient(kept[part_rows], head.bias, head.scale, *made)
    elif sums is not None:
        sums.add_sparse(part_rows, hidden, head.bias, *made, rows.backend)


def _sparse_options(
    rows: LoopInputs, loss: RowLoss, grad_hidden: Tensor | None
) -> dict[str, str | float | bool]:
    return {
        "objective": loss.objective,
        "center_kind": loss.center_kind,
        "center_value": loss.center_value,
        "backend": rows.backend,
        "want_hidden": grad_hidden is not None,
    }


def _sparse_slices(
    rows: LoopInputs,
    part: Part,
    losses: Tensor,
    grad_hidden: Tensor | None,
    kept: Tensor | None,
    sums: HeadGradAccumulator | None,
) -> None:
    """Every rank computes the entries of S that are among its own rows of the head."""
    head, loss, vocabulary = rows.own_head, part.loss, rows.vocabulary
    part_rows = slice(part.start, part.stop)
    hidden = rows.hidden[part_rows]
    chosen = _chosen_slices(rows, part)
    result = sparse.forward_of_slices(
        hidden,
        head.weight,
        head.bias,
        head.scale,
        head.softcap,
        chosen,
        rows.mean,
        vocabulary,
        **_sparse_options(rows, loss, grad_hidden),
    )
    losses[part_rows] = result.losses
    if grad_hidden is not None:
        grad_hidden[part_rows] = result.grad_hidden
    if kept is None and sums is None:
        return
    count = sparse.live_entries(head.bias, vocabulary) if loss.needs_mean else None
    made = chosen.indices, result.dloss_dx, result.mean_coeff if loss.needs_mean else None
    if vocabulary.rows and kept is not None:
        options = head.bias, head.scale, *made, chosen.mine, count
        sparse.write_logits_gradient(kept[part_rows], *options)
    elif vocabulary.rows:
        sums.add_sparse(part_rows, hidden, head.bias, *made, rows.backend, chosen.mine, count)


def _chosen_slices(rows: LoopInputs, part: Part) -> Chosen:
    """S of a part's rows as far as this rank has it, in no more columns than it takes."""
    from palu_kernels import slices

    if part.loss.select_by == "reference":
        options = part.loss.top_k, rows.vocabulary, rows.backend
        made = [slices.select(logits, *options) for logits in _ref_logits(rows, part)]
        chosen = slices.Chosen(*map(torch.cat, zip(*made, strict=True)))
    else:
        chosen = slices.given(part.data, rows.vocabulary)
    first = (~chosen.mine).int().argsort(dim=-1, stable=True)[:, : int(chosen.mine.sum(-1).max())]
    mine = chosen.mine.gather(-1, first)
    indices = torch.where(mine, chosen.indices.gather(-1, first), 0)
    return slices.Chosen(indices, mine, chosen.has_nan)


def _chosen(rows: LoopInputs, part: Part) -> tuple[Tensor, Tensor]:
    """S of a part's rows by the reference's logits, and which rows hold a NaN."""
    chosen, has_nan = [], []
    for logits in _ref_logits(rows, part):
        chosen.append(row_losses.topk_indices(logits, part.loss.top_k, rows.backend))
        # a NaN ranks first, so it is in S
        has_nan.append(logits.gather(-1, chosen[-1].long()).isnan().any(-1))
    return torch.cat(chosen), torch.cat(has_nan)


def _ref_logits(rows: LoopInputs, part: Part) -> Iterator[Tensor]:
    """Yield the reference's logits of a part's rows chunk by chunk, in one buffer."""
    count, element_size = len(part.ref_hidden), rows.hidden.element_size()
    step = chunk_rows(count, rows.columns, element_size, rows.chunk_bytes)
    columns = rows.ref_head.weight.shape[0]
    chunk = buffer(rows.hidden, step, columns)[:, :columns]
    for start in range(0, count, step):
        ref_rows = part.ref_hidden[start : start + step]
        yield rows.ref_head.logits(ref_rows, chunk[: len(ref_rows)])

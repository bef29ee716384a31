"""Flatten and entropy over S, which is given as indices or found by `topk`.

One read of z leaves the sums of its row; all else is of the k entries of S: a program a row gathers
them, and leaves the loss and the gradient on S. Off S the gradient is a constant of the row (0 but
for flatten about the row's mean), so it is filled, and S is written over it. Only where that
constant meets masked entries or a softcap z is read again.

Bytes, in transfers of a row, after the select (1.06 to 1.25): 1 forward, 1 backward (with a softcap
or masked entries, flatten about the row's mean: 2), and k entries gathered and written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from palu_kernels.triton.row_io import (
    RowLaunch,
    apply_softcap,
    by_load,
    is_live,
    load_row,
    load_row_block,
    row_start,
    store_row_block,
)
from palu_kernels.triton.topk import topk_indices

GLOBAL_MEAN, LOCAL_MEAN, NUMBER, ENTROPY = (tl.constexpr(i) for i in range(4))
CENTERS = {"global_mean": 0, "local_mean": 1, "number": 2}
NEAR_LANES = tl.constexpr(128)  # of a split, among which a number near its mean is looked for
CHUNK = 1024  # entries of S that are gathered together
# what a split of a row leaves, float32: live entries (NaN if one is NaN), the sum of their
# distances to a number near their mean, that number
PARTIAL_SIZE = tl.constexpr(4)


@triton.jit
def near_mean(z_row, begin, first, end, cap):
    """A number near the mean of the first lanes of a split; 0 without any."""
    offsets = begin + tl.arange(0, NEAR_LANES)
    mask = (offsets >= first) & (offsets < end)
    z = tl.load(z_row + offsets, mask=mask, other=float("-inf")).to(tl.float32)
    z, _slope = apply_softcap(z, mask, cap)
    top = tl.max(tl.where(mask & is_live(z), z, float("-inf")), 0)
    # a large negative number stands for a mask in some models: it says nothing of the mean
    usual = mask & (z > top - 100.0)
    below = tl.sum(tl.where(usual, z - top, 0.0), 0)
    mean = top + below / tl.maximum(tl.sum(usual.to(tl.float32), 0), 1.0)
    # a whole number leaves 16-bit entries with few digits, whose sums stay nearly exact
    return tl.where(tl.abs(top) < float("inf"), tl.floor(mean + 0.5), 0.0)


@triton.jit
def _row_sums_kernel(
    z_ptr,
    partial_ptr,
    n_cols,
    rows_per_batch,
    stride_batch,
    stride_row,
    split_size,
    cap,
    HAS_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many entries of a split are live, NaN if it holds one, and the sum of their distances to
    a number near their mean: rows far from 0 lie nearer to it than float32 can tell."""
    row, split = tl.program_id(0), tl.program_id(1)
    z_row, first = row_start(z_ptr, row, rows_per_batch, stride_batch, stride_row, HAS_OFFSET)
    end = first + n_cols
    near = near_mean(z_row, split * split_size, first, end, cap)
    bits: tl.constexpr = z_ptr.dtype.element_ty.primitive_bitwidth
    live = tl.zeros([BLOCK * bits // 128], tl.float32)
    total = live
    for begin in range(split * split_size, min((split + 1) * split_size, end), BLOCK):
        offsets = begin + tl.arange(0, BLOCK)
        mask = (offsets >= first) & (offsets < end)
        full_block = (begin >= first) & (begin + BLOCK <= end)
        z = by_load(load_row(z_row, offsets, mask, full_block, cap), bits)
        masked = z == float("-inf")
        total += tl.sum(tl.where(masked, 0.0, z - near), 1)
        # a NaN is told apart from sums that overflow
        live += tl.sum(tl.where(masked, 0.0, tl.where(z != z, z, 1.0)), 1)
    out = partial_ptr + (row.to(tl.int64) * tl.num_programs(1) + split) * PARTIAL_SIZE
    tl.store(out, tl.sum(live, 0))
    tl.store(out + 1, tl.sum(total, 0))
    tl.store(out + 2, near)


@triton.jit
def entries_of_s(row_ptr, indices_ptr, begin, k, n_cols, cap, BLOCK: tl.constexpr):
    """-> (indices, entries of a row there under the cap, its slope, which are live or NaN, places
    inside S). An index beside the row is read from nowhere: on an accelerator it is not checked."""
    place = begin + tl.arange(0, BLOCK)
    index = tl.load(indices_ptr + place, mask=place < k, other=0).to(tl.int32)
    inside = (place < k) & (index >= 0) & (index < n_cols)
    z = tl.load(row_ptr + index, mask=inside, other=float("nan")).to(tl.float32)
    z, slope = apply_softcap(z, None, cap)
    return index, z, slope, (place < k) & (z != float("-inf")), place


@triton.jit
def _loss_kernel(
    z_ptr,
    ref_ptr,
    indices_ptr,
    partial_ptr,
    loss_ptr,
    state_ptr,
    kept_ptr,
    slopes_ptr,
    n_cols,
    rows_per_batch,
    z_stride_batch,
    z_stride_row,
    ref_rows_per_batch,
    ref_stride_batch,
    ref_stride_row,
    n_splits,
    k,
    number,
    cap,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Splits of a row and its entries of S -> its loss; state: the gradient off S, NaN or 0, and
    whether the row has masked entries; kept: S, and the gradient on S in float32.

    A NaN of the reference's row ranks first, so it is found in S. An index beside the row counts as
    a NaN."""
    row = tl.program_id(0)
    z_row, _ = row_start(z_ptr, row, rows_per_batch, z_stride_batch, z_stride_row, False)
    ref_row = z_row
    if ref_ptr is not None:
        ref_row, _ = row_start(
            ref_ptr, row, ref_rows_per_batch, ref_stride_batch, ref_stride_row, False
        )
    row = row.to(tl.int64)
    indices_ptr += row * k
    kept_ptr += row * 2 * k
    slopes_ptr += row * 2 * k + k
    near = 0.0
    live_count = 0.0
    total = 0.0
    for split in range(n_splits):
        slot = partial_ptr + (row * n_splits + split) * PARTIAL_SIZE
        split_live, split_near = tl.load(slot), tl.load(slot + 2)
        near = tl.where(live_count == 0, split_near, near)
        live_count += split_live
        total += tl.load(slot + 1) + split_live * (split_near - near)

    spoiled = live_count * 0.0
    tops = tl.full([BLOCK], float("-inf"), tl.float32)
    counts = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, k, BLOCK):
        _i, z, _s, member, _p = entries_of_s(z_row, indices_ptr, begin, k, n_cols, cap, BLOCK)
        tops = tl.maximum(tops, tl.where(member, z, float("-inf")))
        counts += tl.where(member, tl.where(z != z, z, 1.0), 0.0)
        if ref_ptr is not None:
            _i, r, _s, _m, place = entries_of_s(ref_row, indices_ptr, begin, k, n_cols, None, BLOCK)
            spoiled += tl.sum(tl.where((place < k) & (r != r), r, 0.0), 0)
    count = tl.sum(counts, 0)
    spoiled += count * 0.0
    n = tl.maximum(count, 1.0)
    top = tl.max(tops, 0)
    # distances are taken to `base`, of which deviations lie about `center`
    base = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    center = 0.0
    if KIND == GLOBAL_MEAN:
        base = near
        center = total / tl.maximum(live_count, 1.0)
    if KIND == NUMBER:
        base = number
    sums = tl.zeros([BLOCK], tl.float32)
    products = tl.zeros([BLOCK], tl.float32)
    if KIND == LOCAL_MEAN:
        for begin in range(0, k, BLOCK):
            _i, z, _s, member, _p = entries_of_s(z_row, indices_ptr, begin, k, n_cols, cap, BLOCK)
            sums += tl.where(member, z - base, 0.0)
        center = tl.sum(sums, 0) / n
        sums = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, k, BLOCK):
        _i, z, _s, member, _p = entries_of_s(z_row, indices_ptr, begin, k, n_cols, cap, BLOCK)
        distance = tl.where(member, (z - base) - center, 0.0)
        share = distance
        if KIND == ENTROPY:
            share = tl.where(member, tl.exp(distance), 0.0)
        sums += share
        products += share * distance
    shares = tl.sum(sums, 0)
    product = tl.sum(products, 0)

    off_s = 0.0
    if KIND == ENTROPY:
        log_sum = tl.where(count > 0, tl.log(shares), 0.0)
        negative_entropy = tl.where(count > 0, product / shares, 0.0) - log_sum
        loss = tl.log(n) + negative_entropy
    else:
        loss = product / n
        if KIND == GLOBAL_MEAN:
            off_s = -2.0 * (shares / n) / tl.maximum(live_count, 1.0)
    tl.store(loss_ptr + row, loss + spoiled)
    state = state_ptr + row * 4
    tl.store(state, off_s)
    tl.store(state + 1, spoiled)
    tl.store(state + 2, tl.where(live_count == n_cols, 0.0, 1.0))
    tl.store(state + 3, 0.0)
    for begin in range(0, k, BLOCK):
        index, z, cap_slope, member, place = entries_of_s(
            z_row, indices_ptr, begin, k, n_cols, cap, BLOCK
        )
        distance = (z - base) - center
        if KIND == ENTROPY:
            log_q = distance - log_sum
            slope = tl.exp(log_q) * (log_q - negative_entropy)
        else:
            slope = distance * (2.0 / n) + off_s
        slope = tl.where(member, slope * cap_slope, 0.0) + spoiled
        tl.store(kept_ptr + place, index, mask=place < k)
        tl.store(slopes_ptr + place, slope, mask=place < k)


@triton.jit
def _local_entropy_grad_kernel(
    z_ptr,
    out_ptr,
    kept_ptr,
    slopes_ptr,
    state_ptr,
    weight_ptr,
    n_cols,
    rows_per_batch,
    z_stride_batch,
    z_stride_row,
    o_stride_batch,
    o_stride_row,
    split_size,
    k,
    cap,
    HAS_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A split of a row's gradient, then S over it. `out` may be z itself: it is read entry by
    entry, and S not at all."""
    row, split = tl.program_id(0), tl.program_id(1)
    z_row, first = row_start(z_ptr, row, rows_per_batch, z_stride_batch, z_stride_row, HAS_OFFSET)
    out_row, _ = row_start(out_ptr, row, rows_per_batch, o_stride_batch, o_stride_row, HAS_OFFSET)
    end = first + n_cols
    state = state_ptr + row.to(tl.int64) * 4
    off_s, spoiled, has_masked = tl.load(state), tl.load(state + 1), tl.load(state + 2)
    weight = tl.load(weight_ptr + row)
    start = split * split_size
    stop = min(start + split_size, end)
    reads_z = off_s != 0
    if cap is None:
        reads_z &= has_masked != 0
    if reads_z:
        for begin in range(start, stop, BLOCK):
            offsets = begin + tl.arange(0, BLOCK)
            mask = (offsets >= first) & (offsets < end)
            full_block = (begin >= first) & (begin + BLOCK <= end)
            z = load_row_block(z_row, offsets, mask, full_block, float("-inf")).to(tl.float32)
            _z, cap_slope = apply_softcap(z, None, cap)
            slope = tl.where(z == float("-inf"), 0.0, off_s * cap_slope * weight) + spoiled
            store_row_block(out_row, offsets, mask, full_block, slope.to(out_ptr.dtype.element_ty))
    else:
        slope = tl.full([BLOCK], 0.0, tl.float32) + (off_s * weight + spoiled)
        for begin in range(start, stop, BLOCK):
            offsets = begin + tl.arange(0, BLOCK)
            mask = (offsets >= first) & (offsets < end)
            full_block = (begin >= first) & (begin + BLOCK <= end)
            store_row_block(out_row, offsets, mask, full_block, slope.to(out_ptr.dtype.element_ty))
    tl.debug_barrier()  # S over what other threads have written
    kept_ptr += row.to(tl.int64) * 2 * k
    slopes_ptr += row.to(tl.int64) * 2 * k + k
    for begin in range(0, k, BLOCK // 4):
        place = begin + tl.arange(0, BLOCK // 4)
        index = tl.load(kept_ptr + place, mask=place < k, other=0)
        slope = tl.load(slopes_ptr + place, mask=place < k, other=0.0) * weight
        lane = index + first
        mine = (place < k) & (index >= 0) & (lane >= start) & (lane < stop)
        tl.store(out_row + lane, slope.to(out_ptr.dtype.element_ty), mask=mine)


def forward(
    logits: Tensor,
    ref_logits: Tensor | None,
    indices: Tensor | None,
    top_k: int,
    objective: str,
    center_kind: str,
    center_value: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> row losses `[N]`, state `[N, 4]` (both float32), and for `backward` S and the bits of
    the gradient on S, int32 `[N, 2, k]`."""
    if indices is None:
        indices = topk_indices(logits if ref_logits is None else ref_logits, top_k)
    launch = RowLaunch.of(logits)
    # its rows may start elsewhere: only S is looked at
    ref_launch = None if ref_logits is None else RowLaunch.of(ref_logits)
    k = indices.shape[-1]
    losses = logits.new_empty(launch.rows, dtype=torch.float32)
    state = logits.new_empty((launch.rows, 4), dtype=torch.float32)
    kept = logits.new_empty((launch.rows, 2, k), dtype=torch.int32)
    if launch.rows == 0:
        return losses, state, kept
    partial = _row_sums(launch, softcap)
    kind = ENTROPY.value if objective == "entropy" else CENTERS[center_kind]
    block = min(CHUNK, triton.next_power_of_2(k))
    _loss_kernel[(launch.rows,)](
        launch.tensors[0],
        None if ref_launch is None else ref_launch.tensors[0],
        indices.contiguous(),
        partial,
        losses,
        state,
        kept,
        kept.view(torch.float32),
        launch.n_cols,
        launch.rows_per_batch,
        *launch.strides,
        *((1, 0, 0) if ref_launch is None else (ref_launch.rows_per_batch, *ref_launch.strides)),
        launch.splits,
        k,
        center_value,
        softcap,
        KIND=kind,
        BLOCK=block,
        num_warps=max(1, min(4, block // 64)),
    )
    return losses, state, kept


def row_sums(logits: Tensor, softcap: float | None = None) -> Tensor:
    """-> what every split of the rows leaves, float32 `[N, splits, PARTIAL_SIZE]`."""
    return _row_sums(RowLaunch.of(logits), softcap)


def _row_sums(launch: RowLaunch, softcap: float | None) -> Tensor:
    partial = launch.tensors[0].new_empty((*launch.grid, PARTIAL_SIZE.value), dtype=torch.float32)
    if launch.rows > 0:
        _row_sums_kernel[launch.grid](
            *launch.tensors, partial, *launch.sizes, softcap, **launch.constants
        )
    return partial


def backward(
    weights: Tensor,
    logits: Tensor,
    state: Tensor,
    kept: Tensor,
    out: Tensor,
    softcap: float | None = None,
) -> Tensor:
    """Writes d(sum of weights * rows)/d logits into `out`, which may be `logits` itself or is
    laid out like them (`empty_rows_like`)."""
    launch = RowLaunch.of(logits, out=out, programs=4)
    if launch.rows > 0:
        _local_entropy_grad_kernel[launch.grid](
            *launch.tensors,
            kept,
            kept.view(torch.float32),
            state,
            weights,
            *launch.sizes,
            kept.shape[-1],
            softcap,
            **launch.constants,
        )
    return out

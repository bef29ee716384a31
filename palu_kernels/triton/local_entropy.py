"""Flatten and entropy over S: one pass for the statistics of a row, one that writes its gradient.

Neither materialises S (``members.py``).

Bytes, in transfers of a row, after ``select`` (2 for 16-bit types, 4 for float32): statistics read
z and the reference's row and leave a bit a lane (2.06; given indices 1.06; 1 when z chooses), the
gradient reads z and the bits and writes one row (2.06). Forward plus backward with select: 6.1, and
0.3 more for the histograms where two rows are cut into slices of 8,192 lanes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from palu_kernels.layout import bitmap_words
from palu_kernels.triton.radix_keys import key_format
from palu_kernels.triton.radix_select import select, take_ties
from palu_kernels.triton.row_io import (
    Layout,
    as_integers,
    block_of,
    is_live,
    programs_wanted,
    row_start,
    store_lanes,
    sum_four,
)
from palu_kernels.triton.softcap import capped
from palu_kernels.triton.topk_mask import (
    BITMAP,
    CURRENT,
    REFERENCE,
    chooser_start,
    load_block,
    store_bits,
    write_bitmap,
)

CENTERS = {"global_mean": 0, "local_mean": 1, "number": 2}
NEAR_LANES = 128  # of a slice, among which a number near its mean is looked for
PARTIAL = 8  # float32 numbers that a slice of a row hands to the merge


@triton.jit
def near_mean(z_row, begin, near_lanes, first, end, cap):
    """A number near the mean of the first lanes of a slice; 0 without any."""
    lanes = begin + tl.arange(0, 128)
    live = (lanes >= first) & (lanes < end) & (lanes < begin + near_lanes)
    z = tl.load(z_row + lanes, mask=live, other=float("-inf")).to(tl.float32)
    z, _slope = capped(z, live, cap)
    top = tl.max(tl.where(live & is_live(z), z, float("-inf")), 0)
    # a large negative number stands for a mask in some models: it says nothing of the mean
    usual = live & (z > top - 100.0)
    below = tl.sum(tl.where(usual, z - top, 0.0), 0)
    mean = top + below / tl.maximum(tl.sum(usual.to(tl.float32), 0), 1.0)
    # a whole number leaves 16-bit entries with few digits, whose sums stay nearly exact
    return tl.where(tl.abs(top) < float("inf"), tl.floor(mean + 0.5), 0.0)


@triton.jit
def statistics(
    z_ptr,
    chooser_ptr,
    threshold_ptr,
    need_ptr,
    seen_ptr,
    chosen_ptr,
    partial_ptr,
    columns,
    per,
    z_outer,
    z_inner,
    chooser_outer,
    chooser_inner,
    slice_lanes,
    words,
    cap,
    near_lanes,
    ENTROPY: tl.constexpr,
    MEMBERS: tl.constexpr,
    HALF: tl.constexpr,
    INFINITY: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What a slice of a row knows: live entries (NaN if the slice holds one), their sum, k, and
    for flatten the mean of z over S and the squared deviations from it (merged block by block as
    Chan, Golub and LeVeque do, since sums of squares cancel), for entropy the online softmax of
    z over S: maximum, sum of exponentials, sum of exponentials times exponents. Sums of flatten are
    of z less the mean of the slice's first ``near_lanes`` entries: rows far from 0 lie nearer to
    their mean than float32 can tell it.

    ``chosen`` receives what the gradient needs of S: the tie cut where z chooses, bits where the
    reference does, nothing where it is the bitmap itself."""
    row, part = tl.program_id(0), tl.program_id(1)
    z_row, first = row_start(z_ptr, row, per, z_outer, z_inner, SHIFT)
    chooser_row = chooser_start(
        chooser_ptr, z_row, row, per, chooser_outer, chooser_inner, MEMBERS, SHIFT
    )
    end = first + columns
    slot = row.to(tl.int64) * tl.num_programs(1) + part
    threshold = tl.full((), 0, tl.uint32)
    need = 0
    seen = 0
    if MEMBERS != 2:
        threshold = tl.load(threshold_ptr + row).to(tl.uint32, bitcast=True)
        need = tl.load(need_ptr + row)
        seen = tl.load(seen_ptr + slot)
    searching = seen < need
    cut = tl.where(searching, end, -1)

    near = 0.0
    if not ENTROPY:
        near = near_mean(z_row, part * slice_lanes, near_lanes, first, end, cap)
    live_count = 0.0
    total = 0.0
    count = 0.0
    a = float("-inf") if ENTROPY else 0.0
    b = 0.0
    c = 0.0
    for begin in range(part * slice_lanes, min((part + 1) * slice_lanes, end), BLOCK):
        lanes, _whole, z, _slope, keys, nan, live = load_block(
            z_row, chooser_row, begin, first, end, cap, MEMBERS, HALF, INFINITY, BLOCK
        )
        takes_part = live & (is_live(z) | nan)
        if MEMBERS == 2:
            member = takes_part & (keys != 0)
        else:
            tie = live & (keys == threshold)
            cut, seen = take_ties(tie, seen, need, lanes, cut)
            member = takes_part & ((keys > threshold) | (tie & (lanes <= cut)))
        if MEMBERS == 1:
            store_bits(chosen_ptr + row.to(tl.int64) * words, member, begin, words, BLOCK)
        if not ENTROPY:
            z -= near
        here, sum_here, found, sum_found = sum_four(
            tl.where(nan & live, float("nan"), tl.where(takes_part, 1.0, 0.0)),
            tl.where(takes_part, z, 0.0),
            tl.where(member, 1.0, 0.0),
            tl.where(member, z, 0.0),
        )
        live_count += here
        total += sum_here
        if found > 0:
            if ENTROPY:
                top = tl.maximum(a, tl.max(tl.where(member, z, float("-inf")), 0))
                exponent = tl.where(member, z - top, 0.0)
                share = tl.where(member, tl.exp(exponent), 0.0)
                drop = tl.where(a == float("-inf"), 0.0, a - top)
                scale = tl.where(a == float("-inf"), 0.0, tl.exp(drop))
                c = scale * (c + b * drop) + tl.sum(share * exponent, 0)
                b = scale * b + tl.sum(share, 0)
                a = top
            else:
                mean = sum_found / found
                deviation = tl.where(member, z - mean, 0.0)
                step = mean - a
                weight = found / (count + found)
                b += tl.sum(deviation * deviation, 0) + step * step * count * weight
                a += step * weight
            count += found

    if MEMBERS == 0:
        if searching:
            if seen >= need:
                tl.store(chosen_ptr + row, cut - first)
    out = partial_ptr + slot * 8
    tl.store(out, live_count)
    tl.store(out + 1, total)
    tl.store(out + 2, count)
    tl.store(out + 3, a)
    tl.store(out + 4, b)
    tl.store(out + 5, c)
    tl.store(out + 6, near)


@triton.jit
def merge(
    partial_ptr,
    loss_ptr,
    state_ptr,
    parts,
    number,
    ENTROPY: tl.constexpr,
    CENTER: tl.constexpr,
):
    """Slices of a row -> its loss, and four numbers from which its gradient follows entry by
    entry: flatten (c less a number near it, 2/k or NaN, share of the mean, that number), entropy
    (max, log sum, H, NaN or 0)."""
    row = tl.program_id(0).to(tl.int64)
    near = 0.0
    live = 0.0
    total = 0.0
    count = 0.0
    a = float("-inf") if ENTROPY else 0.0
    b = 0.0
    c = 0.0
    for part in range(parts):
        slot = partial_ptr + (row * parts + part) * 8
        part_live, part_near = tl.load(slot), tl.load(slot + 6)
        near = tl.where(live == 0, part_near, near)
        further = part_near - near
        live += part_live
        total += tl.load(slot + 1) + part_live * further
        found = tl.load(slot + 2)
        part_a, part_b, part_c = tl.load(slot + 3), tl.load(slot + 4), tl.load(slot + 5)
        if found > 0:
            if ENTROPY:
                top = tl.maximum(a, part_a)
                drop = tl.where(a == float("-inf"), 0.0, a - top)
                scale = tl.where(a == float("-inf"), 0.0, tl.exp(drop))
                part_scale = tl.exp(part_a - top)
                c = scale * (c + b * drop) + part_scale * (part_c + part_b * (part_a - top))
                b = scale * b + part_scale * part_b
                a = top
            else:
                step = part_a + further - a
                weight = found / (count + found)
                b += part_b + step * step * count * weight
                a += step * weight
            count += found
    spoiled = live * 0.0
    k = tl.maximum(count, 1.0)
    state = state_ptr + row * 4
    if ENTROPY:
        log_sum = tl.where(count > 0, tl.log(b), 0.0)
        negative_entropy = tl.where(count > 0, c / b, 0.0) - log_sum
        loss = tl.log(k) + negative_entropy
        tl.store(state, tl.where(count > 0, a, 0.0))
        tl.store(state + 1, log_sum)
        tl.store(state + 2, -negative_entropy)
    else:
        center = number
        offset = 0.0
        if CENTER == 0:
            center = total / tl.maximum(live, 1.0)
            offset = 2.0 * (a - center) / tl.maximum(live, 1.0)
        elif CENTER == 1:
            center = a
        loss = b / k + tl.where(count > 0, (a - center) * (a - center), 0.0)
        tl.store(state, center)
        tl.store(state + 1, 2.0 / k + spoiled)
        tl.store(state + 2, tl.where(count > 0, offset, 0.0))
    tl.store(state + 3, spoiled if ENTROPY else near)
    tl.store(loss_ptr + row, loss + spoiled)


@triton.jit
def gradient(
    z_ptr,
    chooser_ptr,
    out_ptr,
    threshold_ptr,
    cut_ptr,
    state_ptr,
    weight_ptr,
    columns,
    per,
    z_outer,
    z_inner,
    bitmap_bytes,
    out_outer,
    out_inner,
    slice_lanes,
    cap,
    ENTROPY: tl.constexpr,
    MEMBERS: tl.constexpr,
    HALF: tl.constexpr,
    INFINITY: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Entry by entry, so ``out`` may be z itself. S is a bitmap, or z's own choice."""
    row, part = tl.program_id(0), tl.program_id(1)
    z_row, first = row_start(z_ptr, row, per, z_outer, z_inner, SHIFT)
    out_row, _ = row_start(out_ptr, row, per, out_outer, out_inner, SHIFT)
    chooser_row = chooser_start(chooser_ptr, z_row, row, per, 0, bitmap_bytes, MEMBERS, SHIFT)
    end = first + columns
    threshold = tl.full((), 0, tl.uint32)
    cut = 0
    if MEMBERS != 2:
        threshold = tl.load(threshold_ptr + row).to(tl.uint32, bitcast=True)
        cut = tl.load(cut_ptr + row) + first
    state = state_ptr + row.to(tl.int64) * 4
    s0, s1, s2, s3 = tl.load(state), tl.load(state + 1), tl.load(state + 2), tl.load(state + 3)
    spoiled = s3 if ENTROPY else s1 * 0.0
    weight = tl.load(weight_ptr + row)
    for begin in range(part * slice_lanes, min((part + 1) * slice_lanes, end), BLOCK):
        lanes, whole, z, cap_slope, keys, _nan, live = load_block(
            z_row, chooser_row, begin, first, end, cap, MEMBERS, HALF, INFINITY, BLOCK
        )
        if MEMBERS == 2:
            member = keys != 0
        else:
            member = (keys > threshold) | ((keys == threshold) & (lanes <= cut))
        if ENTROPY:
            log_q = z - s0 - s1
            slope = tl.where(member, tl.exp(log_q) * (log_q + s2), 0.0)
        else:
            slope = tl.where(member, ((z - s3) - s0) * s1, 0.0) - s2
        slope = tl.where(is_live(z), slope * cap_slope * weight, 0.0) + spoiled
        store_lanes(out_row, lanes, live, whole, slope.to(out_ptr.dtype.element_ty))


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
    """-> row losses ``[N]``, state ``[N, 4]`` (both float32), and S for ``backward``, int32: a
    bitmap ``[N, words]``, or (threshold key, tie cut) ``[2, N]`` where the logits chose."""
    layout = Layout.of(logits, *(() if ref_logits is None else (as_integers(ref_logits),)))
    rows, words = layout.rows, bitmap_words(layout.columns)
    losses = logits.new_empty(rows, dtype=torch.float32)
    state = logits.new_empty((rows, 4), dtype=torch.float32)
    by_current = ref_logits is None and indices is None
    chosen = logits.new_zeros((2, rows) if by_current else (rows, words), dtype=torch.int32)
    if rows == 0:
        return losses, state, chosen
    block, warps = block_of(layout.columns, logits.element_size())
    slices, slice_lanes = layout.slices(programs_wanted(logits.device), block)
    chooser, chooser_strides = layout.tensors[-1], layout.strides[-2:]
    if indices is not None:
        members = BITMAP
        write_bitmap(indices, layout, chosen)
        chooser, chooser_strides = chosen.view(torch.uint8), (0, 4 * words)
        threshold = need = seen = cut = chosen
    else:
        members = CURRENT if by_current else REFERENCE
        threshold = chosen[0] if by_current else chosen.new_zeros(rows)
        cut = chosen[1] if by_current else chosen
        # as laid out for this walk: ties are counted slice by slice
        scores = chooser.view(logits.dtype)
        selection = select(scores, top_k, threshold, slices, slice_lanes)
        need, seen = selection.need, selection.seen
    partial = logits.new_empty((rows, slices, PARTIAL), dtype=torch.float32)
    entropy = objective == "entropy"
    # eight entries a thread where keys are made: sixteen would leave room for one program on a
    # multiprocessor
    lanes = block if members == BITMAP else min(block, 256 * warps)
    if members == BITMAP:
        warps = max(warps, 4)  # short rows with fewer spill on sm_100
    statistics[(rows, slices)](
        layout.tensors[0],
        chooser,
        threshold,
        need,
        seen,
        cut,
        partial,
        layout.columns,
        layout.per,
        *layout.strides[:2],
        *chooser_strides,
        slice_lanes,
        words,
        softcap,
        # S alone counts for its own mean, which is merged block by block: numbers that stand for
        # a mask may fill the first lanes, and would take the digits of S with them.
        NEAR_LANES if center_kind == "global_mean" else 0,
        ENTROPY=entropy,
        MEMBERS=members,
        SHIFT=layout.shift,
        BLOCK=lanes,
        num_warps=warps,
        **key_format(logits),
    )
    merge[(rows,)](
        partial,
        losses,
        state,
        slices,
        center_value,
        ENTROPY=entropy,
        CENTER=CENTERS[center_kind],
        num_warps=1,
    )
    return losses, state, chosen


def backward(
    weights: Tensor,
    logits: Tensor,
    by_current: bool,
    state: Tensor,
    chosen: Tensor,
    objective: str,
    out: Tensor,
    softcap: float | None = None,
) -> Tensor:
    """Writes d(sum of weights * rows)/d logits into ``out``, which may be ``logits`` itself or is
    laid out like them (``empty_rows_like``)."""
    layout = Layout.of(logits, out=out)
    if layout.rows == 0:
        return out
    block, warps = block_of(layout.columns, logits.element_size())
    slices, slice_lanes = layout.slices(4 * programs_wanted(logits.device), block)
    gradient[(layout.rows, slices)](
        layout.tensors[0],
        layout.tensors[0] if by_current else chosen.view(torch.uint8),
        layout.tensors[1],
        chosen[0],
        chosen[1] if by_current else chosen[0],
        state,
        weights,
        layout.columns,
        layout.per,
        *layout.strides[:2],
        0 if by_current else 4 * chosen.shape[1],
        *layout.strides[2:4],
        slice_lanes,
        softcap,
        ENTROPY=objective == "entropy",
        MEMBERS=CURRENT if by_current else BITMAP,
        SHIFT=layout.shift,
        BLOCK=block,
        num_warps=warps,
        **key_format(logits),
    )
    return out

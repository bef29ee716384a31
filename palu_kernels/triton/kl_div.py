"""KL divergence of two rows: maxima and sums of both in one pass, the gradient in a second.

Bytes, in transfers of a row: 2 forward, 3 backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from palu_kernels.triton.row_io import (
    Layout,
    block_of,
    load_lanes,
    programs_wanted,
    row_start,
    store_lanes,
)
from palu_kernels.triton.softcap import capped

PARTIAL = 8


@triton.jit
def rescaled(top, new_top):
    """-> (new_top - top as an exponent shift, its exp), both 0 while nothing has been seen."""
    drop = tl.where(top == float("-inf"), 0.0, top - new_top)
    return drop, tl.where(top == float("-inf"), 0.0, tl.exp(drop))


@triton.jit
def statistics(
    a_ptr,
    b_ptr,
    partial_ptr,
    columns,
    per,
    a_outer,
    a_inner,
    b_outer,
    b_inner,
    slice_lanes,
    a_cap,
    b_cap,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """KL(a || b) over a slice of a row, both softmaxes online: for each its maximum and sum, and
    sum of exp(a - max a) * ((a - max a) - (b - max b)), and whether b lacks an entry of a."""
    row, part = tl.program_id(0), tl.program_id(1)
    a_row, first = row_start(a_ptr, row, per, a_outer, a_inner, SHIFT)
    b_row, _ = row_start(b_ptr, row, per, b_outer, b_inner, SHIFT)
    end = first + columns
    top_a = float("-inf")
    top_b = float("-inf")
    sum_a = 0.0
    sum_b = 0.0
    dot = 0.0
    lacking = 0
    for begin in range(part * slice_lanes, min((part + 1) * slice_lanes, end), BLOCK):
        lanes = begin + tl.arange(0, BLOCK)
        live = (lanes >= first) & (lanes < end)
        whole = (begin >= first) & (begin + BLOCK <= end)
        a = load_lanes(a_row, lanes, live, whole, float("-inf")).to(tl.float32)
        b = load_lanes(b_row, lanes, live, whole, float("-inf")).to(tl.float32)
        a, _slope = capped(a, live, a_cap)
        b, _slope = capped(b, live, b_cap)
        new_a = tl.maximum(top_a, tl.max(a, 0))
        new_b = tl.maximum(top_b, tl.max(b, 0))
        # a slice may hold nothing but masked entries: 0 stands in for its maximum
        a -= tl.where(new_a == float("-inf"), 0.0, new_a)
        b -= tl.where(new_b == float("-inf"), 0.0, new_b)
        in_a = a != float("-inf")
        in_b = b != float("-inf")
        share = tl.exp(a)
        drop_a, scale_a = rescaled(top_a, new_a)
        drop_b, scale_b = rescaled(top_b, new_b)
        dot = scale_a * (dot + sum_a * (drop_a - drop_b))
        dot += tl.sum(tl.where(in_a & in_b, share * (a - b), 0.0), 0)
        sum_a = scale_a * sum_a + tl.sum(share, 0)
        sum_b = scale_b * sum_b + tl.sum(tl.exp(b), 0)
        lacking |= tl.max((in_a & (in_b == 0)).to(tl.int32), 0)
        top_a = new_a
        top_b = new_b
    out = partial_ptr + (row.to(tl.int64) * tl.num_programs(1) + part) * 8
    tl.store(out, top_a)
    tl.store(out + 1, sum_a)
    tl.store(out + 2, top_b)
    tl.store(out + 3, sum_b)
    tl.store(out + 4, dot)
    tl.store(out + 5, lacking.to(tl.float32))


@triton.jit
def merge(partial_ptr, loss_ptr, state_ptr, parts, REVERSE: tl.constexpr):
    """Slices of a row -> KL, and what its gradient needs: max and log sum of the current row, max
    of the reference row, and (reverse) the mean of the shifted logit differences under p or
    (forward) the reference's log sum. A KL that is not finite leaves NaN for the log sum."""
    row = tl.program_id(0).to(tl.int64)
    top_a = float("-inf")
    top_b = float("-inf")
    sum_a = 0.0
    sum_b = 0.0
    dot = 0.0
    lacking = 0.0
    for part in range(parts):
        slot = partial_ptr + (row * parts + part) * 8
        part_a, part_b, part_dot = tl.load(slot), tl.load(slot + 2), tl.load(slot + 4)
        new_a = tl.maximum(top_a, part_a)
        new_b = tl.maximum(top_b, part_b)
        drop_a, scale_a = rescaled(top_a, new_a)
        drop_b, scale_b = rescaled(top_b, new_b)
        part_drop_a, part_scale_a = rescaled(part_a, new_a)
        part_drop_b, part_scale_b = rescaled(part_b, new_b)
        part_sum_a = tl.load(slot + 1)
        dot = scale_a * (dot + sum_a * (drop_a - drop_b))
        dot += part_scale_a * (part_dot + part_sum_a * (part_drop_a - part_drop_b))
        sum_a = scale_a * sum_a + part_scale_a * part_sum_a
        sum_b = scale_b * sum_b + part_scale_b * tl.load(slot + 3)
        lacking = tl.maximum(lacking, tl.load(slot + 5))
        top_a = new_a
        top_b = new_b
    spoiled = (sum_a + sum_b) * 0.0
    mean = tl.where(sum_a == 0, 0.0, dot / sum_a)
    log_a = tl.where(sum_a == 0, 0.0, tl.log(sum_a))
    log_b = tl.where(sum_b == 0, 0.0, tl.log(sum_b))
    kl = tl.where(sum_a == 0, 0.0, mean - log_a + log_b)
    kl = tl.where(lacking > 0, float("inf"), kl) + spoiled
    tl.store(loss_ptr + row, kl)
    spoiled = tl.where(lacking > 0, float("nan"), spoiled)
    top_a = tl.where(top_a == float("-inf"), 0.0, top_a)
    top_b = tl.where(top_b == float("-inf"), 0.0, top_b)
    state = state_ptr + row * 4
    if REVERSE:
        tl.store(state, top_a)
        tl.store(state + 1, log_a + spoiled)
        tl.store(state + 2, top_b)
        tl.store(state + 3, mean)
    else:
        # without a reference distribution there is no gradient: exp(z - 1e30) is 0
        log_b = tl.where(sum_a == 0, 1e30, log_b)
        tl.store(state, top_b)
        tl.store(state + 1, log_b + spoiled)
        tl.store(state + 2, top_a)
        tl.store(state + 3, log_a)


@triton.jit
def gradient(
    z_ptr,
    r_ptr,
    out_ptr,
    state_ptr,
    weight_ptr,
    columns,
    per,
    z_outer,
    z_inner,
    r_outer,
    r_inner,
    out_outer,
    out_inner,
    slice_lanes,
    z_cap,
    r_cap,
    REVERSE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reverse p (log p - log q - KL), forward p - q. Entry by entry, so ``out`` may be z itself."""
    row, part = tl.program_id(0), tl.program_id(1)
    z_row, first = row_start(z_ptr, row, per, z_outer, z_inner, SHIFT)
    r_row, _ = row_start(r_ptr, row, per, r_outer, r_inner, SHIFT)
    out_row, _ = row_start(out_ptr, row, per, out_outer, out_inner, SHIFT)
    end = first + columns
    state = state_ptr + row.to(tl.int64) * 4
    top_z, log_z, top_r, last = (
        tl.load(state),
        tl.load(state + 1),
        tl.load(state + 2),
        tl.load(state + 3),
    )
    spoiled = log_z * 0.0
    weight = tl.load(weight_ptr + row)
    for begin in range(part * slice_lanes, min((part + 1) * slice_lanes, end), BLOCK):
        lanes = begin + tl.arange(0, BLOCK)
        live = (lanes >= first) & (lanes < end)
        whole = (begin >= first) & (begin + BLOCK <= end)
        z = load_lanes(z_row, lanes, live, whole, float("-inf")).to(tl.float32)
        r = load_lanes(r_row, lanes, live, whole, float("-inf")).to(tl.float32)
        z, cap_slope = capped(z, live, z_cap)
        r, _slope = capped(r, live, r_cap)
        z -= top_z
        r -= top_r
        p = tl.exp(z - log_z)
        slope = p * (z - r - last) if REVERSE else p - tl.exp(r - last)
        slope = tl.where(z == float("-inf"), spoiled, slope * cap_slope * weight)
        store_lanes(out_row, lanes, live, whole, slope.to(out_ptr.dtype.element_ty))


def forward(
    logits: Tensor,
    ref_logits: Tensor,
    direction: str,
    softcap: float | None = None,
    ref_softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """-> row divergences ``[N]`` and the state ``[N, 4]`` for ``backward``, both float32."""
    reverse = direction == "reverse"
    layout = Layout.of(*((logits, ref_logits) if reverse else (ref_logits, logits)))
    losses = logits.new_empty(layout.rows, dtype=torch.float32)
    state = logits.new_empty((layout.rows, 4), dtype=torch.float32)
    if layout.rows == 0:
        return losses, state
    block, warps = block_of(layout.columns, logits.element_size())
    slices, slice_lanes = layout.slices(programs_wanted(logits.device), block)
    partial = logits.new_empty((layout.rows, slices, PARTIAL), dtype=torch.float32)
    statistics[(layout.rows, slices)](
        *layout.tensors,
        partial,
        layout.columns,
        layout.per,
        *layout.strides,
        slice_lanes,
        *((softcap, ref_softcap) if reverse else (ref_softcap, softcap)),
        SHIFT=layout.shift,
        BLOCK=block,
        num_warps=warps,
    )
    merge[(layout.rows,)](partial, losses, state, slices, REVERSE=reverse, num_warps=1)
    return losses, state


def backward(
    weights: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    state: Tensor,
    direction: str,
    out: Tensor,
    softcap: float | None = None,
    ref_softcap: float | None = None,
) -> Tensor:
    """Writes d(sum of weights * rows)/d logits into ``out``, which may be ``logits`` itself."""
    layout = Layout.of(logits, ref_logits, out=out)
    if layout.rows == 0:
        return out
    block, warps = block_of(layout.columns, logits.element_size())
    slices, slice_lanes = layout.slices(4 * programs_wanted(logits.device), block)
    gradient[(layout.rows, slices)](
        *layout.tensors,
        state,
        weights,
        layout.columns,
        layout.per,
        *layout.strides,
        slice_lanes,
        softcap,
        ref_softcap,
        REVERSE=direction == "reverse",
        SHIFT=layout.shift,
        BLOCK=block,
        num_warps=warps,
    )
    return out

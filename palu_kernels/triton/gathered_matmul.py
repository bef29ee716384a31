"""Products with chosen rows of the head, gathered as they are multiplied.

Every row of hidden states has its own S, so these are matrix times vector with the matrix picked
row by row out of the weight: each entry that is read is used once, and nothing `[N, k, D]` is
ever written. A tile of chosen rows is read 16 bytes wide along D where D and the weight's row step
are multiples of 16 (they are in almost every model); any other width and step is right, but slower.

Bytes a row of hidden states: `products` and `combine` read k * D entries of the weight each;
`scatter` reads and writes, in float32, D entries for every row of the weight that some S holds.
An index outside the vocabulary reads nothing out of bounds and makes its row NaN: on an accelerator
indices are not checked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from palu_kernels.triton.row_io import programs_wanted

# Programs of one warp, with two or more 16-byte loads of the weight a thread on their way: nothing
# passes through shared memory, and a chip is full of them.
ROW_BYTES = 1024  # of a chosen row that `_gathered_matmul_kernel` reads at once,
PLACES = 4  # and how many such rows one program reads
TILE_ROWS, TILE_WIDTH = 4, 256  # of `_gathered_combine_kernel`
SCATTER_WIDTH = 1024


@triton.jit
def _gathered_matmul_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    indices_ptr,
    out_ptr,
    k,
    width,
    vocab_size,
    weight_step,
    weight_column,
    BIAS: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """h . W_i + b_i for a few places of S of one row."""
    groups = tl.cdiv(k, PLACES)
    row = (tl.program_id(0) // groups).to(tl.int64)
    begin = (tl.program_id(0) % groups) * PLACES
    h_row = hidden_ptr + row * width
    for place in range(begin, min(begin + PLACES, k)):
        chosen = tl.load(indices_ptr + row * k + place).to(tl.int64)
        valid = (chosen >= 0) & (chosen < vocab_size)
        chosen = tl.where(valid, chosen, 0)
        w_row = weight_ptr + chosen * weight_step
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = columns < width
            offsets = columns.to(tl.int64) * weight_column
            w = tl.load(w_row + offsets, mask=mask, other=0.0)
            h = tl.load(h_row + columns, mask=mask, other=0.0)
            sums += w.to(tl.float32) * h.to(tl.float32)
        x = tl.sum(sums, 0)
        if BIAS:
            x += tl.load(bias_ptr + chosen)
        tl.store(out_ptr + row * k + place, tl.where(valid, x, float("nan")))


@triton.jit
def _gathered_combine_kernel(
    weight_ptr,
    slopes_ptr,
    indices_ptr,
    out_ptr,
    k,
    width,
    vocab_size,
    weight_step,
    weight_column,
    split_places,
    TILE_ROWS: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
):
    """Sum of slope_i * W_i over a split of S of one row, for some columns of W."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    columns = tl.program_id(1) * TILE_WIDTH + tl.arange(0, TILE_WIDTH)
    mask = columns < width
    offsets = columns.to(tl.int64) * weight_column
    end = min((split + 1) * split_places, k)
    sums = tl.zeros([TILE_ROWS, TILE_WIDTH], tl.float32)
    for begin in range(split * split_places, end, TILE_ROWS):
        places = begin + tl.arange(0, TILE_ROWS)
        inside = places < end
        chosen = tl.load(indices_ptr + row * k + places, mask=inside, other=0).to(tl.int64)
        slope = tl.load(slopes_ptr + row * k + places, mask=inside, other=0.0)
        valid = inside & (chosen >= 0) & (chosen < vocab_size)
        tile = tl.load(
            weight_ptr + (chosen * weight_step)[:, None] + offsets[None, :],
            mask=valid[:, None] & mask[None, :],
            other=0.0,
        )
        sums += tile.to(tl.float32) * slope[:, None]
    out = out_ptr + (split.to(tl.int64) * tl.num_programs(0) + row) * width
    tl.store(out + columns, tl.sum(sums, 0), mask=mask)


@triton.jit
def _gathered_scatter_kernel(
    hidden_ptr,
    keys_ptr,
    ends_ptr,
    order_ptr,
    coefficients_ptr,
    weight_ptr,
    bias_ptr,
    k,
    width,
    vocab_size,
    weight_step,
    weight_column,
    bias_step,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Adds coefficient * h to the row of the weight gradient that a run of equal keys names.

    Only the program at the first place of a run works: it alone touches that row.
    """
    place = tl.program_id(0)
    key = tl.load(keys_ptr + place).to(tl.int64)
    before = tl.load(keys_ptr + place - 1, mask=place > 0, other=-1).to(tl.int64)
    if (key != before) & (key >= 0) & (key < vocab_size):
        columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        mask = columns < width
        sums = tl.zeros([WIDTH], tl.float32)
        total = 0.0
        for member in range(place, tl.load(ends_ptr + place).to(tl.int32)):
            source = tl.load(order_ptr + member)
            coefficient = tl.load(coefficients_ptr + source)
            total += coefficient
            if WEIGHT:
                h_row = hidden_ptr + (source // k) * width
                h = tl.load(h_row + columns, mask=mask, other=0.0)
                sums += coefficient * h.to(tl.float32)
        if WEIGHT:
            out = weight_ptr + key * weight_step + columns.to(tl.int64) * weight_column
            tl.store(out, tl.load(out, mask=mask, other=0.0) + sums, mask=mask)
        if BIAS:
            if tl.program_id(1) == 0:
                slot = bias_ptr + key * bias_step
                tl.store(slot, tl.load(slot) + total)


def products(hidden: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor) -> Tensor:
    """h_r . W_i + b_i for i in S_r: `hidden [N, D]`, `weight [V, D]` of any strides, `bias
    [V]`, `indices [N, k]` -> float32 `[N, k]`."""
    rows, k = indices.shape
    out = hidden.new_empty((rows, k), dtype=torch.float32)
    if rows == 0:
        return out
    _gathered_matmul_kernel[(rows * triton.cdiv(k, PLACES),)](
        hidden.contiguous(),
        weight,
        weight if bias is None else bias.float().contiguous(),
        indices.contiguous(),
        out,
        k,
        weight.shape[1],
        weight.shape[0],
        *weight.stride(),
        BIAS=bias is not None,
        PLACES=PLACES,
        BLOCK=ROW_BYTES // weight.element_size(),
        num_warps=1,
    )
    return out


def combine(slopes: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """Sum over i in S_r of slope_ri * W_i: `slopes` float32 `[N, k]` -> float32 `[N, D]`.

    S is cut into splits until the programs fill the chip; they are added afterwards, always in the
    same order.
    """
    rows, k = indices.shape
    width = weight.shape[1]
    blocks = triton.cdiv(width, TILE_WIDTH)
    tiles = triton.cdiv(k, TILE_ROWS)
    # at least two tiles each: a split costs a row of float32 sums
    wanted = max(1, min(tiles // 2, 4 * programs_wanted(weight.device) // max(rows * blocks, 1)))
    split_tiles = triton.cdiv(tiles, wanted)
    n_splits = triton.cdiv(tiles, split_tiles)
    out = slopes.new_empty((n_splits, rows, width))
    if rows > 0:
        _gathered_combine_kernel[(rows, blocks, n_splits)](
            weight,
            slopes.contiguous(),
            indices.contiguous(),
            out,
            k,
            width,
            weight.shape[0],
            *weight.stride(),
            split_tiles * TILE_ROWS,
            TILE_ROWS=TILE_ROWS,
            TILE_WIDTH=TILE_WIDTH,
            num_warps=1,
        )
    return out[0] if n_splits == 1 else out.sum(0)


def scatter(
    acc_weight: Tensor | None,
    acc_bias: Tensor | None,
    hidden: Tensor,
    indices: Tensor,
    coefficients: Tensor,
    vocab_size: int,
) -> None:
    """In place: `acc_weight[i] += c_ri * h_r` and `acc_bias[i] += c_ri` for i in S_r, both
    accumulators float32; `coefficients` float32 `[N, k]`.

    Entries are sorted by the row of the weight they belong to, and each such row is added up by
    one program, in the order of the hidden rows: no atomics, the same sums every time.
    """
    places, k = indices.numel(), indices.shape[1]
    if places == 0 or (acc_weight is None and acc_bias is None):
        return
    # where one of them is not wanted, the other stands in for pointers that are not used
    hidden = acc_bias if acc_weight is None else hidden
    keys, order = indices.reshape(-1).sort(stable=True)
    width = 1 if acc_weight is None else hidden.shape[1]
    columns = min(SCATTER_WIDTH, max(128, triton.next_power_of_2(width)))
    _gathered_scatter_kernel[(places, triton.cdiv(width, columns))](
        hidden.contiguous(),
        keys,
        torch.searchsorted(keys, keys, right=True),
        order,
        coefficients.contiguous(),
        acc_bias if acc_weight is None else acc_weight,
        acc_weight if acc_bias is None else acc_bias,
        k,
        width,
        vocab_size,
        *((0, 0) if acc_weight is None else acc_weight.stride()),
        0 if acc_bias is None else acc_bias.stride(0),
        WEIGHT=acc_weight is not None,
        BIAS=acc_bias is not None,
        WIDTH=columns,
        num_warps=columns // 256 if columns >= 256 else 1,
    )

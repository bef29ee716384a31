"""Dense or sparse: what a forget loss on all rows of the head costs beside one on chosen rows.

Estimates of nanoseconds from a handful of constants a device: right to a factor of about two, which
is all that a choice between roads many times apart needs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from palu_kernels.reference import work_dtype

# The PyTorch road's block of gathered rows, in the dtype they are worked in: on a CPU with 32 MB of
# L3 larger ones leave the cache before they are used, smaller ones cost in calls.
BLOCK_BYTES = 8 << 20


class _Costs(NamedTuple):
    """Nanoseconds."""

    read: float  # an entry of the weight, read in order
    multiply: float  # a multiply-add of a product with the whole weight
    logit: float  # a logit: written, read by the row loss, overwritten by its gradient
    gather: float  # an entry of a chosen row, once read and multiplied
    scatter: float  # an entry added to a chosen row of the weight gradient
    spread: float  # an entry of the weight gradient, when a vector is added to every row
    row: float  # a row of hidden states, whatever its size
    call: float  # a call


# By device and bytes of an entry. CPU: measured on two cores of a 2.6 GHz AMD EPYC (Zen 5, AVX-512
# with bfloat16), torch 2.13, V = 128,256, D = 2,048, 1 to 200 rows, k = 50 to 20,000, and bfloat16
# again at D = 1,024, V = 32,000 and 128,256, up to 1,024 rows (``benchmarks/results/scaling.csv``);
# a float16 product is many times slower there than the bfloat16 one whose constant serves for it.
# CUDA: reasoned for an H100, not measured: 2.8 TB/s in order and 2 TB/s gathered, 600 (bfloat16)
# and 50 (float32) TFLOP/s, five transfers of a logit, 20 launches a call of the sparse road.
_COSTS = {
    ("cpu", 4): _Costs(0.18, 0.012, 1.6, 0.27, 0.5, 0.14, 5e4, 1e5),
    ("cpu", 2): _Costs(0.20, 0.0026, 1.3, 0.42, 0.5, 0.14, 5e4, 1e5),
    ("cuda", 4): _Costs(1.4e-3, 4e-5, 7e-3, 2e-3, 4e-3, 3e-3, 0.0, 1e5),
    ("cuda", 2): _Costs(7e-4, 3.3e-6, 3.6e-3, 1e-3, 4e-3, 3e-3, 0.0, 1e5),
}


def cheaper(
    rows: int,
    k: int,
    vocab_size: int,
    hidden_size: int,
    *,
    device_type: str,
    dtype: torch.dtype,
    train_head: bool,
    global_mean: bool,
    logits_needed_anyway: bool = False,
) -> bool:
    """Whether loss and gradients cost less from chosen rows than from all logits.

    Dense: a product for the logits (unless they are needed anyway), one for the hidden gradient and
    one for the weight gradient, each at the speed of memory or of arithmetic, whichever is slower,
    and the row loss on ``rows * V`` logits. Sparse: chosen rows read twice (on the CPU once, where
    those of one row of hidden states fit a block), and with a head that trains a scatter and, for
    the global mean, the mean row taken anew and a vector added to every row of the weight gradient.
    """
    bytes_each = 2 if dtype.itemsize == 2 else 4
    cost = _COSTS["cpu" if device_type == "cpu" else "cuda", bytes_each]
    weight = vocab_size * hidden_size
    chosen = rows * k * hidden_size
    products = 1 + (not logits_needed_anyway) + train_head
    dense = products * max(weight * cost.read, rows * weight * cost.multiply)
    dense += rows * vocab_size * cost.logit
    fits = k * hidden_size * work_dtype(dtype).itemsize <= BLOCK_BYTES
    passes = 1 if device_type == "cpu" and fits else 2
    sparse = cost.call + rows * cost.row + passes * chosen * cost.gather
    if train_head:
        sparse += chosen * cost.scatter
        sparse += global_mean * weight * (cost.read + cost.spread)
    return sparse < dense

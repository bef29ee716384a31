"""Dense or sparse: what a forget loss on all rows of the head costs beside one on chosen rows.

Estimates of nanoseconds from a handful of constants a device: right to a factor of about two, which
is all that a choice between paths many times apart needs.
"""

from __future__ import annotations

import logging
from typing import Literal, NamedTuple, get_args

import torch

from palu_kernels import validation
from palu_kernels.backend import accum_dtype

# The PyTorch backend's block of gathered rows, in the dtype they are worked in: on a CPU with 32 MB
# of L3 larger ones leave the cache before they are used, smaller ones cost in calls.
BLOCK_BYTES = 8 << 20

Implementation = Literal["auto", "dense", "sparse"]
IMPLEMENTATIONS = get_args(Implementation)

logger = logging.getLogger(__name__)
_logged: set[tuple] = set()


class _Costs(NamedTuple):
    """Nanoseconds."""

    read: float  # an entry of the weight, read in order
    multiply: float  # a multiply-add of a product with the whole weight
    logit: float  # a logit: written, read by the row loss, overwritten by its gradient
    gather: float  # an entry of a chosen row, once read and multiplied
    row: float  # a row of hidden states, whatever its size
    call: float  # a call


# By device and bytes of an entry. CPU: measured on two cores of a 2.6 GHz AMD EPYC (Zen 5, AVX-512
# with bfloat16), torch 2.13, V = 128,256, D = 2,048, 1 to 200 rows, k = 50 to 20,000, and bfloat16
# again at D = 1,024, V = 32,000 and 128,256, up to 1,024 rows (`benchmarks/results/scaling.csv`);
# a float16 product is many times slower there than the bfloat16 one whose constant serves for it.
# CUDA: reasoned for an H100, not measured: 2.8 TB/s in order and 2 TB/s gathered, 600 (bfloat16)
# and 50 (float32) TFLOP/s, five transfers of a logit, 20 launches a sparse call.
_COSTS = {
    ("cpu", 4): _Costs(0.18, 0.012, 1.6, 0.27, 5e4, 1e5),
    ("cpu", 2): _Costs(0.20, 0.0026, 1.3, 0.42, 5e4, 1e5),
    ("cuda", 4): _Costs(1.4e-3, 4e-5, 7e-3, 2e-3, 0.0, 1e5),
    ("cuda", 2): _Costs(7e-4, 3.3e-6, 3.6e-3, 1e-3, 0.0, 1e5),
}


def prefer_sparse(
    rows: int,
    k: int,
    vocab_size: int,
    hidden_size: int,
    *,
    device_type: str,
    dtype: torch.dtype,
    train_head: bool,
    global_mean: bool,
) -> bool:
    """Whether loss and gradients cost less from chosen rows than from all logits.

    Dense: a product for the logits, one for the hidden gradient and
    one for the weight gradient, each at the speed of memory or of arithmetic, whichever is slower,
    and the row loss on `rows * V` logits. Sparse: chosen rows read twice (on the CPU once, where
    those of one row of hidden states fit a block), and with a head that trains a scatter and, for
    the global mean, the mean row taken anew and a vector added to every row of the weight gradient.
    """
    bytes_each = 2 if dtype.itemsize == 2 else 4
    cost = _COSTS["cpu" if device_type == "cpu" else "cuda", bytes_each]
    weight = vocab_size * hidden_size
    chosen = rows * k * hidden_size
    product = max(weight * cost.read, rows * weight * cost.multiply)
    logits = rows * vocab_size * cost.logit
    dense = (2 + train_head) * product + logits
    fits = k * hidden_size * accum_dtype(dtype).itemsize <= BLOCK_BYTES
    passes = 1 if device_type == "cpu" and fits else 2
    sparse = cost.call + rows * cost.row + passes * chosen * cost.gather
    if train_head:
        sparse += product + logits / 2 + global_mean * weight * cost.read
    return sparse < dense


def needs_mean(objective: str, center_kind: str) -> bool:
    """Whether `forward` wants a `mean_row`."""
    return objective == "flatten" and center_kind == "global_mean"


def choose(
    implementation: str,
    objective: str,
    center_kind: str,
    softcap: float | None,
    *,
    rows: int,
    k: int,
    vocab_size: int,
    hidden_size: int,
    device_type: str,
    dtype: torch.dtype,
    train_head: bool,
) -> bool:
    """Return True to use the sparse implementation: as requested, or, for `auto`, if it applies and
    the cost model prefers it. The automatic choice is logged once for every kind of call.

    Raises:
        ValueError: `implementation` is unknown, or is `sparse` where only dense is right.
    """
    validation.choice("implementation", implementation, IMPLEMENTATIONS)
    global_mean = needs_mean(objective, center_kind)
    # under a softcap the mean is no function of the mean row, and needs what is outside S
    possible = softcap is None or not global_mean
    if implementation == "sparse" and not possible:
        raise ValueError(
            f"implementation is 'sparse', center is {center_kind!r} and softcap is {softcap}; the "
            "mean of capped logits needs all of them: implementation must be 'auto' or 'dense' "
            "here (or center 'local_mean' or a number, or softcap None)"
        )
    if implementation != "auto":
        return implementation == "sparse"
    chosen = possible and prefer_sparse(
        rows,
        k,
        vocab_size,
        hidden_size,
        device_type=device_type,
        dtype=dtype,
        train_head=train_head,
        global_mean=global_mean,
    )
    kind = (chosen, objective, center_kind, softcap, k, vocab_size, hidden_size, device_type, dtype)
    if not torch.compiler.is_compiling() and (kind, train_head) not in _logged:
        _logged.add((kind, train_head))
        logger.info(
            "%s implementation for %s, center %s, softcap %s, %d rows, k = %d, V = %d, D = %d "
            "on %s in %s, head %s",
            "sparse" if chosen else "dense",
            objective,
            center_kind,
            softcap,
            rows,
            k,
            vocab_size,
            hidden_size,
            device_type,
            dtype,
            "trained" if train_head else "frozen",
        )
    return chosen

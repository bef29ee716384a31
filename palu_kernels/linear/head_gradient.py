"""The gradient of a head that trains, in one of two ways.

Where the gradient of all logits `[R, V]` is no larger than float32 sums `[V, D]` would be (every
usual batch), forward keeps it, unweighted, and backward makes the weight's gradient in one product
with the hidden rows, each times what its loss is worth by then: exact for any gradient from
upstream, and written once, in the weight's own dtype. Otherwise forward adds up the products of
chunks in float32, of rows weighted by at most 1 in size, and backward multiplies by the common
factor while it casts.

float64 is summed in float64, everything else in float32.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from palu_kernels.backend import accum_dtype
from palu_kernels.linear import sparse
from palu_kernels.linear.chunked import Head, blocks, padded


def is_kept(rows: int, columns: int, width: int, element_size: int) -> bool:
    """Whether the gradient of the logits takes no more bytes than sums of the weight's would."""
    return rows * padded(columns) * element_size <= columns * width * max(element_size, 4)


def weight_gradient(grad: Tensor, hidden: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient `[V, D]` in `dtype`.

    Args:
        grad: `[R, V]`, of every row's own loss to its logits.
        hidden: `[R, D]` in the dtype of `grad`.
        weights: `[R]`, what each of these losses is worth; float32 (float64 for float64).
    """
    left, common = grad.t(), None
    if grad.dtype == torch.float16:  # small weights are no numbers of its range
        common = largest(weights)
        weights = weights / torch.where(common > 0, common, 1)
    right = (hidden * weights[:, None]).to(grad.dtype)
    if common is None and dtype == grad.dtype:
        return left @ right
    if common is None and dtype == torch.float32 and _makes_float32(left):
        return product(left, right)
    out = left.new_empty((len(left), right.shape[1]), dtype=dtype)
    for block in blocks(*out.shape):
        made = product(left[block], right)
        out[block] = made if common is None else made * common
    return out


def bias_gradient(grad: Tensor, weights: Tensor) -> Tensor:
    """Return the gradient `[V]` in the dtype of `weights`; both as in `weight_gradient`."""
    out = weights.new_empty(grad.shape[1])
    for block in blocks(*grad.t().shape):
        out[block] = weights @ grad[:, block].to(weights.dtype)
    return out


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ right`: of half precision in float32 where the device has such a product, and
    of float16 on the CPU, where one in float16 is hundreds of times slower."""
    if _makes_float32(left):
        return torch.mm(left, right, out_dtype=torch.float32)
    if left.dtype == torch.float16 and left.device.type == "cpu":
        return left.float() @ right.float()
    return left @ right


def _makes_float32(left: Tensor) -> bool:
    """Whether PyTorch has `out_dtype` for it."""
    half = left.dtype in (torch.float16, torch.bfloat16)
    return half and left.device.type == "cuda" and torch.version.hip is None


@cache
def _adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch adds a half-precision product to float32 sums in one call; not every release
    that has `out_dtype` does."""
    half = torch.ones(16, 16, dtype=dtype, device=device)
    sums = half.float()
    try:
        torch.addmm(sums, half, half, out_dtype=torch.float32, out=sums)
    except (RuntimeError, TypeError):
        return False
    return True


def largest(weights: Tensor) -> Tensor:
    """The largest size of weights `[R]`, 0-dim."""
    return weights.abs().max() if weights.numel() else weights.new_zeros(())


def scaled(sums: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `(sums * factor).to(dtype)`, a piece at a time: as a whole it would be there in
    float32 once more, and it is the largest tensor of a step."""
    if dtype == sums.dtype or sums.device.type == "cuda":  # which casts without a copy
        return torch.mul(sums, factor, out=torch.empty_like(sums, dtype=dtype))
    out = torch.empty_like(sums, dtype=dtype)
    for block in blocks(*sums.shape):
        out[block] = sums[block] * factor
    return out


class HeadGradAccumulator:
    """The sums of rows weighted by `weights [R]`; `largest(weights)` times them is the gradient."""

    def __init__(
        self, head: Head, hidden: Tensor, weights: Tensor, want_weight: bool, want_bias: bool
    ) -> None:
        self.hidden = hidden
        self.shape = head.weight.shape
        self.want_weight = want_weight
        self.weight: Tensor | None = None  # made by what is first added
        common = largest(weights)
        self.row_scale = weights / torch.where(common > 0, common, 1)
        self.logit_scale = head.scale
        self.work = accum_dtype(hidden.dtype)
        self.bias = hidden.new_zeros(self.shape[:1], dtype=self.work) if want_bias else None

    def add(self, rows: slice, grad: Tensor) -> None:
        """`grad [n, V]` of the logits before cap and after scale, of the rows `rows`."""
        weights = self.row_scale[rows] * self.logit_scale
        if self.want_weight:
            hidden = (self.hidden[rows] * weights[:, None]).to(grad.dtype)
            self._add_product(grad.t(), hidden)
        if self.bias is not None:
            self.bias += bias_gradient(grad, weights)

    def _add_product(self, left: Tensor, right: Tensor) -> None:
        first = self.weight is None
        if first:
            self.weight = self.hidden.new_empty(self.shape, dtype=self.work)
        beta = 0 if first else 1
        if left.dtype == self.work:
            torch.addmm(self.weight, left, right, beta=beta, out=self.weight)
        elif _makes_float32(left) and _adds_in_float32(left.device, left.dtype):
            options = {"out_dtype": self.work, "beta": beta, "out": self.weight}
            torch.addmm(self.weight, left, right, **options)
        else:
            for block in blocks(*self.shape):
                made = product(left[block], right)
                self.weight[block].copy_(made) if first else self.weight[block].add_(made)

    def add_sparse(
        self,
        rows: slice,
        hidden: Tensor,
        bias: Tensor | None,
        indices: Tensor,
        dloss_dx: Tensor,
        mean_coeff: Tensor | None,
        backend: str,
        mine: Tensor | None = None,
        count: Tensor | int | None = None,
    ) -> None:
        """What `sparse.forward` left of the rows `rows`; all else as in `add_weight_gradient`."""
        self._zeros()
        row_scale = self.row_scale[rows]
        sparse.add_weight_gradient(
            self.weight,
            self.bias,
            hidden,
            bias,
            indices,
            dloss_dx,
            mean_coeff,
            row_scale,
            backend=backend,
            mine=mine,
            count=count,
        )

    def _zeros(self) -> None:
        if self.want_weight and self.weight is None:
            self.weight = self.hidden.new_zeros(self.shape, dtype=self.work)

    def results(self) -> tuple[Tensor, Tensor]:
        """Return the sums of weight and bias; empty where not wanted."""
        self._zeros()
        empty = self.row_scale.new_empty
        weight, bias = self.weight, self.bias
        return empty(0) if weight is None else weight, empty(0) if bias is None else bias

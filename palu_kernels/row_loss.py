"""Row losses: the loss of a row of logits and its gradient, on either backend. One class a loss.

A loss is used in two ways. The op on logits (`logits_op.py`) calls `forward`, and `backward` when
the gradient is asked for. The chunk loop (`linear/chunked.py`) and the op by roles (`roles.py`)
call `fused`, which overwrites the logits with their gradient at once. Logits are before the head's
softcap, and so is the gradient: the head's products need no pass of their own.
"""

from __future__ import annotations

import ast
import importlib
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from palu_kernels import reference, torch_backend, validation
from palu_kernels.backend import accum_dtype
from palu_kernels.distributed import Vocabulary
from palu_kernels.layout import gradient_rows_like

STATE = 4  # float32 values a row that a forward leaves for its backward


@dataclass(frozen=True)
class Operands:
    """What a row loss is computed from; `data` are top-k indices `[N, k]` or labels `[N]`."""

    logits: Tensor  # [N, V], or for the op on logits [B, T, V]
    ref_logits: Tensor | None
    data: Tensor | None
    backend: str  # triton or torch
    softcap: float | None = None
    ref_softcap: float | None = None
    vocabulary: Vocabulary | None = None  # of which the logits are this rank's slice


class RowLoss:
    """A loss of rows; a subclass says what it needs and how either backend computes it."""

    needs_reference: ClassVar[bool] = False  # the reference's logits of its rows
    needs_mean: ClassVar[bool] = False  # the mean row of the head's weight
    sparse: ClassVar[bool] = False  # without logits: the chunk loop calls `linear/sparse.py`

    def torch_tiles(self, x: Operands, grad: Tensor | None, weights: Tensor | None) -> Tensor:
        """Return losses `[N]`; write the gradient, times `weights [N]`, into `grad`."""
        raise NotImplementedError

    def triton_forward(self, x: Operands) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `forward` does."""
        raise NotImplementedError

    def triton_backward(
        self, weights: Tensor, x: Operands, state: Tensor, kept: Tensor, grad: Tensor
    ) -> None:
        """Write the gradient, times `weights [N]`, into `grad`, which may be the logits."""
        raise NotImplementedError

    def kept_shape(self, x: Operands) -> tuple[int, ...]:
        """Return the shape of `kept`, the int32 tensor that a forward leaves beside its state."""
        return (math.prod(x.logits.shape[:-1]), 0)

    def saved(self, x: Operands) -> tuple[Tensor | None, Tensor | None]:
        """Return the reference's logits and the integers if backward reads them again."""
        return None, x.data

    def check_values(self, data: Tensor, vocab_size: int) -> None:
        """Raise ValueError for integers that are out of range."""

    def count(self, rows: int, data: Tensor | None) -> Tensor | int:
        """Return what a mean over the rows divides by."""
        return rows

    def fused(self, x: Operands, gradient: bool, weights: Tensor | None = None) -> Tensor:
        """Return losses `[N]`; with `gradient`, overwrite the logits with theirs."""
        if x.vocabulary is not None:
            losses, made = self.slice_forward(x)
            if gradient and x.logits.shape[-1]:
                weights = torch.ones_like(losses) if weights is None else weights
                self.slice_backward(weights, x, made, x.logits)
            return losses
        if x.backend == "torch":
            return self.torch_tiles(x, x.logits if gradient else None, weights)
        losses, state, kept = self.triton_forward(x)
        if gradient:
            weights = torch.ones_like(losses) if weights is None else weights
            self.triton_backward(weights, x, state, kept, x.logits)
        return losses

    def forward(self, x: Operands) -> tuple[Tensor, Tensor, Tensor]:
        """Return losses `[N]`, and for `backward` float32 state `[N, STATE]` and int32 `kept`."""
        if x.backend == "triton":
            return self.triton_forward(x)
        rows = math.prod(x.logits.shape[:-1])
        losses = x.logits.new_empty(rows, dtype=accum_dtype(x.logits.dtype))
        kept = x.logits.new_zeros(self.kept_shape(x), dtype=torch.int32)
        state = losses.new_zeros((rows, STATE), dtype=torch.float32)
        for part, block, _ in _blocks(x):
            losses[part] = self.torch_forward(block, state[part], kept[part])
        return losses, state, kept

    def backward(self, weights: Tensor, x: Operands, state: Tensor, kept: Tensor) -> Tensor:
        """Return the gradient of `sum(weights * losses)` to the logits."""
        grad = gradient_rows_like(x.logits)
        if x.backend == "triton":
            self.triton_backward(weights, x, state, kept, grad)
            return grad
        for part, block, block_grad in _blocks(x, grad):
            self.torch_backward(weights[part], block, state[part], kept[part], block_grad)
        return grad

    def torch_forward(self, x: Operands, state: Tensor, kept: Tensor) -> Tensor:
        """Return losses `[N]`; fill what `torch_backward` reads of `state` and `kept`."""
        return self.torch_tiles(x, None, None)

    def torch_backward(
        self, weights: Tensor, x: Operands, state: Tensor, kept: Tensor, grad: Tensor
    ) -> None:
        """Write the gradient, times `weights [N]`, into `grad`."""
        self.torch_tiles(x, grad, weights)

    def slice_forward(self, x: Operands) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return losses `[N]` of rows `[N, V]` whose slices are on the ranks of `x.vocabulary`, and
        what `slice_backward` needs (`slices.py`)."""
        raise NotImplementedError(f"{type(self).__name__} is not defined over a sharded vocabulary")

    def slice_backward(
        self, weights: Tensor, x: Operands, made: tuple[Tensor, ...], grad: Tensor
    ) -> None:
        """Write the gradient of this slice, times `weights [N]`, into `grad`, which may be the
        logits."""
        raise NotImplementedError


def _blocks(
    x: Operands, grad: Tensor | None = None
) -> Iterator[tuple[slice, Operands, Tensor | None]]:
    """Yield which rows, their operands and their part of `grad` as views `[N, V]`: all rows at
    once where the strides of `[B, T, V]` allow it, else batch by batch."""
    data = None if x.data is None else x.data.reshape(-1, *x.data.shape[x.logits.dim() - 1 :])
    tensors = (x.logits, x.ref_logits, grad)
    try:
        views = [[None if t is None else t.view(-1, t.shape[-1]) for t in tensors]]
    except RuntimeError:
        views = [[None if t is None else t[i] for t in tensors] for i in range(len(x.logits))]
    start = 0
    for logits, ref_logits, block_grad in views:
        part = slice(start, start := start + len(logits))
        block = replace(
            x, logits=logits, ref_logits=ref_logits, data=None if data is None else data[part]
        )
        yield part, block, block_grad


@dataclass(frozen=True)
class LocalEntropy(RowLoss):
    """PALU's forget loss; `select_by` says what S comes from: reference, indices or current.

    `sparse` is of hidden rows alone: no logits outside S are made.
    """

    top_k: int
    objective: str
    center_kind: str
    center_value: float
    select_by: str
    sparse: bool = False

    @property
    def needs_reference(self) -> bool:
        return self.select_by == "reference"

    @property
    def needs_mean(self) -> bool:
        is_global = self.objective == "flatten" and self.center_kind == "global_mean"
        return self.sparse and is_global

    def check_values(self, data: Tensor, vocab_size: int) -> None:
        torch_backend.check_indices(data.reshape(-1, data.shape[-1]), vocab_size)

    def kept_shape(self, x: Operands) -> tuple[int, ...]:
        """S: from PyTorch its indices, or if they were given its entries; from the kernels indices
        and the gradient there."""
        rows, k = math.prod(x.logits.shape[:-1]), min(self.top_k, x.logits.shape[-1])
        return (rows, k) if x.backend == "torch" else (rows, 2, k)

    def saved(self, x: Operands) -> tuple[Tensor | None, Tensor | None]:
        return None, x.data if x.backend == "torch" else None

    def torch_tiles(self, x: Operands, grad: Tensor | None, weights: Tensor | None) -> Tensor:
        options = (*self._torch_options, x.softcap, grad, weights)
        return torch_backend.local_entropy(x.logits, x.ref_logits, x.data, *options)

    def torch_forward(self, x: Operands, state: Tensor, kept: Tensor) -> Tensor:
        options = (*self._torch_options, x.softcap, None, None, state, kept)
        return torch_backend.local_entropy(x.logits, x.ref_logits, x.data, *options)

    def torch_backward(
        self, weights: Tensor, x: Operands, state: Tensor, kept: Tensor, grad: Tensor
    ) -> None:
        s = (x.data, kept) if self.select_by == "indices" else (kept, None)
        options = (*s, state, *self._torch_options, x.softcap, grad)
        torch_backend.local_entropy_backward(weights, x.logits, *options)

    @property
    def _torch_options(self) -> tuple[int, str, str | float]:
        center = self.center_value if self.center_kind == "number" else self.center_kind
        return self.top_k, self.objective, center

    def triton_forward(self, x: Operands) -> tuple[Tensor, Tensor, Tensor]:
        options = (self.top_k, self.objective, self.center_kind, self.center_value, x.softcap)
        return kernels("local_entropy").forward(x.logits, x.ref_logits, x.data, *options)

    def triton_backward(
        self, weights: Tensor, x: Operands, state: Tensor, kept: Tensor, grad: Tensor
    ) -> None:
        kernels("local_entropy").backward(weights, x.logits, state, kept, grad, x.softcap)

    def slice_forward(self, x: Operands) -> tuple[Tensor, tuple[Tensor, ...]]:
        return _slices().local_entropy_forward(x, self)

    def slice_backward(
        self, weights: Tensor, x: Operands, made: tuple[Tensor, ...], grad: Tensor
    ) -> None:
        _slices().local_entropy_backward(weights, x, made, grad)


@dataclass(frozen=True)
class KL(RowLoss):
    """KL divergence to the reference's row, `direction` reverse or forward."""

    direction: str

    needs_reference: ClassVar[bool] = True

    def saved(self, x: Operands) -> tuple[Tensor | None, Tensor | None]:
        return x.ref_logits, None

    def torch_tiles(self, x: Operands, grad: Tensor | None, weights: Tensor | None) -> Tensor:
        options = (self.direction, x.softcap, x.ref_softcap, grad, weights)
        return torch_backend.kl(x.logits, x.ref_logits, *options)

    def torch_forward(self, x: Operands, state: Tensor, kept: Tensor) -> Tensor:
        options = (self.direction, x.softcap, x.ref_softcap, None, None, state)
        return torch_backend.kl(x.logits, x.ref_logits, *options)

    def torch_backward(
        self, weights: Tensor, x: Operands, state: Tensor, kept: Tensor, grad: Tensor
    ) -> None:
        options = (state, self.direction, x.softcap, x.ref_softcap, grad)
        torch_backend.kl_backward(weights, x.logits, x.ref_logits, *options)

    def triton_forward(self, x: Operands) -> tuple[Tensor, Tensor, Tensor]:
        options = (self.direction, x.softcap, x.ref_softcap)
        losses, state = kernels("kl_div").forward(x.logits, x.ref_logits, *options)
        return losses, state, state.new_empty(self.kept_shape(x), dtype=torch.int32)

    def triton_backward(
        self, weights: Tensor, x: Operands, state: Tensor, kept: Tensor, grad: Tensor
    ) -> None:
        options = (state, self.direction, grad, x.softcap, x.ref_softcap)
        kernels("kl_div").backward(weights, x.logits, x.ref_logits, *options)

    def slice_forward(self, x: Operands) -> tuple[Tensor, tuple[Tensor, ...]]:
        return _slices().kl_forward(x, self.direction)

    def slice_backward(
        self, weights: Tensor, x: Operands, made: tuple[Tensor, ...], grad: Tensor
    ) -> None:
        _slices().kl_backward(weights, x, self.direction, made, grad)


@dataclass(frozen=True)
class CrossEntropy(RowLoss):
    """Negative log-likelihood of labels; 0 for rows whose label is `ignore_index`."""

    ignore_index: int = -100

    def check_values(self, data: Tensor, vocab_size: int) -> None:
        validation.label_values(data, self.ignore_index, vocab_size)

    def count(self, rows: int, data: Tensor | None) -> Tensor | int:
        return (data != self.ignore_index).sum()

    def torch_tiles(self, x: Operands, grad: Tensor | None, weights: Tensor | None) -> Tensor:
        options = (self.ignore_index, x.softcap, grad, weights)
        return torch_backend.cross_entropy(x.logits, x.data, *options)

    def torch_forward(self, x: Operands, state: Tensor, kept: Tensor) -> Tensor:
        options = (self.ignore_index, x.softcap, None, None, state)
        return torch_backend.cross_entropy(x.logits, x.data, *options)

    def torch_backward(
        self, weights: Tensor, x: Operands, state: Tensor, kept: Tensor, grad: Tensor
    ) -> None:
        options = (state, self.ignore_index, x.softcap, grad)
        torch_backend.cross_entropy_backward(weights, x.logits, x.data, *options)

    def triton_forward(self, x: Operands) -> tuple[Tensor, Tensor, Tensor]:
        options = (self.ignore_index, x.softcap)
        losses, state = kernels("cross_entropy").forward(x.logits, x.data, *options)
        return losses, state, state.new_empty(self.kept_shape(x), dtype=torch.int32)

    def triton_backward(
        self, weights: Tensor, x: Operands, state: Tensor, kept: Tensor, grad: Tensor
    ) -> None:
        options = (state, self.ignore_index, grad, x.softcap)
        kernels("cross_entropy").backward(weights, x.logits, x.data, *options)

    def slice_forward(self, x: Operands) -> tuple[Tensor, tuple[Tensor, ...]]:
        return _slices().cross_entropy_forward(x, self.ignore_index)

    def slice_backward(
        self, weights: Tensor, x: Operands, made: tuple[Tensor, ...], grad: Tensor
    ) -> None:
        _slices().cross_entropy_backward(weights, x, self.ignore_index, made, grad)


@dataclass(frozen=True)
class ReferenceArgmaxNLL(RowLoss):
    """Negative log-likelihood of the reference's most likely token; 0 where all of the reference's
    row is masked, NaN where it holds a NaN. Fused only."""

    needs_reference: ClassVar[bool] = True

    def fused(self, x: Operands, gradient: bool, weights: Tensor | None = None) -> Tensor:
        if x.vocabulary is not None:
            labels, has_nan = _slices().most_likely(x)
        else:
            top = topk_indices(x.ref_logits, 1, x.backend)
            largest = x.ref_logits.gather(-1, top.long())[:, 0]  # a NaN ranks first
            labels = torch.where(largest == reference.NEG_INF, -100, top[:, 0])
            has_nan = largest.isnan()
        first = x.logits[:, :1]
        first.copy_(torch.where(has_nan[:, None], torch.nan, first))
        return CrossEntropy().fused(replace(x, data=labels), gradient, weights)


def topk_indices(scores: Tensor, k: int, backend: str) -> Tensor:
    """Return int32 `[N, min(k, V)]` on the backend that was resolved."""
    return (torch_backend if backend == "torch" else kernels("topk")).topk_indices(scores, k)


def _slices() -> ModuleType:
    """What only a sharded vocabulary needs is imported where there is one."""
    return importlib.import_module("palu_kernels.slices")


def kernels(name: str) -> ModuleType:
    """Triton is imported when a kernel is called for: it may not be installed."""
    return importlib.import_module(f"palu_kernels.triton.{name}")


def encode(losses: Sequence[RowLoss]) -> str:
    """Return losses as text, a line each, which `torch.compile` can trace: a custom op takes no
    objects."""
    lines = []
    for loss in losses:
        fields = [getattr(loss, name) for name in type(loss).__match_args__]
        if torch.compiler.is_compiling():
            fields = [_constant(value) for value in fields]
        lines.append(",".join([type(loss).__name__, *map(repr, fields)]))
    return "\n".join(lines)


def _constant(value: object) -> object:
    """A number that `torch.compile` has made a symbol, since it took another value in an earlier
    call, is a constant of this graph: text holds no symbols."""
    if isinstance(value, float):
        above, below = value.as_integer_ratio()  # exact; `float` would leave a symbol
        return above / below
    return operator.index(value) if type(value) is int else value


@lru_cache
def decode(text: str) -> tuple[RowLoss, ...]:
    """Return the losses that `encode` was given."""
    kinds = {kind.__name__: kind for kind in RowLoss.__subclasses__()}
    losses = []
    for line in text.split("\n"):
        name, *fields = line.split(",")
        losses.append(kinds[name](*map(ast.literal_eval, fields)))
    return tuple(losses)

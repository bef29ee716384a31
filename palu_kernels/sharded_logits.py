"""Logits that are DTensors: what an operator does with each placement.

Logits whose vocabulary is sharded, `Shard(-1)`, stay whole for the checks of arguments, which see
their global shape, and are computed slice by slice (`slices.py`). Everything else is computed from
what is here, like plain tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from palu_kernels import reference, row_loss, slices
from palu_kernels.backend import accum_dtype, check_values, on_device_of
from palu_kernels.distributed import (
    Vocabulary,
    agree_on_call,
    any_dtensor,
    dtensor,
    local_rows,
    local_slice,
    vocabulary_of,
)
from palu_kernels.layout import gradient_rows_like
from palu_kernels.row_loss import Operands, RowLoss

Args = ParamSpec("Args")  # of a decorated function, for type checkers
Result = TypeVar("Result")


def takes_dtensors(operator: Callable[Args, Result]) -> Callable[Args, Result]:
    """Make a function of `logits` or `scores` take DTensors: those whose vocabulary is sharded
    reach it as they are, all others as what is here.

    Raises:
        ValueError: the placements are none that the operator can be computed from.
    """

    @wraps(operator)
    def call(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        if not any_dtensor([*args, *kwargs.values()]):
            return operator(*args, **kwargs)
        named = signature(operator).bind(*args, **kwargs).arguments
        rows = next(name for name in ("logits", "scores") if name in named)
        last = named[rows].dim() - 1
        group = local_slice(rows, named[rows], last, True)[1]
        if group is not None and any(
            p.is_shard() and p.dim != last for p in named[rows].placements
        ):
            raise ValueError(
                f"{rows} is a DTensor with placements {tuple(named[rows].placements)}; it must be "
                f"sharded by rows or by vocabulary, not both: take the rows that are here, "
                f"{rows}.to_local(), as a DTensor over the vocabulary's dimension of the mesh alone"
            )
        for name, value in named.items():
            if name == "ref_logits" and dtensor(value) is not None:
                slice_group = local_slice(name, value, last, True)[1]
                if slice_group is not None and slice_group is not group:
                    raise ValueError(
                        f"{name} is a DTensor with placements {tuple(value.placements)}; it must "
                        f"be sharded as {rows} is, or Replicate()"
                    )
                if slice_group is not None:
                    continue
            if name != rows or group is None:
                named[name] = local_rows(name, value)
        return operator(**named)

    return call


def slice_of(rows: Any, name: str = "logits") -> tuple[Tensor, Vocabulary | None]:
    """Return what of rows is here, and the vocabulary of which that is a slice, if it is one."""
    if dtensor(rows) is None:
        return rows, None
    local, group, _ = local_slice(name, rows, rows.dim() - 1, True)
    return local, None if group is None else vocabulary_of(rows, rows.dim() - 1)


def slice_of_reference(ref_logits: Tensor | None, vocabulary: Vocabulary) -> Tensor | None:
    """Return this rank's slice of the reference's rows, sharded alike or whole."""
    if ref_logits is None:
        return None
    local, own = slice_of(ref_logits, "ref_logits")
    return local if own is not None else vocabulary.of_columns(local)


def loss(
    logits: Tensor,
    ref_logits: Tensor | None,
    data: Tensor | None,
    row_loss_: RowLoss,
    reduction: str,
    backend: str,
) -> Tensor:
    """Return the loss of DTensor logits whose vocabulary is sharded, a plain tensor, the same on
    all ranks; its gradient reaches the slices."""
    local, vocabulary = slice_of(logits)
    if data is not None and check_values(data.device):
        row_loss_.check_values(data, vocabulary.size)
    ref = slice_of_reference(ref_logits, vocabulary)
    facts = {"losses": row_loss.encode([row_loss_]), "reduction": reduction, "backend": backend}
    shape = {"shape of logits": list(logits.shape), "dtype": str(local.dtype)}
    agree_on_call(vocabulary, facts | shape, None, local.device, [data])
    return SlicedLoss.apply(local, ref, data, row_loss_, reduction, backend, vocabulary)


class SlicedLoss(torch.autograd.Function):
    """A reduced loss of rows of which every rank has a slice."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ref_logits: Tensor | None,
        data: Tensor | None,
        loss: RowLoss,
        reduction: str,
        backend: str,
        vocabulary: Vocabulary,
    ) -> Tensor:
        rows = logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])
        ref = None if ref_logits is None else ref_logits.reshape(rows.shape)
        if data is not None:
            data = data.reshape(len(rows), *data.shape[logits.dim() - 1 :])
        operands = Operands(rows, ref, data, backend, vocabulary=vocabulary)
        with on_device_of(logits):
            losses, made = loss.slice_forward(operands)
        count = loss.count(len(rows), data)
        out = reference.reduce_rows(losses, reduction, count)
        ctx.save_for_backward(rows, ref, data, *made)
        ctx.plain = loss, reduction, backend, vocabulary, logits.shape
        return out.reshape(logits.shape[:-1]) if reduction == "none" else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        rows, ref, data, *made = ctx.saved_tensors
        loss, reduction, backend, vocabulary, shape = ctx.plain
        if reduction == "mean":
            grad = reference.reduce_rows(grad, reduction, loss.count(len(rows), data))
        weights = grad.reshape(-1) if reduction == "none" else grad.expand(len(rows))
        operands = Operands(rows, ref, data, backend, vocabulary=vocabulary)
        out = gradient_rows_like(rows)
        if rows.numel():
            with on_device_of(rows):
                weights = weights.to(accum_dtype(rows.dtype)).contiguous()
                loss.slice_backward(weights, operands, tuple(made), out)
        return out.reshape(shape), *(None,) * 6


def topk(scores: Tensor, k: int, backend: str) -> Tensor:
    """Return indices in the whole vocabulary, ascending, int32 `[..., min(k, V)]`, a plain tensor,
    the same on all ranks."""
    local, vocabulary = slice_of(scores, "scores")
    facts = {"losses": f"top {k}", "backend": backend, "shape of scores": list(scores.shape)}
    agree_on_call(vocabulary, facts, None, local.device)
    rows = local.reshape(math.prod(local.shape[:-1]), local.shape[-1])
    with on_device_of(local):
        indices = slices.global_indices(rows, k, vocabulary, backend)
    return indices.reshape(*scores.shape[:-1], indices.shape[-1])

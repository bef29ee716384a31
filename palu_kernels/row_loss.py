"""Row losses for the chunk loop: a chunk of logits in, the loss of every row out, and the chunk
overwritten with its gradient.

A new loss is one class here. It sees the chunk before the head's softcap and returns the gradient
with respect to that, so that the head's products need no pass of their own. In the chunk loop its
rows are not weighted (``linear.py`` does that in float32).
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from palu_kernels import reference
from palu_kernels import torch_backend as eager


@dataclass(frozen=True)
class Chunk:
    """Rows of one part: ``logits [n, V]`` before the cap, the reference's beside them if the loss
    needs them, the rows' own integers (indices ``[n, k]``, labels ``[n]``)."""

    logits: Tensor
    softcap: float | None
    ref_logits: Tensor | None
    ref_softcap: float | None
    data: Tensor | None
    gradient: bool  # whether to overwrite the logits with the gradient
    served_by: str
    weights: Tensor | None = None  # [n], of the rows in the gradient; None: 1 each

    @property
    def grad(self) -> Tensor | None:
        """Where the gradient goes."""
        return self.logits if self.gradient else None

    def grad_of(self, losses: Tensor) -> Tensor:
        """What the kernels multiply the gradient of every row with."""
        return losses.new_ones(losses.shape) if self.weights is None else self.weights


class RowLoss:
    """``loss(chunk)`` -> the losses of its rows; what it needs beside their logits it says here."""

    needs_reference: ClassVar[bool] = False  # the reference's logits of its rows
    needs_mean: ClassVar[bool] = False  # the mean over the head's rows


@dataclass(frozen=True)
class LocalEntropy(RowLoss):
    """PALU's forget loss; ``chooser`` says what S comes from: reference, indices or current."""

    top_k: int
    objective: str
    center_kind: str
    center_value: float
    chooser: str

    @property
    def needs_reference(self) -> bool:
        return self.chooser == "reference"

    def __call__(self, chunk: Chunk) -> Tensor:
        ref_logits = chunk.ref_logits if self.needs_reference else None
        if chunk.served_by == "torch":
            center = self.center_value if self.center_kind == "number" else self.center_kind
            return eager.local_entropy(
                chunk.logits,
                ref_logits,
                chunk.data,
                self.top_k,
                self.objective,
                center,
                chunk.softcap,
                chunk.grad,
                chunk.weights,
            )
        from palu_kernels.triton import local_entropy as kernels

        losses, state, chosen = kernels.forward(
            chunk.logits,
            ref_logits,
            chunk.data,
            self.top_k,
            self.objective,
            self.center_kind,
            self.center_value,
            chunk.softcap,
        )
        if chunk.gradient:
            kernels.backward(
                chunk.grad_of(losses),
                chunk.logits,
                self.chooser == "current",
                state,
                chosen,
                self.objective,
                chunk.logits,
                chunk.softcap,
            )
        return losses


@dataclass(frozen=True)
class KL(RowLoss):
    """KL to the reference's row, ``direction`` reverse or forward."""

    direction: str

    needs_reference: ClassVar[bool] = True

    def __call__(self, chunk: Chunk) -> Tensor:
        caps = chunk.softcap, chunk.ref_softcap
        if chunk.served_by == "torch":
            options = (self.direction, *caps, chunk.grad, chunk.weights)
            return eager.kl(chunk.logits, chunk.ref_logits, *options)
        from palu_kernels.triton import kl_div as kernels

        losses, state = kernels.forward(chunk.logits, chunk.ref_logits, self.direction, *caps)
        if chunk.gradient:
            kernels.backward(
                chunk.grad_of(losses),
                chunk.logits,
                chunk.ref_logits,
                state,
                self.direction,
                chunk.logits,
                *caps,
            )
        return losses


@dataclass(frozen=True)
class CrossEntropy(RowLoss):
    """Negative log-likelihood of labels; rows whose label is ``ignore_index`` count as 0."""

    ignore_index: int = -100

    def __call__(self, chunk: Chunk) -> Tensor:
        return _cross_entropy(chunk, chunk.data, self.ignore_index)


@dataclass(frozen=True)
class LikeliestNLL(RowLoss):
    """Negative log-likelihood of the token that the reference finds likeliest; 0 where all of its
    row is masked, NaN where it holds a NaN."""

    needs_reference: ClassVar[bool] = True

    def __call__(self, chunk: Chunk) -> Tensor:
        found = topk_indices(chunk.ref_logits, 1, chunk.served_by)
        largest = chunk.ref_logits.gather(-1, found.long())[:, 0]  # a NaN ranks first
        labels = torch.where(largest == reference.NEG_INF, -100, found[:, 0])
        first = chunk.logits[:, 0]
        first.copy_(torch.where(largest.isnan(), torch.nan, first))
        return _cross_entropy(chunk, labels, ignore_index=-100)


@dataclass(frozen=True)
class SparseLocalEntropy(RowLoss):
    """``LocalEntropy`` without logits outside S: no chunk, the loop hands its rows to
    ``sparse.py``; ``chooser`` is indices or reference (whose logits then choose S, chunk by
    chunk)."""

    top_k: int
    objective: str
    center_kind: str
    center_value: float
    chooser: str

    @property
    def needs_reference(self) -> bool:
        return self.chooser == "reference"

    @property
    def needs_mean(self) -> bool:
        return self.objective == "flatten" and self.center_kind == "global_mean"


def topk_indices(scores: Tensor, k: int, served_by: str) -> Tensor:
    if served_by == "torch":
        return eager.topk_indices(scores, k)
    from palu_kernels.triton import radix_select as kernels

    return kernels.topk_indices(scores, k)


def _cross_entropy(chunk: Chunk, labels: Tensor, ignore_index: int) -> Tensor:
    if chunk.served_by == "torch":
        options = ignore_index, chunk.softcap, chunk.grad, chunk.weights
        return eager.cross_entropy(chunk.logits, labels, *options)
    from palu_kernels.triton import cross_entropy as kernels

    losses, state = kernels.forward(chunk.logits, labels, ignore_index, chunk.softcap)
    if chunk.gradient:
        weights = chunk.grad_of(losses)
        kernels.backward(
            weights, chunk.logits, labels, state, ignore_index, chunk.logits, chunk.softcap
        )
    return losses


_KINDS = {
    kind.__name__: kind
    for kind in (LocalEntropy, KL, CrossEntropy, LikeliestNLL, SparseLocalEntropy)
}


def encode(loss: RowLoss) -> str:
    """A custom op takes no objects: a row loss travels as text (that torch.compile can make)."""
    fields = [repr(getattr(loss, name)) for name in type(loss).__match_args__]
    return ",".join([type(loss).__name__, *fields])


def decode(text: str) -> RowLoss:
    kind, *fields = text.split(",")
    return _KINDS[kind](*map(ast.literal_eval, fields))

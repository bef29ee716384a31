"""Terms of the objective on hidden rows: one pass over the output head for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from palu_kernels import LMHead
from palu_kernels.linear.functional import Part, linear_losses
from palu_kernels.row_loss import RowLoss


class HiddenTerm(NamedTuple):
    """A term's rows, their loss, its weight in the objective and what its sum is divided by."""

    loss: RowLoss
    hidden: Tensor  # [n, D]
    ref_hidden: Tensor | None  # [n, D] where the loss needs the reference's logits
    data: Tensor | None  # indices [n, k] or labels [n]
    weight: float
    denominator: Tensor | float  # 0-dim


class Joined(NamedTuple):
    """The terms' rows one after the other, as the linear operators take them."""

    hidden: Tensor  # [R, D]
    parts: list[Part]
    ref_hidden: Tensor | None  # of the terms whose loss needs it
    row_weights: Tensor  # [R]


def join(terms: Sequence[HiddenTerm]) -> Joined:
    hidden = torch.cat([term.hidden for term in terms])
    refs = [term.ref_hidden for term in terms if term.loss.needs_reference]
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32

    def row_weights(term: HiddenTerm) -> Tensor:
        denominator = torch.as_tensor(term.denominator, dtype=work, device=hidden.device)
        return (term.weight / denominator).expand(term.hidden.shape[0])

    return Joined(
        hidden,
        [Part(term.loss, term.hidden.shape[0], term.data) for term in terms],
        torch.cat(refs) if refs else None,
        torch.cat([row_weights(term) for term in terms]),
    )


def sum_of_terms(
    head: LMHead, ref_head: LMHead | None, terms: Sequence[HiddenTerm], backend: str
) -> tuple[Tensor, list[Tensor]]:
    """-> (weighted sum of the terms, differentiable; the sum of each term's losses, detached)."""
    hidden, parts, ref_hidden, row_weights = join(terms)
    total, losses = linear_losses(
        hidden,
        head,
        parts,
        ref_hidden=ref_hidden,
        ref_head=None if ref_hidden is None else ref_head,
        row_weights=row_weights,
        backend=backend,
    )
    return total, [part.sum() for part in losses.detach().split([part.rows for part in parts])]

"""Terms of the objective on hidden rows: one pass over the output head for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from palu_kernels import LMHead
from palu_kernels.linear_operators import Part, linear_losses
from palu_kernels.row_losses import RowLoss


class HiddenTerm(NamedTuple):
    """A term's rows, their loss, its weight in the objective and what its sum is divided by."""

    loss: RowLoss
    hidden: Tensor  # [n, D]
    ref_hidden: Tensor | None  # [n, D] where the loss needs the reference's logits
    data: Tensor | None  # indices [n, k] or labels [n]
    weight: float
    denominator: Tensor | float  # 0-dim


def sum_of_terms(
    head: LMHead, ref_head: LMHead | None, terms: Sequence[HiddenTerm], backend: str
) -> tuple[Tensor, list[Tensor]]:
    """-> (weighted sum of the terms, differentiable; the sum of each term's losses, detached)."""
    hidden = torch.cat([term.hidden for term in terms])
    refs = [term.ref_hidden for term in terms if term.loss.needs_reference]
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32

    def row_weights(term: HiddenTerm) -> Tensor:
        denominator = torch.as_tensor(term.denominator, dtype=work, device=hidden.device)
        return (term.weight / denominator).expand(term.hidden.shape[0])

    counts = [term.hidden.shape[0] for term in terms]
    total, losses = linear_losses(
        hidden,
        head,
        [Part(term.loss, n, term.data) for term, n in zip(terms, counts, strict=True)],
        ref_hidden=torch.cat(refs) if refs else None,
        ref_head=ref_head if refs else None,
        row_weights=torch.cat([row_weights(term) for term in terms]),
        backend=backend,
    )
    return total, [part.sum() for part in losses.detach().split(counts)]

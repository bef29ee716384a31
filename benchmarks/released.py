"""PALU's loss in the way of the released code: what the other providers are measured against.

Written from the method's formulas. Every position has logits, of both models; top-k, mean,
log-softmax, exponential and products are taken over all of them in float32, for prompts and padding
too; which rows count is decided by a mask at the end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from palu.data.roles import FORGET, IGNORE, PRESERVE, token_roles


class Terms(NamedTuple):
    """0-dim, differentiable; their sum is the loss."""

    forget: Tensor
    preserve: Tensor


def released_terms(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, *, top_k: int, prefix_length: int
) -> Terms:
    """Flatten to the global mean on the forget rows, reverse KL on the preserve rows.

    Args:
        logits, ref_logits: ``[B, T, V]``; row t-1 predicts label t. The reference's are made
            without gradient.
        labels: ``[B, T]`` as `PALULoss` takes them.
    """
    roles = token_roles(labels, prefix_length)[:, 1:]
    z, r = logits[:, :-1].float(), ref_logits[:, :-1].float()
    chosen = r.topk(top_k, dim=-1).indices
    flatten = (z.gather(-1, chosen) - z.mean(-1, keepdim=True)).square().mean(-1)
    log_p, log_q = F.log_softmax(z, dim=-1), F.log_softmax(r, dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return Terms(_mean(flatten, roles == FORGET), _mean(kl, roles == PRESERVE))


def released_retain(logits: Tensor, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of the answer tokens (any label but -100), all rows computed."""
    targets = torch.where(labels == IGNORE, IGNORE, input_ids)[:, 1:]
    return F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE
    )


def _mean(values: Tensor, rows: Tensor) -> Tensor:
    return (values * rows).sum() / rows.sum().clamp(min=1)

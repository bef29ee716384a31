"""What a model says of given answers: one forward pass, logits only for the rows that predict
them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from palu.data.collator import Collator
from palu.data.labels import LabeledExample
from palu.data.roles import IGNORE
from palu.evaluation.batches import ALONE, Processes, in_batches
from palu.models.forward import logits_at, shift_to_logits
from palu_kernels import cross_entropy_loss

# Rows of logits whose distribution is made at a time, in float32: 64 of them take 33 MB at a
# vocabulary of 128,256.
_CHUNK = 64


@dataclass(frozen=True)
class AnswerScores:
    """The tokens of one answer under a model, given the true ones before them. T tokens: all of
    the answer, its end token included (a text without prompt: but the first).

    Attributes:
        nll: float64 [T], negative log-likelihood.
        hits: bool [T], whether the token is the likeliest.
        sensitive: bool [T], whether it lies in a marked span.
        closed: whether the last token is the one that ends the answer.
        standardised: float64 [T], `(log p - mu) / sqrt(max(sigma^2, 1e-6))` with mean and variance
            of log p over the vocabulary under the model's own distribution, in float32; None when
            not asked for.
    """

    nll: np.ndarray
    hits: np.ndarray
    sensitive: np.ndarray
    closed: bool
    standardised: np.ndarray | None

    def without_end(self, values: np.ndarray) -> np.ndarray:
        """`values` [T] of this answer but for its end token."""
        return values[:-1] if self.closed else values

    @property
    def loss(self) -> float | None:
        """Mean of `nll`; None when there is no token."""
        return float(self.nll.mean()) if self.nll.size else None


@torch.no_grad()
def score_answers(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[LabeledExample],
    *,
    batch_size: int,
    standardise: bool = False,
    processes: Processes = ALONE,
    report: Callable[[int, int], None] | None = None,
) -> list[AnswerScores]:
    """The scores of every row, in order. Call it in `eval_mode(model)`.

    Args:
        rows: see `palu.data.labels.label_example`.
        batch_size: rows a forward pass.
        standardise: also make `AnswerScores.standardised` (min-k++).
        processes, report: see `in_batches`.
    """
    collate = Collator(tokenizer)
    device = next(model.parameters()).device

    def work(chosen: list[int]) -> list[AnswerScores]:
        batch = {k: v.to(device) for k, v in collate([rows[i] for i in chosen]).items()}
        answer = batch["labels"] != IGNORE
        logits = logits_at(
            model, batch["input_ids"], batch["attention_mask"], shift_to_logits(answer)
        )
        answer = answer[:, 1:]
        targets = batch["input_ids"][:, 1:][answer]
        found = [
            cross_entropy_loss(logits, targets, reduction="none").double(),
            logits.argmax(-1) == targets,
            batch["labels"][:, 1:][answer] >= 0,
        ]
        if standardise:
            found.append(_standardised(logits, targets).double())
        sizes = answer.sum(1).tolist()
        parts = zip(*(values.cpu().split(sizes) for values in found), strict=True)
        return [
            AnswerScores(
                *(values.numpy() for values in part[:3]),
                closed=rows[i].closed,
                standardised=part[3].numpy() if standardise else None,
            )
            for i, part in zip(chosen, parts, strict=True)
        ]

    lengths = [len(row["input_ids"]) for row in rows]
    return in_batches(lengths, batch_size, work, processes=processes, report=report)


def _standardised(logits: Tensor, targets: Tensor) -> Tensor:
    """float32 `[N]` of logits `[N, V]` and targets `[N]`."""
    made = [logits.new_zeros(0, dtype=torch.float32)]
    for rows, ids in zip(logits.split(_CHUNK), targets.split(_CHUNK), strict=True):
        log_p = rows.float().log_softmax(-1)
        p = log_p.exp()
        known = log_p.masked_fill(p == 0, 0.0)  # 0 * log 0 is 0
        mean = (p * known).sum(-1)
        variance = (p * known.square()).sum(-1) - mean.square()
        log_p = log_p.gather(-1, ids[:, None]).squeeze(-1)
        made.append((log_p - mean) / variance.clamp(min=1e-6).sqrt())
    return torch.cat(made)

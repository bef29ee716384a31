"""Which of a model's own answers it was sure of: by those a run without a retain file is judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from palu.data.labels import LabeledExample
from palu.data.roles import IGNORE
from palu.distributed import ALONE, Processes
from palu.evaluation.inference import score_answers
from palu.models.wrappers import eval_mode
from palu.training.knowledge import KNOWN

# Answers, or tokens, of at least this probability are no guesses; of so many rows there must be.
SURE, ENOUGH = 0.9, 32


def token_losses(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    *,
    batch_size: int = 8,
    processes: Processes = ALONE,
) -> list[np.ndarray]:
    """Return the negative log-likelihood of every token that is learned, float64 `[n]` a row."""
    fields = ("input_ids", "labels", "attention_mask")
    labeled = [LabeledExample(*(row[name] for name in fields)) for row in rows]
    how = {"batch_size": batch_size, "processes": processes}
    with eval_mode(model):
        return [score.nll for score in score_answers(model, tokenizer, labeled, **how)]


def mark_known(
    model: nn.Module, tokenizer: Any, rows: Sequence[dict[str, Any]], **sharing: Any
) -> str:
    """Write into each row of `self_retain_rows`, as `palu_known`, the labels by which harm is
    measured (`palu.training.knowledge`), -100 elsewhere: a guess moves more than what a model
    knows. They are the answers that the model is sure of: `exp(-mean NLL)` is at least 0.9. Where
    fewer than 32 are, they are the tokens of at least this probability, and where fewer than 32
    rows have one, all.

    Args:
        model: the original.
        **sharing: `batch_size` and `processes` of `token_losses`.

    Returns:
        what they are, in words.
    """
    losses, most = token_losses(model, tokenizer, rows, **sharing), -math.log(SURE)
    tokens = [loss <= most for loss in losses]
    answers = [np.full(loss.shape, loss.size and loss.mean() <= most) for loss in losses]
    known = [("the {} that it is sure of", answers), ("the tokens that it is sure of", tokens)]
    known.append(("all of them", [np.full(loss.shape, True) for loss in losses]))
    for text, sure in known:
        count = sum(bool(one.any()) for one in sure)
        said = text.format(count)
        if count >= ENOUGH:
            break
    for row, one in zip(rows, sure, strict=True):
        # The first token is never predicted.
        at = [i for i, label in enumerate(row["labels"]) if i and label != IGNORE]
        kept = {i for i, is_sure in zip(at, one, strict=True) if is_sure}
        row[KNOWN] = [la if i in kept else IGNORE for i, la in enumerate(row["labels"])]
    return said

"""What a model still knows of a set of answers: numbers that need nothing but the answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from palu.data.labels import LabeledExample
from palu.data.records import Example
from palu.data.template import Template
from palu.evaluation.datasets import ANSWER, EvalSet
from palu.evaluation.generation import greedy_answers
from palu.evaluation.inference import AnswerScores, score_answers
from palu.evaluation.metrics import (
    exact_memorization,
    extraction_strength,
    probability,
    rouge,
)
from palu.models.wrappers import eos_token_ids, eval_mode

METRICS = ("answer_probability", "sensitive_probability", "rougeL_recall", "exact_memorization")
"""The columns of the table."""
MORE_METRICS = ("extraction_strength", "rouge1_recall", "rouge1_f1", "rougeL_f1")


def evaluate_examples(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    template: Template | None = None,
    max_length: int = 512,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures a causal language model on examples. Neither the model nor the tokenizer is changed.

    Per example (`palu.evaluation.metrics` has the formulas):
        answer_probability: of the answer's tokens, the closing end token included.
        sensitive_probability: of its sensitive tokens; None for an example without any.
        rougeL_recall, rougeL_f1, rouge1_recall, rouge1_f1: of the greedy answer, words stemmed;
            None for a plain document (no question).
        exact_memorization, extraction_strength: of the answer's tokens, end token left out; exact
            memorization is None when no token is left.

    Args:
        examples: see `palu.data.files.load_examples`; at least one.
        template: how questions are put; `Template()` when None.
        max_length: tokens; longer examples are cut, with a warning.
        batch_size: rows a forward pass.
        max_new_tokens: limit of a greedy answer; 0 leaves ROUGE out (None everywhere).
        progress: called with (examples done, of how many), forward passes and answers counted
            alike.

    Returns:
        `{"count", "mean": {metric: float | None}, "examples": [{"id", metric: ..., "generated"}]}`;
        means are plain means over the examples that have the number, None where none has.

    Raises:
        ValueError: no examples, or a size below its minimum.
        FloatingPointError: a loss that is not finite; names the example.
    """
    if batch_size < 1 or max_new_tokens < 0:
        raise ValueError(
            f"batch_size must be at least 1 and max_new_tokens at least 0, "
            f"not {batch_size} and {max_new_tokens}"
        )
    data = EvalSet.tokenise(
        "examples", examples, tokenizer, template=template or Template(), max_length=max_length
    )
    rows = [row for (row,) in data.rows[ANSWER]]
    asked = [i for i, e in enumerate(examples) if e.question is not None] if max_new_tokens else []
    total = len(rows) + len(asked)

    def report(before: int) -> Callable[[int, int], None] | None:
        return progress and (lambda done, _: progress(before + done, total))

    with eval_mode(model):
        scores = score_answers(model, tokenizer, rows, batch_size=batch_size, report=report(0))
        check_finite(data, ANSWER, [[score] for score in scores])
        answers = greedy_answers(
            model,
            tokenizer,
            [prompt(rows[i]) for i in asked],
            eos_token_ids=stops(model, tokenizer, rows),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            report=report(len(rows)),
        )
    generated = dict(zip(asked, answers, strict=True))
    return results(examples, scores, [generated.get(i) for i in range(len(rows))])


def results(
    examples: Sequence[Example], scores: Sequence[AnswerScores], generated: Sequence[str | None]
) -> dict[str, Any]:
    """What `evaluate_examples` returns, from the scores and the greedy answers of its examples."""
    found = []
    for example, score, text in zip(examples, scores, generated, strict=True):
        hits = score.without_end(score.hits)
        rouges = {} if text is None else rouge(example.answer, text)
        result = {
            "id": example.id,
            "answer_probability": _probability(score.nll),
            "sensitive_probability": _probability(score.nll[score.sensitive]),
            "exact_memorization": exact_memorization(hits),
            "extraction_strength": extraction_strength(hits),
            "generated": text,
        }
        names = [name for name in (*METRICS, *MORE_METRICS) if name.startswith("rouge")]
        found.append(result | {name: rouges.get(name) for name in names})
    means = {}
    for name in (*METRICS, *MORE_METRICS):
        values = [r[name] for r in found if r[name] is not None]
        means[name] = math.fsum(values) / len(values) if values else None
    return {"count": len(found), "mean": means, "examples": found}


def prompt(row: LabeledExample) -> list[int]:
    """The very tokens that stand before the answer."""
    return row["input_ids"][: row.answer_start]


def stops(model: nn.Module, tokenizer: Any, rows: Sequence[LabeledExample]) -> list[int]:
    """Every token that ends an answer: those that tokenizer and model name, and the one that the
    template closes an answer with, which may be none of them."""
    closing = {row["input_ids"][-1] for row in rows if row.closed}
    return sorted({*eos_token_ids(model, tokenizer), *closing})


def check_finite(data: EvalSet, field: str, scores: Sequence[Sequence[AnswerScores]]) -> None:
    """Raises FloatingPointError that names file, row and field of the first loss that is not
    finite."""
    for number, of_example in enumerate(scores):
        for score in of_example:
            wrong = np.flatnonzero(~np.isfinite(score.nll))
            if wrong.size:
                raise FloatingPointError(
                    f"{data.place(number, field)}: the model's loss is not finite "
                    f"({score.nll[wrong[0]]} at token {wrong[0]} of the answer)"
                )


def _probability(nll: np.ndarray) -> float | None:
    return probability(nll) if nll.size else None

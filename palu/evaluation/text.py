"""What is measured of answers beside how true they are: whether they are text at all, how likely
the spans still are, and which secrets are said."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from palu.data.labels import LabeledExample
from palu.data.roles import IGNORE, KEEP
from palu.evaluation.inference import Continuation
from palu.evaluation.leaks import leaks
from palu.evaluation.metrics import (
    distinct,
    fell_apart,
    longest_run,
    repetition,
    span_probabilities,
)
from palu.evaluation.names import DISTINCT, SAMPLE_LEAKS, SPANS

Numbers = dict[str, Any]
# Numbers of an example -> those of its spans that they are the mean of.
OF_SPANS = dict(zip(SPANS, ("mean", "joint", "first", "rest"), strict=True))


def answer_numbers(answer: Continuation | None) -> Numbers:
    """Return what can be said of a greedy answer without another model; None where there is none.

    `ended` is 1.0 where an end token came within the limit and 0.0 where none came, `fell_apart`
    1.0 where `metrics.fell_apart` says so.
    """
    if answer is None:
        names = ("repetition", "longest_run", "ended", "fell_apart", "answer_tokens")
        return dict.fromkeys(names)
    return {
        "repetition": repetition(answer.tokens),
        "longest_run": longest_run(answer.tokens),
        "ended": float(answer.ended),
        "fell_apart": float(fell_apart(answer.tokens, answer.ended)),
        "answer_tokens": len(answer.tokens),
    }


def distinct_numbers(answers: Iterable[Sequence[int]]) -> Numbers:
    """Return distinct-n of all answers of a set: 1, 2, 3."""
    answers = list(answers)
    return {name: distinct(answers, int(name.rpartition("_")[2])) for name in DISTINCT}


def said_row(prompt: Sequence[int], answer: Continuation) -> LabeledExample:
    """Return a row that scores what was written after a prompt, the token that ended it
    included."""
    said = [*answer.tokens, *([] if answer.end is None else [answer.end])]
    ids = [*prompt, *said]
    labels = [IGNORE] * len(prompt) + [KEEP] * len(said)
    start, closed = len(prompt), answer.ended
    return LabeledExample(ids, labels, [1] * len(ids), answer_start=start, closed=closed)


def span_rows(nll: np.ndarray, places: Iterable[np.ndarray]) -> list[Numbers | None]:
    """Return `metrics.span_probabilities` and the number of `tokens` of each span of an answer;
    None of one without a token.

    Args:
        nll: of the answer's tokens.
        places: of each span's tokens in it.
    """
    return [
        {"tokens": len(at), **span_probabilities(nll[at])} if len(at) else None for at in places
    ]


def span_means(rows: Iterable[Numbers | None]) -> Numbers:
    """Return the mean over an answer's spans of each of their numbers; None where none has it."""
    rows = [row for row in rows if row is not None]
    return {name: mean_of(row[field] for row in rows) for name, field in OF_SPANS.items()}


def sample_numbers(secrets: Sequence[str], samples: Sequence[str] | None) -> Numbers:
    """Return what drawn answers say of secrets; None where none was drawn.

    Returns:
        `leaked_in_samples`: how many secrets at least one of the answers says; `sample_leak_rate`:
        the share of pairs of a secret and an answer in which the answer says the secret (None
        without secrets).
    """
    if samples is None:
        return {"leaked_in_samples": None, SAMPLE_LEAKS: None}
    said = [[leaks(secret, text) for text in samples] for secret in secrets]
    rate = mean_of(float(one) for row in said for one in row)
    return {"leaked_in_samples": sum(map(any, said)), SAMPLE_LEAKS: rate}


def leak_rates(examples: Iterable[Mapping[str, Any]]) -> Numbers:
    """Return the share of all secrets that greedy answers say, and that samples do; None where
    none was asked for."""
    examples, rates = list(examples), {}
    for name, field in (("secrets_said", "leaked"), ("secrets_sampled", "leaked_in_samples")):
        asked = [row for row in examples if row[field] is not None]
        of = sum(row["asked"] for row in asked)
        rates[name] = sum(row[field] for row in asked) / of if of else None
    return rates


def mean_of(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are there; None where none is."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None

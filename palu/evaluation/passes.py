"""The passes through a model that metrics are computed from, each made once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from torch import nn

from palu.data.labels import LabeledExample
from palu.distributed import ALONE, Processes
from palu.evaluation.datasets import ANSWER, EvalSet
from palu.evaluation.fluency import FluencyClassifier
from palu.evaluation.inference import AnswerScores, Continuation, continuations, score_answers
from palu.evaluation.leaks import prompt_of, secrets_of, sort_secrets
from palu.evaluation.metrics import probability
from palu.evaluation.text import Numbers, said_row, sample_numbers, span_rows
from palu.models.wrappers import eos_token_ids, eval_mode

Report = Callable[[int, int], None]

# Sets that are not to be forgotten: nobody looks for secrets in samples there.
KEPT = ("retain", "ra", "wf")


class Passes:
    """What a model says to some sets of examples: losses of their answers, and its own answers.

    A forward pass or a greedy answer is computed once, when the first metric asks for it, however
    many metrics it serves.

    Args:
        model: a causal language model. Not changed.
        sets: name -> examples.
        batch_size: examples a forward pass.
        max_new_tokens: limit of a greedy answer; 0 leaves ROUGE and fluency out.
        processes: those that share the work; all of them must do the same.
        bar: makes a progress bar with a title: a context that gives `report(done, total)`.
        reference: makes the model that `mia_reference` compares with; None leaves it out.
        classifier: judges fluency; None leaves it out.
        original: makes the model before unlearning, under which answers are fluent or not; None
            leaves that out.
        samples: answers drawn for each example with a secret of the sets that are to be forgotten.
        temperature, seed: of the draws.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        sets: Mapping[str, EvalSet],
        *,
        batch_size: int,
        max_new_tokens: int,
        processes: Processes = ALONE,
        bar: Callable[[str], AbstractContextManager[Report | None]] = lambda title: nullcontext(),
        reference: Callable[[], nn.Module] | None = None,
        classifier: FluencyClassifier | None = None,
        original: Callable[[], nn.Module] | None = None,
        samples: int = 0,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.sets = model, tokenizer, sets
        self.max_new_tokens, self.bar = max_new_tokens, bar
        self.reference, self.classifier, self.original = reference, classifier, original
        self.samples, self.drawing = samples, {"temperature": temperature, "seed": seed}
        self._batching = {"batch_size": batch_size, "processes": processes}
        self._scores: dict[tuple[str, str], list[list[AnswerScores]]] = {}
        self._answers: dict[str, dict[int, Continuation]] = {}
        self._fluency: dict[str, dict[int, float]] = {}
        self._sampled: dict[str, dict[int, Numbers]] = {}

    def scores(
        self, name: str, field: str, model: nn.Module | None = None
    ) -> list[list[AnswerScores]]:
        """Return the scores of every answer in a field of a set, one list an example; under another
        model when one is given."""
        if model is None and (name, field) in self._scores:
            return self._scores[name, field]
        data = self.sets[name]
        title = f"{name}: {field}" + (" (reference)" if model is not None else "")
        with self.bar(title) as report:
            flat = score_answers(
                self.model if model is None else model,
                self.tokenizer,
                [row for rows in data.rows[field] for row in rows],
                # Both sides of membership inference need min-k++.
                standardise=model is None
                and "holdout" in self.sets
                and name in ("forget", "holdout"),
                report=report,
                **self._batching,
            )
        remaining = iter(flat)
        scores = [[next(remaining) for _ in rows] for rows in data.rows[field]]
        _check_finite(data, field, scores)
        if model is None:
            self._scores[name, field] = scores
        return scores

    def answers(self, name: str) -> dict[int, Continuation]:
        """Return the greedy answer of every example of a set that has a question, by its number."""
        asked = self.asked(name)
        if name not in self._answers and asked:
            said = self._continue(name, f"{name}: greedy answers", asked)
            self._answers[name] = dict(zip(asked, said, strict=True))
        return self._answers.get(name, {})

    def fluency(self, name: str) -> dict[int, float]:
        """Return how likely the original finds each greedy answer of a set."""
        answers = self.answers(name)
        if name not in self._fluency and self.original is not None and answers:
            rows = [
                said_row(prompt_ids(self.sets[name].rows[ANSWER][i][0]), answer)
                for i, answer in answers.items()
            ]
            model = self.original()
            with self.bar(f"{name}: fluency under the original") as report, eval_mode(model):
                scores = score_answers(model, self.tokenizer, rows, report=report, **self._batching)
            _check_finite(self.sets[name], "greedy answer", [[score] for score in scores])
            likely = [probability(score.nll) for score in scores]
            self._fluency[name] = dict(zip(answers, likely, strict=True))
        return self._fluency.get(name, {})

    def sample_leaks(self, name: str) -> dict[int, Numbers]:
        """Return what drawn answers say of the secrets of each example that has any, see
        `palu.evaluation.text.sample_numbers`."""
        asked = self.sampled(name)
        if name not in self._sampled and asked:
            title, times = f"{name}: {self.samples} samples", [self.samples] * len(asked)
            said = self._continue(name, title, np.repeat(asked, times).tolist(), **self.drawing)
            texts = [one.text for one in said]
            self._sampled[name] = {
                i: sample_numbers(
                    self.secrets(name, i), texts[n * self.samples : (n + 1) * self.samples]
                )
                for n, i in enumerate(asked)
            }
        return self._sampled.get(name, {})

    def _continue(
        self, name: str, title: str, asked: Sequence[int], **drawing: Any
    ) -> list[Continuation]:
        """Return an answer of the model for each example number."""
        rows = [row for (row,) in self.sets[name].rows[ANSWER]]
        # A template may close answers with a token that neither tokenizer nor model name.
        closing = {row["input_ids"][-1] for row in rows if row.closed}
        with self.bar(title) as report:
            return continuations(
                self.model,
                self.tokenizer,
                [prompt_ids(rows[i]) for i in asked],
                eos_token_ids=sorted({*eos_token_ids(self.model, self.tokenizer), *closing}),
                max_new_tokens=self.max_new_tokens,
                report=report,
                **drawing,
                **self._batching,
            )

    def asked(self, name: str) -> list[int]:
        """Return the numbers of the examples whose greedy answers are wanted."""
        examples = self.sets[name].examples if self.max_new_tokens else ()
        return [i for i, example in enumerate(examples) if example.question is not None]

    def sampled(self, name: str) -> list[int]:
        """Return the numbers of the examples for which answers are drawn: those with a secret, of
        what is to be forgotten."""
        if not self.samples or name in KEPT:
            return []
        return [i for i in self.asked(name) if self.secrets(name, i)]

    def work(self, name: str) -> int:
        """Return how many examples `results` passes through a model, each as often as it does."""
        answers, samples = len(self.asked(name)), len(self.sampled(name)) * self.samples
        scored = answers if self.original is not None else 0
        return len(self.sets[name].examples) + answers + scored + samples

    def secrets(self, name: str, number: int) -> list[str]:
        """Return the secrets that an answer to an example can give away."""
        example = self.sets[name].examples[number]
        return sort_secrets(secrets_of(example), prompt_of(example)).judged

    def spans(self, name: str, number: int) -> list[Numbers | None]:
        """Return the numbers of each span of an example's answer."""
        ((score,), places) = self.scores(name, ANSWER)[number], self.sets[name].span_places(number)
        return span_rows(score.nll, places)


def check_sampling(samples: int, temperature: float, max_new_tokens: int) -> None:
    """Raise ValueError for draws that cannot be made."""
    if samples < 0:
        raise ValueError(f"samples must be at least 0, not {samples}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be above 0, not {temperature}")
    if samples and not max_new_tokens:
        raise ValueError(f"samples is {samples}: max_new_tokens must be at least 1, not 0")


def prompt_ids(row: LabeledExample) -> list[int]:
    """Return the very tokens before the answer."""
    return row["input_ids"][: row.answer_start]


def _check_finite(data: EvalSet, field: str, scores: Sequence[Sequence[AnswerScores]]) -> None:
    """Raise FloatingPointError that names file, row and field of the first loss that is not
    finite."""
    for number, of_example in enumerate(scores):
        for score in of_example:
            wrong = np.flatnonzero(~np.isfinite(score.nll))
            if wrong.size:
                raise FloatingPointError(
                    f"{data.describe(number, field)}: the model's loss is not finite "
                    f"({score.nll[wrong[0]]} at token {wrong[0]} of the answer)"
                )

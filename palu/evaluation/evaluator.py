"""Measure every metric that a model and some sets of examples allow, as entries of a log."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from torch import nn

from palu.data.labels import LabeledExample
from palu.data.records import Example
from palu.data.template import Template
from palu.distributed import ALONE, Processes
from palu.evaluation.datasets import ANSWER, PARAPHRASED, PERTURBED, EvalSet
from palu.evaluation.eval_log import Log, LogError
from palu.evaluation.fluency import FluencyClassifier
from palu.evaluation.inference import AnswerScores, greedy_answers, score_answers
from palu.evaluation.leaks import leaks, prompt_of, secrets_of, sort_secrets
from palu.evaluation.metrics import (
    exact_memorization,
    extraction_strength,
    min_k_score,
    probability,
    reference_score,
    rouge,
    zlib_score,
)
from palu.evaluation.tofu import aggregate, derived_entries
from palu.models.wrappers import eos_token_ids, eval_mode

METRICS = ("answer_probability", "sensitive_probability", "rougeL_recall", "exact_memorization")
"""Columns of the table of `palu.evaluation.metrics_table`."""
MORE_METRICS = ("extraction_strength", "rouge1_recall", "rouge1_f1", "rougeL_f1")

Entry = dict[str, Any]
Report = Callable[[int, int], None]


def evaluate_examples(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    template: Template | None = None,
    max_length: int = 512,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Measure a causal language model on examples. Neither the model nor the tokenizer is changed.

    Per example (`palu.evaluation.metrics` has the formulas):
        answer_probability: of the answer's tokens, the closing end token included.
        sensitive_probability: of its sensitive tokens; None for an example without any.
        rougeL_recall, rougeL_f1, rouge1_recall, rouge1_f1: of the greedy answer, words stemmed;
            None for a plain document (no question).
        exact_memorization, extraction_strength: of the answer's tokens, end token left out; exact
            memorization is None when no token is left.
        asked, leaked: how many secrets (the texts of its spans) an answer can give away, and how
            many the greedy answer says (`palu.evaluation.leaks`; None without an answer).

    Args:
        examples: see `palu.load_examples`; at least one.
        template: how questions are put; `Template()` when None.
        max_length: tokens; longer examples are cut, with a warning.
        batch_size: examples a forward pass.
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
    data = EvalSet.tokenize(
        "examples", examples, tokenizer, template=template or Template(), max_length=max_length
    )
    sizes = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    starts = iter((0, len(examples)))  # the scores' progress, then the answers'

    def bar(title: str) -> AbstractContextManager[Report | None]:
        start = next(starts)
        total = len(examples) + len(evaluator.asked("examples"))
        return nullcontext(progress and (lambda done, _: progress(start + done, total)))

    evaluator = Evaluator(model, tokenizer, {"examples": data}, bar=bar, **sizes)
    return evaluator.results("examples")


class Evaluator:
    """Measure a model on the sets `forget`, `retain`, `ra`, `wf` and `holdout`, any of them.

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
    ) -> None:
        self.model, self.tokenizer, self.sets = model, tokenizer, sets
        self.max_new_tokens, self.bar = max_new_tokens, bar
        self.reference, self.classifier = reference, classifier
        self._batching = {"batch_size": batch_size, "processes": processes}
        self._scores: dict[tuple[str, str], list[list[AnswerScores]]] = {}
        self._answers: dict[str, dict[int, str]] = {}
        self.metrics = self._metrics()

    def run(
        self,
        log: dict[str, Entry],
        retrained: Log | None,
        save: Callable[[dict[str, Entry]], None],
        source: str = "log",
    ) -> None:
        """Add to `log` what it lacks, one metric after the other.

        Args:
            log: entries that are there are kept, and what is derived from them is computed anew.
            retrained: log of the retrained model, for forget quality and privleak. Where it is
                None, numbers against an earlier one stay.
            save: called after every metric and at the end.
            source: name of the log in messages.

        Raises:
            FloatingPointError: a loss that is not finite; names file, row and field.
            LogError: an entry of `log` with other rows than its set has.
        """
        self._check(Log(log, source))
        with eval_mode(self.model):
            for metric, measure in self.metrics.items():
                if not log.get(metric):
                    log[metric] = measure()
                    log[metric]["agg_value"] = aggregate(Log(log, source), metric)
                    log[metric] = dict(sorted(log[metric].items()))
                    save(log)
                elif metric.endswith("_ROUGE"):
                    self._recall_answers(metric, log[metric])
        for metric, entry in derived_entries(Log(log, source), retrained).items():
            kept = retrained is None and metric in ("forget_quality", "privleak")
            if not (kept and log.get(metric, {}).get("agg_value") is not None):
                log[metric] = entry
        save(log)

    def results(self, name: str) -> dict[str, Any]:
        """Return the numbers of a set as `evaluate_examples` does."""
        data = self.sets[name]
        with eval_mode(self.model):
            scores = [score for (score,) in self.scores(name, ANSWER)]
            answers = self.answers(name)
        results = []
        for i, (example, score) in enumerate(zip(data.examples, scores, strict=True)):
            text = answers.get(i)
            rouges = {} if text is None else rouge(example.answer, text)
            correct = score.without_end(score.argmax_correct)
            secrets = sort_secrets(secrets_of(example), prompt_of(example)).judged
            result = {
                "id": example.id,
                "answer_probability": _probability(score.nll),
                "sensitive_probability": _probability(score.nll[score.sensitive]),
                "exact_memorization": exact_memorization(correct),
                "extraction_strength": extraction_strength(correct),
                "asked": len(secrets),
                "leaked": None if text is None else sum(leaks(one, text) for one in secrets),
                "generated": text,
            }
            names = [n for n in (*METRICS, *MORE_METRICS) if n.startswith("rouge")]
            results.append(result | {n: rouges.get(n) for n in names})
        means = {}
        for metric in (*METRICS, *MORE_METRICS):
            values = [result[metric] for result in results if result[metric] is not None]
            means[metric] = math.fsum(values) / len(values) if values else None
        return {"count": len(results), "mean": means, "examples": results}

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

    def answers(self, name: str) -> dict[int, str]:
        """Return the greedy answer of every example of a set that has a question, by its number."""
        asked = self.asked(name)
        if name not in self._answers and asked:
            rows = [row for (row,) in self.sets[name].rows[ANSWER]]
            # A template may close answers with a token that neither tokenizer nor model name.
            closing = {row["input_ids"][-1] for row in rows if row.closed}
            with self.bar(f"{name}: greedy answers") as report:
                texts = greedy_answers(
                    self.model,
                    self.tokenizer,
                    [_prompt(rows[i]) for i in asked],
                    eos_token_ids=sorted({*eos_token_ids(self.model, self.tokenizer), *closing}),
                    max_new_tokens=self.max_new_tokens,
                    report=report,
                    **self._batching,
                )
            self._answers[name] = dict(zip(asked, texts, strict=True))
        return self._answers.get(name, {})

    def asked(self, name: str) -> list[int]:
        """Return the numbers of the examples whose greedy answers are wanted."""
        examples = self.sets[name].examples if self.max_new_tokens else ()
        return [i for i, example in enumerate(examples) if example.question is not None]

    def _metrics(self) -> dict[str, Callable[[], Entry]]:
        """Return what measures each metric that the sets allow, in the order of the run."""
        metrics: dict[str, Callable[[], Entry]] = {}
        kinds = {ANSWER: "", PARAPHRASED: "PARA_", PERTURBED: "PERT_"}
        known = [name for name in self.sets if name != "holdout"]
        for name in known:
            for field in self.sets[name].rows:
                metrics[f"{name}_Q_A_{kinds[field]}Prob"] = lambda n=name, f=field: self._prob(n, f)
            if name == "forget":
                metrics["exact_memorization"] = lambda: self._memorized(exact_memorization)
                metrics["extraction_strength"] = lambda: self._memorized(extraction_strength)
        if {"forget", "holdout"} <= set(self.sets):
            metrics |= {
                "mia_loss": lambda: self._attack(lambda row, score: score.loss),
                "mia_zlib": lambda: self._attack(self._zlib),
                "mia_min_k": lambda: self._attack(_min_k),
                "mia_min_k_plus_plus": lambda: self._attack(_min_k_plus_plus),
            }
            if self.reference is not None:
                metrics["mia_reference"] = self._reference_attack
        for name in known:
            if self.asked(name):
                metrics[f"{name}_Q_A_ROUGE"] = lambda n=name: self._rouge(n)
        if self.classifier is not None and "forget_Q_A_ROUGE" in metrics:
            metrics["forget_Q_A_gibberish"] = self._fluency
        return metrics

    def _check(self, log: Log) -> None:
        """Raise LogError for an entry of other rows than its set has."""
        for metric in self.metrics:
            if not log.metrics.get(metric):
                continue
            name = metric.split("_")[0]
            data = self.sets[name if name in self.sets else "forget"]
            rows = log.rows(metric, "forget" if metric.startswith("mia_") else None).rows
            by_answer = metric.endswith(("_ROUGE", "_gibberish"))
            wanted = {
                str(i)
                for i, example in enumerate(data.examples)
                if example.question is not None or not by_answer
            }
            if {*map(str, rows)} != wanted:
                raise LogError(
                    f"{log.source}: metric {metric!r} has {len(rows)} rows and is not of the "
                    f"{len(wanted)} rows of {data.source}; name another --output or add "
                    "--overwrite"
                )

    def _recall_answers(self, metric: str, entry: Entry) -> None:
        """Take the greedy answers of an entry that was in the log instead of generating them."""
        rows = entry["value_by_index"]
        texts = {
            int(i): row.get("generation") for i, row in rows.items() if isinstance(row, Mapping)
        }
        if len(texts) == len(rows) and all(isinstance(text, str) for text in texts.values()):
            self._answers[metric.split("_")[0]] = texts

    def _prob(self, name: str, field: str) -> Entry:
        rows = []
        for scores in self.scores(name, field):
            losses = [score.loss for score in scores]
            probs = [None if loss is None else float(np.exp(-loss)) for loss in losses]
            if field != PERTURBED:
                probs, losses = probs[0], losses[0]
            rows.append({"prob": probs, "avg_loss": losses})
        return _by_index(rows)

    def _memorized(self, measure: Callable[[np.ndarray], float | None]) -> Entry:
        scores = [score for (score,) in self.scores("forget", ANSWER)]
        return _scored([measure(score.without_end(score.argmax_correct)) for score in scores])

    def _rouge(self, name: str) -> Entry:
        data, rows = self.sets[name], {}
        for number, text in self.answers(name).items():
            truth = data.examples[number].answer.strip()
            values = rouge(truth, text)
            prompt = _prompt(data.rows[ANSWER][number][0])
            rows[str(number)] = {
                **{key: values[key] for key in ("rouge1_recall", "rougeL_f1", "rougeL_recall")},
                "input": self.tokenizer.decode(prompt, skip_special_tokens=True),
                "ground_truth": truth,
                "generation": text,
            }
        return {"value_by_index": rows}

    def _fluency(self) -> Entry:
        answers = self.answers("forget")
        with self.bar("forget: fluency") as report:
            scores = self.classifier.scores([*answers.values()], report=report, **self._batching)
        pairs = zip(answers.items(), scores, strict=True)
        rows = {str(i): {"score": score, "generation": text} for (i, text), score in pairs}
        return {"value_by_index": rows}

    def _attack(
        self, measure: Callable[..., float | None], reference: nn.Module | None = None
    ) -> Entry:
        """Return the entry of an attack: `measure(row, score)`, or `measure(row, score, score of
        the reference)`, of forget and holdout answers, and their AUC."""
        entry: Entry = {}
        for name in ("forget", "holdout"):
            columns = [self.sets[name].rows[ANSWER], self.scores(name, ANSWER)]
            if reference is not None:
                columns.append(self.scores(name, ANSWER, reference))
            scores = [
                measure(*(value for (value,) in cells)) for cells in zip(*columns, strict=True)
            ]
            known = [score for score in scores if score is not None]
            entry[name] = {"agg_value": float(np.mean(known)) if known else None, **_scored(scores)}
        entry["auc"] = aggregate(Log({"mia_": entry}, "this run"), "mia_")
        return entry

    def _reference_attack(self) -> Entry:
        reference = self.reference()
        with eval_mode(reference):
            return self._attack(_reference_score, reference)

    def _zlib(self, row: LabeledExample, score: AnswerScores) -> float | None:
        text = self.tokenizer.decode(row["input_ids"][row.answer_start :], skip_special_tokens=True)
        return None if score.loss is None else zlib_score(score.loss, text)


def check_retrained(retrained: Log | None, sets: Mapping[str, EvalSet]) -> None:
    """Raise LogError where the retrained model's log lacks what forget quality (forget records
    with perturbed answers) or privleak (a holdout set) compares with: before any work."""
    if retrained is None:
        return
    if {PARAPHRASED, PERTURBED} <= set(sets["forget"].rows):
        retrained.rows("forget_truth_ratio", needed_by="forget_quality").numbers("score")
    if "holdout" in sets:
        retrained.entry("mia_min_k", needed_by="privleak")
        aggregate(retrained, "mia_min_k")


def _prompt(row: LabeledExample) -> list[int]:
    """Return the very tokens before the answer."""
    return row["input_ids"][: row.answer_start]


def _min_k(row: LabeledExample, score: AnswerScores) -> float:
    return min_k_score(-score.without_end(score.nll))


def _min_k_plus_plus(row: LabeledExample, score: AnswerScores) -> float:
    return min_k_score(score.without_end(score.standardised))


def _reference_score(row: LabeledExample, score: AnswerScores, other: AnswerScores) -> float | None:
    return None if score.loss is None else reference_score(score.loss, other.loss)


def _by_index(rows: Sequence[Entry]) -> Entry:
    return {"value_by_index": {str(number): row for number, row in enumerate(rows)}}


def _scored(values: Sequence[float | None]) -> Entry:
    return _by_index([{"score": value} for value in values])


def _probability(nll: np.ndarray) -> float | None:
    return probability(nll) if nll.size else None


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

"""Measure every metric that a model and some sets of examples allow, as entries of a log."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn

from palu.data.labels import LabeledExample
from palu.data.records import Example
from palu.data.template import Template
from palu.evaluation.datasets import ANSWER, PARAPHRASED, PERTURBED, EvalSet
from palu.evaluation.eval_log import Log, LogError
from palu.evaluation.inference import AnswerScores, written
from palu.evaluation.leaks import leaks
from palu.evaluation.metrics import (
    exact_memorization,
    extraction_strength,
    min_k_score,
    probability,
    reference_score,
    rouge,
    zlib_score,
)
from palu.evaluation.names import KS_STATISTIC, METRICS, MORE_METRICS, PER_EXAMPLE, SAMPLE_LEAKS
from palu.evaluation.passes import Passes, Report, check_sampling, prompt_ids
from palu.evaluation.quality_error import quality_error
from palu.evaluation.text import (
    answer_numbers,
    distinct_numbers,
    leak_rates,
    mean_of,
    sample_numbers,
    span_means,
)
from palu.evaluation.tofu import aggregate, derived_entries
from palu.models.wrappers import eval_mode

# Endings of the metrics that have a row for each example with a question.
OF_ANSWERS = ("_ROUGE", "_gibberish", "_ended", "_fluency", "_said")

Entry = dict[str, Any]


def evaluate_examples(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    template: Template | None = None,
    max_length: int = 512,
    batch_size: int = 16,
    max_new_tokens: int = 200,
    original: nn.Module | None = None,
    samples: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
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
        fluency: probability of the greedy answer under `original`, its end token included, to the
            power of 1 over its length; None without `original`.
        repetition, longest_run, answer_tokens: of the tokens of the greedy answer; repetition is
            None where they are fewer than four.
        ended: 1.0 where the greedy answer ended by itself, else 0.0.
        fell_apart: 1.0 where the greedy answer is no text any more, else 0.0
            (`metrics.fell_apart`).
        span_probability, span_joint_probability, span_first_probability, span_rest_probability:
            means over the answer's spans of the probability of a span (to the power of 1 over its
            length; of all of it), of its first token and of the others; None without spans.
        spans: those of each span: `{"tokens", "mean", "joint", "first", "rest"}`, None for one that
            is cut off.
        leaked_in_samples, sample_leak_rate: how many secrets at least one of `samples` drawn
            answers says, and in what share of the answers one is said on the average.

    Args:
        examples: see `palu.load_examples`; at least one.
        template: how questions are put; `Template()` when None.
        max_length: tokens; longer examples are cut, with a warning.
        batch_size: examples a forward pass.
        max_new_tokens: limit of an answer; 0 leaves ROUGE and all that reads answers out (None
            everywhere).
        original: the model before unlearning, which says how fluent the answers are; it has the
            same tokens.
        samples: answers drawn for each example that has a secret to say.
        temperature: of the draws.
        seed: of the draws. They depend on `batch_size` too.
        progress: called with (examples done, of how many), forward passes and answers counted
            alike.

    Returns:
        `{"count", "mean": {metric: float | None}, "numbers": {...}, "examples": [{"id", metric:
        ..., "generated"}]}`; means are plain means over the examples that have the number, None
        where none has. `numbers` are those of the whole set: `distinct_1` to `distinct_3` of the
        greedy answers, and the share of all secrets that they, or samples, say (`secrets_said`,
        `secrets_sampled`).

    Raises:
        ValueError: no examples, or a size below its minimum.
        FloatingPointError: a loss that is not finite; names the example.
    """
    if batch_size < 1 or max_new_tokens < 0:
        raise ValueError(
            f"batch_size must be at least 1 and max_new_tokens at least 0, "
            f"not {batch_size} and {max_new_tokens}"
        )
    check_sampling(samples, temperature, max_new_tokens)
    data = EvalSet.tokenize(
        "examples", examples, tokenizer, template=template or Template(), max_length=max_length
    )
    done: list[int] = []  # of each bar that has ended

    @contextmanager
    def bar(title: str) -> Iterator[Report | None]:
        start, total = sum(done), evaluator.work("examples")
        ends = [0]

        def report(now: int, of: int) -> None:
            ends[0] = of
            progress(start + now, total)

        yield progress and report
        done.append(ends[0])

    evaluator = Evaluator(
        model,
        tokenizer,
        {"examples": data},
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        bar=bar,
        original=None if original is None else lambda: original,
        samples=samples,
        temperature=temperature,
        seed=seed,
    )
    return evaluator.results("examples")


class Evaluator(Passes):
    """Measure a model on the sets `forget`, `retain`, `ra`, `wf` and `holdout`, any of them."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
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
                else:
                    self._recall(metric, log[metric])
        for metric, entry in derived_entries(Log(log, source), retrained).items():
            kept = retrained is None and metric in ("forget_quality", "privleak")
            if not (kept and log.get(metric, {}).get("agg_value") is not None):
                log[metric] = entry
        if retrained is not None and "forget_truth_ratio" in log:
            log.pop(KS_STATISTIC, None)
            if entry := quality_error(Log(log, source), retrained):
                log[KS_STATISTIC] = entry
        save(log)

    def results(self, name: str) -> dict[str, Any]:
        """Return the numbers of a set as `evaluate_examples` does."""
        data = self.sets[name]
        with eval_mode(self.model):
            scores = [score for (score,) in self.scores(name, ANSWER)]
            answers, fluency = self.answers(name), self.fluency(name)
            samples = self.sample_leaks(name)
        results = []
        for i, (example, score) in enumerate(zip(data.examples, scores, strict=True)):
            answer = answers.get(i)
            text = None if answer is None else answer.text
            rouges = {} if text is None else rouge(example.answer, text)
            correct = score.without_end(score.argmax_correct)
            secrets, spans = self.secrets(name, i), self.spans(name, i)
            result = {
                "id": example.id,
                "answer_probability": _probability(score.nll),
                "sensitive_probability": _probability(score.nll[score.sensitive]),
                "exact_memorization": exact_memorization(correct),
                "extraction_strength": extraction_strength(correct),
                "asked": len(secrets),
                "leaked": None if text is None else sum(leaks(one, text) for one in secrets),
                "generated": text,
                "fluency": fluency.get(i),
                **answer_numbers(answer),
                **samples.get(i, sample_numbers((), None)),
                **span_means(spans),
                "spans": spans,
            }
            names = [n for n in (*METRICS, *MORE_METRICS) if n.startswith("rouge")]
            results.append(result | {n: rouges.get(n) for n in names})
        tokens = [answer.tokens for answer in answers.values()]
        return {
            "count": len(results),
            "mean": {name: mean_of(row[name] for row in results) for name in PER_EXAMPLE},
            "numbers": {**distinct_numbers(tokens), **leak_rates(results)},
            "examples": results,
        }

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
        return metrics | self._answer_metrics(known)

    def _answer_metrics(self, known: Sequence[str]) -> dict[str, Callable[[], Entry]]:
        """Return those of answers, spans and secrets."""
        metrics: dict[str, Callable[[], Entry]] = {}
        for name in known:
            if self.asked(name):
                metrics[f"{name}_ended"] = lambda n=name: self._ended(n)
                metrics[f"{name}_Q_A_ROUGE"] = lambda n=name: self._rouge(n)
                if self.original is not None:
                    metrics[f"{name}_fluency"] = lambda n=name: self._fluent(n)
        if self.classifier is not None and "forget_Q_A_ROUGE" in metrics:
            metrics["forget_Q_A_gibberish"] = self._gibberish
        if "forget" not in self.sets:
            return metrics
        if any(example.spans for example in self.sets["forget"].examples):
            metrics["forget_span_probability"] = self._span_entry
        if any(self.secrets("forget", i) for i in self.asked("forget")):
            metrics["forget_secrets_said"] = self._said
        if self.sampled("forget"):
            metrics["forget_secrets_sampled"] = self._sampled_entry
        return metrics

    def _check(self, log: Log) -> None:
        """Raise LogError for an entry of other rows than its set has."""
        for metric in self.metrics:
            if not log.metrics.get(metric):
                continue
            name = metric.split("_")[0]
            name = name if name in self.sets else "forget"
            data = self.sets[name]
            rows = log.rows(metric, "forget" if metric.startswith("mia_") else None).rows
            by_answer = metric.endswith(OF_ANSWERS)
            wanted = {
                str(i)
                for i, example in enumerate(data.examples)
                if example.question is not None or not by_answer
            }
            if metric.endswith("_sampled"):
                wanted = {*map(str, self.sampled(name))}
            if {*map(str, rows)} != wanted:
                raise LogError(
                    f"{log.source}: metric {metric!r} has {len(rows)} rows and is not of the "
                    f"{len(wanted)} rows of {data.source}; name another --output or add "
                    "--overwrite"
                )

    def _recall(self, metric: str, entry: Entry) -> None:
        """Take what an entry holds that was in the log instead of computing it again."""
        name, _, kind = metric.partition("_")
        rows = {int(i): row for i, row in entry.get("value_by_index", {}).items()}
        if kind == "ended":
            self._answers[name] = {
                i: written(self.tokenizer, row["tokens"], row["end"]) for i, row in rows.items()
            }
        elif kind == "fluency":
            self._fluency[name] = {i: row["score"] for i, row in rows.items()}
        elif kind == "secrets_sampled":
            names = {"leaked": "leaked_in_samples", "score": SAMPLE_LEAKS}
            self._sampled[name] = {
                i: {names[key]: row[key] for key in names} for i, row in rows.items()
            }
        elif kind == "Q_A_ROUGE":
            self._compare_answers(name, rows)

    def _compare_answers(self, name: str, rows: Mapping[int, Any]) -> None:
        """Warn of answers in the log that are not those of this run."""
        said = self.answers(name)
        texts = {i: row.get("generation") for i, row in rows.items() if isinstance(row, Mapping)}
        other = [i for i, text in texts.items() if isinstance(text, str) and text != said[i].text]
        if other:
            warnings.warn(
                f"{len(other)} of the {len(rows)} answers of {name}_Q_A_ROUGE in the log are not "
                f"what the model answers (first: row {other[0]}): ROUGE is of those in the log",
                stacklevel=3,
            )

    def _ended(self, name: str) -> Entry:
        rows = {
            str(i): {"score": float(one.ended), "tokens": one.tokens, "end": one.end}
            for i, one in self.answers(name).items()
        }
        return {"value_by_index": rows}

    def _fluent(self, name: str) -> Entry:
        return {"value_by_index": {str(i): {"score": p} for i, p in self.fluency(name).items()}}

    def _span_entry(self) -> Entry:
        rows = [self.spans("forget", i) for i in range(len(self.sets["forget"].examples))]
        return _by_index(
            [{"score": span_means(spans)["span_probability"], "spans": spans} for spans in rows]
        )

    def _said(self) -> Entry:
        rows = {}
        for i, answer in self.answers("forget").items():
            secrets = self.secrets("forget", i)
            said = sum(leaks(one, answer.text) for one in secrets)
            rows[str(i)] = {"asked": len(secrets), "leaked": said}
        return {"value_by_index": rows}

    def _sampled_entry(self) -> Entry:
        rows = {
            str(i): {
                "asked": len(self.secrets("forget", i)),
                "leaked": one["leaked_in_samples"],
                "score": one[SAMPLE_LEAKS],
            }
            for i, one in self.sample_leaks("forget").items()
        }
        return {"value_by_index": rows}

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
        for number, answer in self.answers(name).items():
            text = answer.text
            truth = data.examples[number].answer.strip()
            values = rouge(truth, text)
            prompt = prompt_ids(data.rows[ANSWER][number][0])
            rows[str(number)] = {
                **{key: values[key] for key in ("rouge1_recall", "rougeL_f1", "rougeL_recall")},
                "input": self.tokenizer.decode(prompt, skip_special_tokens=True),
                "ground_truth": truth,
                "generation": text,
            }
        return {"value_by_index": rows}

    def _gibberish(self) -> Entry:
        answers = {i: answer.text for i, answer in self.answers("forget").items()}
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

"""Every metric that a model and some sets of examples allow, as entries of a log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from torch import nn

from palu.evaluation.batches import ALONE, Processes
from palu.evaluation.datasets import ANSWER, PARAPHRASED, PERTURBED, EvalSet
from palu.evaluation.eval_log import Log, LogError
from palu.evaluation.examples import check_finite, prompt, results, stops
from palu.evaluation.fluency import FluencyClassifier
from palu.evaluation.generation import greedy_answers
from palu.evaluation.inference import AnswerScores, score_answers
from palu.evaluation.membership import (
    min_k_plus_plus_score,
    min_k_score,
    reference_score,
    zlib_score,
)
from palu.evaluation.metrics import exact_memorization, extraction_strength, rouge
from palu.evaluation.tofu import aggregate, derived_entries
from palu.models.wrappers import eval_mode

Entry = dict[str, Any]
Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None] | None]]


class Evaluation:
    """Measures a model on the sets `forget`, `retain`, `ra`, `wf` and `holdout`, any of them.

    A forward pass or a greedy answer is computed once, when the first metric asks for it, however
    many metrics are made of it.

    Args:
        model: a causal language model. Not changed.
        sets: name -> examples.
        batch_size: rows a forward pass.
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
        bar: Bar = lambda title: nullcontext(),
        reference: Callable[[], nn.Module] | None = None,
        classifier: FluencyClassifier | None = None,
    ) -> None:
        self.model, self.tokenizer, self.sets = model, tokenizer, sets
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.processes, self.bar = processes, bar
        self.reference, self.classifier = reference, classifier
        self._scores: dict[tuple[str, str], list[list[AnswerScores]]] = {}
        self._answers: dict[str, dict[int, str]] = {}
        self.metrics = self._metrics()

    def run(
        self,
        log: dict[str, Entry],
        retrained: Log | None,
        save: Callable[[dict[str, Entry]], None],
        place: str = "log",
    ) -> None:
        """Fills `log` with what it lacks, one metric after the other.

        Args:
            log: entries that are there are kept, and what is made of them is made anew.
            retrained: log of the retrained model, for forget quality and privleak. Where it is
                None, numbers against an earlier one stay.
            save: called after every metric and at the end.
            place: what messages call the log.

        Raises:
            FloatingPointError: a loss that is not finite; names file, row and field.
            LogError: an entry of `log` with other rows than its set has.
        """
        self._check(Log(log, place))
        with eval_mode(self.model):
            for metric, make in self.metrics.items():
                if not log.get(metric):
                    log[metric] = make()
                    log[metric]["agg_value"] = aggregate(Log(log, place), metric)
                    log[metric] = dict(sorted(log[metric].items()))
                    save(log)
                elif metric.endswith("_ROUGE"):
                    self._recall_answers(metric, log[metric])
        for metric, entry in derived_entries(Log(log, place), retrained).items():
            kept = retrained is None and metric in ("forget_quality", "privleak")
            if not (kept and log.get(metric, {}).get("agg_value") is not None):
                log[metric] = entry
        save(log)

    def results(self, name: str) -> dict[str, Any]:
        """The numbers of a set as `palu.evaluation.evaluate_examples` gives them."""
        data = self.sets[name]
        with eval_mode(self.model):
            scores = [score for (score,) in self.scores(name, ANSWER)]
            answers = self.answers(name)
        generated = [answers.get(i) for i in range(len(data.examples))]
        return results(data.examples, scores, generated)

    def scores(
        self, name: str, field: str, model: nn.Module | None = None
    ) -> list[list[AnswerScores]]:
        """Scores of every answer in a field of a set, one list an example; under another model
        when one is given."""
        if model is None and (name, field) in self._scores:
            return self._scores[name, field]
        data = self.sets[name]
        of_example = data.rows[field]
        title = f"{name}: {field}" + (" (reference)" if model is not None else "")
        with self.bar(title) as report:
            flat = score_answers(
                self.model if model is None else model,
                self.tokenizer,
                [row for rows in of_example for row in rows],
                batch_size=self.batch_size,
                # Min-k++ is of both sides of membership inference.
                standardise=model is None
                and "holdout" in self.sets
                and name in ("forget", "holdout"),
                processes=self.processes,
                report=report,
            )
        each = iter(flat)
        found = [[next(each) for _ in rows] for rows in of_example]
        check_finite(data, field, found)
        if model is None:
            self._scores[name, field] = found
        return found

    def answers(self, name: str) -> dict[int, str]:
        """The greedy answer of every example of a set that has a question, by its number."""
        if name not in self._answers:
            data = self.sets[name]
            rows = [row for (row,) in data.rows[ANSWER]]
            if not (asked := self._asked(name)):
                return {}
            with self.bar(f"{name}: greedy answers") as report:
                texts = greedy_answers(
                    self.model,
                    self.tokenizer,
                    [prompt(rows[i]) for i in asked],
                    eos_token_ids=stops(self.model, self.tokenizer, rows),
                    max_new_tokens=self.max_new_tokens,
                    batch_size=self.batch_size,
                    processes=self.processes,
                    report=report,
                )
            self._answers[name] = dict(zip(asked, texts, strict=True))
        return self._answers[name]

    def _metrics(self) -> dict[str, Callable[[], Entry]]:
        """What the sets allow, in the order it is run."""
        made: dict[str, Callable[[], Entry]] = {}
        kinds = {ANSWER: "", PARAPHRASED: "PARA_", PERTURBED: "PERT_"}
        known = [name for name in self.sets if name != "holdout"]
        for name in known:
            for field in self.sets[name].rows:
                made[f"{name}_Q_A_{kinds[field]}Prob"] = lambda n=name, f=field: self._prob(n, f)
            if name == "forget":
                made["exact_memorization"] = lambda: self._of_hits(exact_memorization)
                made["extraction_strength"] = lambda: self._of_hits(extraction_strength)
        if {"forget", "holdout"} <= set(self.sets):
            made |= {
                "mia_loss": lambda: self._attack(lambda row, score: score.loss),
                "mia_zlib": lambda: self._attack(self._zlib),
                "mia_min_k": lambda: self._attack(_min_k),
                "mia_min_k_plus_plus": lambda: self._attack(_min_k_plus_plus),
            }
            if self.reference is not None:
                made["mia_reference"] = self._reference_attack
        for name in known:
            if self._asked(name):
                made[f"{name}_Q_A_ROUGE"] = lambda n=name: self._rouge(n)
        if self.classifier is not None and "forget_Q_A_ROUGE" in made:
            made["forget_Q_A_gibberish"] = self._fluency
        return made

    def _asked(self, name: str) -> list[int]:
        examples = self.sets[name].examples if self.max_new_tokens else ()
        return [i for i, example in enumerate(examples) if example.question is not None]

    def _check(self, log: Log) -> None:
        for metric in self.metrics:
            if not log.metrics.get(metric):
                continue
            name = metric.split("_")[0]
            data = self.sets[name if name in self.sets else "forget"]
            found = log.rows(metric, "forget" if metric.startswith("mia_") else None).rows
            asked = metric.endswith(("_ROUGE", "_gibberish"))
            wanted = {
                str(i) for i, e in enumerate(data.examples) if e.question is not None or not asked
            }
            if {*map(str, found)} != wanted:
                raise LogError(
                    f"{log.place}: metric {metric!r} has {len(found)} rows and is not of the "
                    f"{len(wanted)} rows of {data.source}; name another --output or add "
                    "--overwrite"
                )

    def _recall_answers(self, metric: str, entry: Entry) -> None:
        """Takes the greedy answers of an entry that was in the log: they are not made again."""
        rows = entry["value_by_index"]
        texts = {
            int(i): row.get("generation") for i, row in rows.items() if isinstance(row, Mapping)
        }
        if len(texts) == len(rows) and all(isinstance(text, str) for text in texts.values()):
            self._answers[metric.split("_")[0]] = texts

    def _prob(self, name: str, field: str) -> Entry:
        rows = {}
        for number, scores in enumerate(self.scores(name, field)):
            losses = [score.loss for score in scores]
            probs = [None if loss is None else float(np.exp(-loss)) for loss in losses]
            listed = field == PERTURBED
            rows[str(number)] = {
                "prob": probs if listed else probs[0],
                "avg_loss": losses if listed else losses[0],
            }
        return {"value_by_index": rows}

    def _of_hits(self, measure: Callable[[np.ndarray], float | None]) -> Entry:
        scores = [score for (score,) in self.scores("forget", ANSWER)]
        values = [measure(score.without_end(score.hits)) for score in scores]
        return {"value_by_index": _scored(values)}

    def _rouge(self, name: str) -> Entry:
        data, rows = self.sets[name], {}
        for number, text in self.answers(name).items():
            truth = data.examples[number].answer.strip()
            numbers = rouge(truth, text)
            asked = prompt(data.rows[ANSWER][number][0])
            rows[str(number)] = {
                **{key: numbers[key] for key in ("rouge1_recall", "rougeL_f1", "rougeL_recall")},
                "input": self.tokenizer.decode(asked, skip_special_tokens=True),
                "ground_truth": truth,
                "generation": text,
            }
        return {"value_by_index": rows}

    def _fluency(self) -> Entry:
        answers = self.answers("forget")
        with self.bar("forget: fluency") as report:
            scores = self.classifier.scores(
                [*answers.values()],
                batch_size=self.batch_size,
                processes=self.processes,
                report=report,
            )
        each = zip(answers.items(), scores, strict=True)
        return {
            "value_by_index": {
                str(i): {"score": score, "generation": text} for (i, text), score in each
            }
        }

    def _attack(self, measure: Callable[[Any, AnswerScores], float | None]) -> Entry:
        values = {}
        for name in ("forget", "holdout"):
            pairs = zip(self.sets[name].rows[ANSWER], self.scores(name, ANSWER), strict=True)
            values[name] = [measure(row, score) for (row,), (score,) in pairs]
        return _attack_entry(values)

    def _reference_attack(self) -> Entry:
        reference, values = self.reference(), {}
        with eval_mode(reference):
            for name in ("forget", "holdout"):
                pairs = zip(
                    self.scores(name, ANSWER), self.scores(name, ANSWER, reference), strict=True
                )
                losses = [(one.loss, other.loss) for (one,), (other,) in pairs]
                values[name] = [None if a is None else reference_score(a, b) for a, b in losses]
        return _attack_entry(values)

    def _zlib(self, row: Any, score: AnswerScores) -> float | None:
        text = self.tokenizer.decode(row["input_ids"][row.answer_start :], skip_special_tokens=True)
        return None if score.loss is None else zlib_score(score.loss, text)


def check_retrained(retrained: Log | None, sets: Mapping[str, EvalSet]) -> None:
    """Raises LogError where the retrained model's log lacks what forget quality (forget records
    with perturbed answers) or privleak (a holdout set) compares with: before any work."""
    if retrained is None:
        return
    if {PARAPHRASED, PERTURBED} <= set(sets["forget"].rows):
        retrained.rows("forget_truth_ratio", needed_by="forget_quality").numbers("score")
    if "holdout" in sets:
        retrained.entry("mia_min_k", needed_by="privleak")
        aggregate(retrained, "mia_min_k")


def _min_k(row: Any, score: AnswerScores) -> float:
    return min_k_score(-score.without_end(score.nll))


def _min_k_plus_plus(row: Any, score: AnswerScores) -> float:
    return min_k_plus_plus_score(score.without_end(score.standardised))


def _scored(values: list[float | None]) -> dict[str, dict[str, float | None]]:
    return {str(number): {"score": value} for number, value in enumerate(values)}


def _attack_entry(values: Mapping[str, list[float | None]]) -> Entry:
    entry: Entry = {}
    for name, scores in values.items():
        known = [score for score in scores if score is not None]
        entry[name] = {
            "agg_value": float(np.mean(known)) if known else None,
            "value_by_index": _scored(scores),
        }
    entry["auc"] = aggregate(Log({"mia_": entry}, "this run"), "mia_")
    return entry

"""open-unlearning's stress tests: its own metrics of the forget set, before and after a change of
the model, and the ratios that it forms of them.

Dorna et al. 2025, OpenUnlearning (arXiv 2506.12618), section 4.2, whose scripts are not released
(github.com/locuslab/open-unlearning/issues/143 says how they were made from its trainer and model
files): relearning is a fine-tuning on the forget set, quantization is transformers' `load_in_4bit`.
The paper judges metrics by these ratios, over many models; here they are those of one model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import nn

from palu.evaluation.attacks.attack import Answered, Change, Report
from palu.evaluation.datasets import PARAPHRASED, PERTURBED, EvalSet
from palu.evaluation.eval_log import Log
from palu.evaluation.evaluator import Evaluator
from palu.evaluation.tofu import aggregate
from palu.models.wrappers import eval_mode

KNOWLEDGE = (
    "exact_memorization",
    "extraction_strength",
    "forget_Q_A_Prob",
    "forget_Q_A_PARA_Prob",
    "forget_Q_A_ROUGE",
    "truth_ratio",
    "mia_loss",
    "mia_zlib",
    "mia_min_k",
    "mia_min_k_plus_plus",
)
"""Metrics that grow with what a model knows of the forget set, by their names in open-unlearning's
logs; `truth_ratio` is its `prob_mean`, right / (right + wrong)."""

BEFORE, RELEARNING, QUANTIZATION, PROBING = "none", "relearning", "quantization", "probing"
RATE, BATCH, ACCUMULATE = 2e-5, 8, 4
"""Of relearning: the paper's rate, for one epoch; batches of configs/trainer/finetune.yaml."""
PROBE_RATE, PROBE_EPOCHS = 1e-3, 10
"""Of a probe's head. The epochs are those of finetune.yaml; its rate of 1e-5 hardly moves a head
alone."""


@dataclasses.dataclass(frozen=True)
class StressTest:
    """Measure the metrics of the forget set under a change of the model.

    Attributes:
        name, title, description, setting: what stands in the result.
        sets: `forget`, and `holdout` where there is one.
        batch_size, max_new_tokens: of the evaluation.
        change, change_size: as of `LeakAttack`.
    """

    name: str
    title: str
    description: str
    setting: dict[str, Any]
    sets: Mapping[str, EvalSet]
    batch_size: int
    max_new_tokens: int
    change: Change | None = None
    change_size: int = 0

    @property
    def size(self) -> int:
        """Return the work for progress: steps of the change, and examples."""
        return self.change_size + len(self.sets["forget"].examples)

    def run(
        self, model: nn.Module, tokenizer: Any, closing: set[int], report: Report
    ) -> tuple[dict[str, Any], list[Answered]]:
        """Return `{"metrics": {name: value}}`, and no answers."""
        del closing
        change = nullcontext(model)
        if self.change is not None:
            change = self.change(model, lambda done, total: report(done, self.size))
        with eval_mode(model), change as changed, eval_mode(changed):
            sizes = {"batch_size": self.batch_size, "max_new_tokens": self.max_new_tokens}
            evaluator = Evaluator(changed, tokenizer, self.sets, **sizes)
            return {"metrics": metrics(evaluator)}, []


def metrics(evaluator: Evaluator) -> dict[str, float]:
    """Return the metrics of `KNOWLEDGE` that the evaluator's sets allow."""
    entries: dict[str, Any] = {}
    for name in (*KNOWLEDGE, "forget_Q_A_PERT_Prob"):
        if name in evaluator.metrics:
            entries[name] = evaluator.metrics[name]()
    log = Log(entries, "stress test")
    found = {name: aggregate(log, name) for name in entries if name in KNOWLEDGE}
    if {"forget_Q_A_PARA_Prob", "forget_Q_A_PERT_Prob"} <= set(entries):
        found["truth_ratio"] = truth_ratio(
            *(entries[f"forget_Q_A_{kind}_Prob"]["value_by_index"] for kind in ("PARA", "PERT"))
        )
    return {name: found[name] for name in KNOWLEDGE if found.get(name) is not None}


def truth_ratio(right: Mapping[Any, Any], wrong: Mapping[Any, Any]) -> float:
    """Return open-unlearning's truth ratio with `prob_mean`: the mean of `p / (p + q)` with
    `p = exp(-loss of the right answer)` and `q = exp(-mean loss of the wrong ones)`."""
    ratios = []
    for row, entry in right.items():
        losses = wrong[row]["avg_loss"]
        p, q = math.exp(-_mean(entry["avg_loss"])), math.exp(-_mean(losses))
        ratios.append(p / (p + q + 1e-10))
    return _mean(ratios)


def _mean(values: Any) -> float:
    values = values if isinstance(values, Sequence) else [values]
    return math.fsum(values) / len(values)


def steps_of(rows: int) -> int:
    """Return the steps of an epoch, as transformers 4.45 counts them, which open-unlearning asks
    for: micro-batches that fill no step are left out, unless they are all."""
    return max(1, -(-rows // BATCH) // ACCUMULATE)


def sets_of(
    forget: Sequence[Any], holdout: Sequence[Any], tokenizer: Any, **how: Any
) -> dict[str, EvalSet]:
    """Return the sets to measure, tokenized; `how` are template and max_length."""
    optional = (PARAPHRASED, PERTURBED)
    sets = {"forget": EvalSet.tokenize("forget", forget, tokenizer, optional=optional, **how)}
    if holdout:
        sets["holdout"] = EvalSet.tokenize("holdout", holdout, tokenizer, **how)
    return sets


def stress_tests(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the tests and the ratios formed of them, as `attack.json` holds them; None where there
    are none.

    `ratios` has one entry for each test after which metrics are compared, with its `title` and, of
    each metric, before and after of the unlearned model (and the retrained one) and its ratio
    (`relearned_ratio`, `quantized_ratio`). `robustness` is, of each metric, the harmonic mean of
    the ratios of relearning at the paper's rate and of quantization.
    """
    entries = [entry for entry in entries if entry["results"]]
    if not entries:
        return None
    before = next((e["results"] for e in entries if e["setting"]["test"] == BEFORE), {})
    ratios, robust = [], {}
    for entry in entries:
        test = entry["setting"]["test"]
        if test not in (RELEARNING, QUANTIZATION) or "unlearned" not in before:
            continue
        found = dict(_ratios(test, before, entry["results"]))
        ratios.append({"test": test, "title": entry["title"], "metrics": found})
        if test == QUANTIZATION or entry["setting"]["learning_rate"] == RATE:
            robust[test] = found
    means = {}
    if len(robust) == 2:
        for name in KNOWLEDGE:
            both = [found.get(name, {}).get("ratio") for found in robust.values()]
            if None not in both:
                means[name] = 2 * both[0] * both[1] / sum(both) if sum(both) else 0.0
    return {"tests": list(entries), "ratios": ratios, "robustness": means}


def _ratios(
    test: str, before: Mapping[str, Any], after: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    models = [name for name in ("unlearned", "retrained") if name in before and name in after]
    for metric in KNOWLEDGE:
        values = {m: [r[m]["metrics"].get(metric) for r in (before, after)] for m in models}
        if any(None in pair for pair in values.values()) or "unlearned" not in values:
            continue
        ratio = None
        if test == QUANTIZATION:
            ratio = quantized_ratio(*values["unlearned"])
        elif "retrained" in values:
            ratio = relearned_ratio(*values["unlearned"], *values["retrained"])
        found = {m: {"before": pair[0], "after": pair[1]} for m, pair in values.items()}
        yield metric, {**found, "ratio": ratio}


def relearned_ratio(before: float, after: float, retrained: float, retrained_after: float) -> float:
    """Return R = min((r' - r) / (m' - m), 1): what a retrained model gains by relearning over what
    this one gains. 1: what was forgotten comes back no faster than it is learned. (A model that
    gains nothing has 1; a retrained one that gains nothing gives 0.)"""
    gain, usual = after - before, retrained_after - retrained
    if gain <= 0:
        return 1.0
    return min(max(usual, 0.0) / gain, 1.0)


def quantized_ratio(before: float, after: float) -> float:
    """Return Q = min(m / m', 1): 1 where rounding the weights brings nothing back."""
    return 1.0 if after <= before else before / after

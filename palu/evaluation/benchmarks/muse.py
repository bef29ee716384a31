"""MUSE (Shi et al. 2024, arXiv 2407.06460): do news or books that a model was trained on come out
again word by word, as knowledge, or by membership inference?

Names, percent and details are those of the authors' code (github.com/swj0419/muse_bench): ROUGE
without stemming, 128 new tokens of verbatim text and 32 of an answer, ten examples before a
question, min-40% of membership inference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from palu.evaluation.benchmarks.benchmark import Benchmark, Entry, by_index
from palu.evaluation.benchmarks.meter import Meter
from palu.evaluation.benchmarks.tables import read_table
from palu.evaluation.eval_log import Log, LogError
from palu.evaluation.metrics import min_k_score, privleak, rouge
from palu.evaluation.tofu import aggregate

VERBATIM_TOKENS, ANSWER_TOKENS = 128, 32
STOPS = ("\n\n", "\nQuestion", "Question:")
"""What ends an answer, one after the other."""

# `retain2` is the name in the benchmark's first repository.
_PLACES = {
    "verbmem_forget": [("verbmem", "forget")],
    "knowmem_forget": [("knowmem", "forget_qa")],
    "knowmem_forget_examples": [("knowmem", "forget_qa_icl")],
    "knowmem_retain": [("knowmem", "retain_qa"), ("knowmem", "retain2_qa")],
    "knowmem_retain_examples": [("knowmem", "retain_qa_icl"), ("knowmem", "retain2_qa_icl")],
    "privleak_forget": [("privleak", "forget")],
    "privleak_holdout": [("privleak", "holdout")],
}


class MUSE(Benchmark):
    """MUSE-News or MUSE-Books.

    Args:
        data: a folder with `verbmem`, `knowmem` and `privleak`, or the id of a data set on the hub
            (`muse-bench/MUSE-News`).
        split: None. The scalability and sustainability splits are what a model forgets; it is
            evaluated on the same tables.

    Raises:
        ValueError, TypeError: a table is not there, or a record lacks a field.
    """

    name, title = "muse", "MUSE"
    uses_retrained = True

    def __init__(self, data: str, split: str | None = None) -> None:
        if split is not None:
            raise ValueError(
                f"--split {split!r}: MUSE has one evaluation for every forget set; leave --split"
            )
        self.tables = {name: read_table(data, places) for name, places in _PLACES.items()}
        self.verbatim = self.tables["verbmem_forget"].texts("prompt", "gt")
        self.asked = {
            name: self.tables[f"knowmem_{name}"].texts("question", "answer")
            for name in ("forget", "retain")
        }
        self.before = {
            name: "".join(
                f"Question: {question}\nAnswer: {answer}\n\n"
                for question, answer in self.tables[f"knowmem_{name}_examples"].texts(
                    "question", "answer"
                )
            )
            for name in self.asked
        }
        self.documents = {
            name: [text for (text,) in self.tables[f"privleak_{name}"].texts("text")]
            for name in ("forget", "holdout")
        }

    def metrics(self, meter: Meter) -> dict[str, Callable[[], Entry]]:
        """Return VerbMem, KnowMem of both sets, and the attack that PrivLeak is made from."""
        return {
            "verbmem_f": partial(self._verbmem, meter),
            "knowmem_f": partial(self._knowmem, meter, "forget"),
            "knowmem_r": partial(self._knowmem, meter, "retain"),
            "mia_min_k": partial(self._attack, meter),
        }

    def derived(self, log: Log, retrained: Log | None) -> dict[str, Entry]:
        """Return PrivLeak: against the AUC of the retrained model, 0.5 where there is none."""
        if retrained is None and log.metrics.get("privleak", {}).get("agg_value") is not None:
            return {}
        auc = aggregate(log, "mia_min_k")
        reference = 0.5 if retrained is None else aggregate(retrained, "mia_min_k")
        return {"privleak": {"agg_value": privleak(auc, reference)}}

    def check_retrained(self, retrained: Log | None) -> None:
        """Raise LogError where the retrained model's log has no attack on the same texts."""
        if retrained is None:
            return
        for name, texts in self.documents.items():
            rows = retrained.rows("mia_min_k", name, needed_by="privleak").numbers("score")
            if len(rows) != len(texts):
                raise LogError(
                    f"{retrained.source}: metric 'mia_min_k' is of {len(rows)} texts of "
                    f"{name}, and --data has {len(texts)}: it is of another corpus"
                )

    def missing(self, log: Mapping[str, Entry], retrained: Log | None) -> list[str]:
        """Return that PrivLeak has no retrained model beside it, where that is so: one of an
        earlier run stays."""
        alone = privleak(aggregate(Log(log, "log"), "mia_min_k"))
        if retrained is not None or log["privleak"]["agg_value"] != alone:
            return []
        return [
            "PrivLeak against the retrained model (no --retain-log): it is against an AUC of 0.5"
        ]

    def _verbmem(self, meter: Meter) -> Entry:
        """Return ROUGE-L of the greedy continuation against the text's own: as many of its tokens
        as may be generated, a BOS that the tokenizer puts in front counted as one."""
        prompts = [prompt for prompt, _ in self.verbatim]
        found = meter.continue_texts("verbmem_f", prompts, VERBATIM_TOKENS)
        truths = [meter.decode(meter.encode(gt)[:VERBATIM_TOKENS]) for _, gt in self.verbatim]
        return _rouge_entry(truths, found)

    def _knowmem(self, meter: Meter, name: str) -> Entry:
        """Return ROUGE-L of the answer, up to what ends it, after examples of the same set."""
        prompts = [
            f"{self.before[name]}Question: {question}\nAnswer: " for question, _ in self.asked[name]
        ]
        found = meter.continue_texts(f"knowmem_{name[0]}", prompts, ANSWER_TOKENS)
        return _rouge_entry([answer for _, answer in self.asked[name]], [*map(_until, found)])

    def _attack(self, meter: Meter) -> Entry:
        """Return min-40% of every text, its first token left out, and their AUC: 1 where the forget
        set is known, which is 1 minus that of the authors' `forget_holdout`."""
        entry: Entry = {}
        for name, texts in self.documents.items():
            scores = [min_k_score(-one.nll) for one in meter.texts(f"privleak: {name}", texts)]
            mean = math.fsum(scores) / len(scores)
            entry[name] = by_index([{"score": score} for score in scores], mean)
        entry["auc"] = entry["agg_value"] = aggregate(Log({"mia_": entry}, "this run"), "mia_")
        return entry


def _until(text: str) -> str:
    for stop in STOPS:
        text = text.split(stop)[0]
    return text


def _rouge_entry(truths: list[str], found: list[str]) -> Entry:
    """Return an entry whose aggregate is the mean ROUGE-L F1 in percent."""
    rows: list[dict[str, Any]] = []
    for truth, text in zip(truths, found, strict=True):
        scores = rouge(truth, text, stem=False)
        rows.append({"score": 100 * scores["rougeL_f1"], **scores})
        rows[-1] |= {"ground_truth": truth, "generation": text}
    return by_index(rows, math.fsum(row["score"] for row in rows) / len(rows))

"""Four numbers that say how much of a set of answers a model still knows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from palu.data import Collator, Example, tokenize_examples
from palu.evaluation.generation import greedy_answers
from palu.labels import IGNORE, Template
from palu.modeling import end_tokens, kept_logits, prediction_rows
from palu_kernels import cross_entropy_loss

METRICS = ("answer_probability", "sensitive_probability", "rougeL_recall", "exact_memorization")


@torch.no_grad()
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

    Per example:
        answer_probability: `exp(-mean NLL)` over the answer's tokens, the closing end token
            included.
        sensitive_probability: the same over its sensitive tokens; None for an example without any.
        rougeL_recall: ROUGE-L recall (with stemming) of the greedy answer; None for a plain
            document (no question).
        exact_memorization: share of the answer's tokens, end token left out, that are the model's
            likeliest next token after the true ones before them; None when no token is left.

    Args:
        examples: see `palu.data.load_examples`; at least one.
        template: how questions are put; `Template()` when None.
        max_length: tokens; longer examples are cut, with a warning.
        batch_size: rows a forward pass.
        max_new_tokens: limit of a greedy answer; 0 leaves ROUGE-L out (None everywhere).
        progress: called with (examples done, of how many), forward passes and answers counted
            alike.

    Returns:
        `{"count", "mean": {metric: float | None}, "examples": [{"id", metric: ..., "generated"}]}`;
        means are plain means over the examples that have the number, None where none has.

    Raises:
        ValueError: no examples, or a size below its minimum.
    """
    if not examples:
        raise ValueError("examples must hold at least one example")
    if batch_size < 1 or max_new_tokens < 0:
        raise ValueError(
            f"batch_size must be at least 1 and max_new_tokens at least 0, "
            f"not {batch_size} and {max_new_tokens}"
        )
    template = Template() if template is None else template
    rows = tokenize_examples(examples, tokenizer, max_length=max_length, template=template)
    answered = (
        [i for i, e in enumerate(examples) if e.question is not None] if max_new_tokens else []
    )
    total = len(rows) + len(answered)

    def report(done: int) -> None:
        if progress is not None:
            progress(done, total)

    ends = end_tokens(model, tokenizer)
    was_training = model.training
    model.eval()
    try:
        results = _teacher_forced(model, tokenizer, rows, ends, batch_size, report)
        generated = greedy_answers(
            model,
            tokenizer,
            [_prompt(rows[i]) for i in answered],
            # A template may close an answer with a token that neither tokenizer nor model names as
            # its end.
            eos_token_ids=ends,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            on_batch=lambda done: report(len(rows) + done),
        )
    finally:
        model.train(was_training)
    for i, text in zip(answered, generated, strict=True):
        results[i]["generated"] = text
        results[i]["rougeL_recall"] = rouge_l_recall(examples[i].answer, text)
    for example, result in zip(examples, results, strict=True):
        result["id"] = example.id
    means = {}
    for name in METRICS:
        values = [r[name] for r in results if r[name] is not None]
        means[name] = math.fsum(values) / len(values) if values else None
    return {"count": len(results), "mean": means, "examples": results}


def rouge_l_recall(answer: str, generated: str) -> float:
    """ROUGE-L recall of `generated` against `answer`, words stemmed, as TOFU measures it."""
    return _scorer().score(answer, generated)["rougeL"].recall


_SCORER: list = []


def _scorer():
    if not _SCORER:
        from rouge_score.rouge_scorer import RougeScorer

        _SCORER.append(RougeScorer(["rougeL"], use_stemmer=True))
    return _SCORER[0]


def _prompt(row: dict) -> list[int]:
    """The very tokens that stand before the answer."""
    start = next(i for i, label in enumerate(row["labels"]) if label != IGNORE)
    return row["input_ids"][:start]


def _teacher_forced(
    model: nn.Module,
    tokenizer: Any,
    rows: list[dict],
    ends: list[int],
    batch_size: int,
    report: Callable[[int], None],
) -> list[dict[str, Any]]:
    """One result a row, in the order of `rows`; batches are made of rows of like length."""
    collate = Collator(tokenizer)
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    results: list[dict[str, Any]] = [{} for _ in rows]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = {k: v.to(device) for k, v in collate([rows[i] for i in chosen]).items()}
        answer = batch["labels"] != IGNORE
        logits = kept_logits(
            model, batch["input_ids"], batch["attention_mask"], prediction_rows(answer)
        )
        targets = batch["input_ids"][:, 1:][answer[:, 1:]]
        nll = cross_entropy_loss(logits, targets, reduction="none").double().cpu()
        hits = (logits.argmax(-1) == targets).cpu()
        sensitive = (batch["labels"][:, 1:][answer[:, 1:]] >= 0).cpu()
        sizes = answer[:, 1:].sum(1).tolist()
        parts = zip(nll.split(sizes), hits.split(sizes), sensitive.split(sizes), strict=True)
        for i, (row_nll, row_hits, row_sensitive) in zip(chosen, parts, strict=True):
            closed = rows[i]["input_ids"][-1] in ends
            known = row_hits[:-1] if closed else row_hits
            results[i] = {
                "answer_probability": _probability(row_nll),
                "sensitive_probability": _probability(row_nll[row_sensitive]),
                "rougeL_recall": None,
                "exact_memorization": known.float().mean().item() if len(known) else None,
                "generated": None,
            }
        report(min(start + batch_size, len(order)))
    return results


def _probability(nll: torch.Tensor) -> float | None:
    return math.exp(-nll.mean().item()) if len(nll) else None

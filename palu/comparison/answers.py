"""A few answers of a run: what is said, and how likely each token of the true answer is, before
and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from palu.data.labels import LabeledExample
from palu.data.records import Example
from palu.data.template import Template
from palu.evaluation.datasets import ANSWER, EvalSet
from palu.evaluation.evaluator import Evaluator
from palu.models.wrappers import eval_mode

Answer = dict[str, Any]


def token_answers(
    original: nn.Module | Sequence[Mapping[str, Any]],
    model: nn.Module,
    tokenizer: Any,
    examples: Mapping[str, Sequence[Example]],
    *,
    template: Template | None = None,
    max_length: int = 512,
    batch_size: int = 16,
    max_new_tokens: int = 200,
) -> list[Answer]:
    """Return the greedy answers of two models, and the probability of each token of the true answer
    under both, given the true tokens before it. Neither model is changed.

    Args:
        original: the model before; or its own answers to the same examples, which this function
            returned, so that it need not be loaded beside `model`. `model` itself for its own.
        examples: name of a set -> examples; a conversation becomes one for each of its answers.
        template, max_length, batch_size, max_new_tokens: as for `evaluate_examples`.

    Returns:
        one entry an answer: `{"set", "id", "question", "original", "answer", "tokens"}`. `original`
        and `answer` are the greedy answers, None for a plain document and where `max_new_tokens` is
        0. `tokens` are those of the true answer, its end token included: `{"text", "before",
        "after", "sensitive"}`, probabilities with six digits; a text is empty where a character
        takes several tokens and is complete only with a later one.

    Raises:
        ValueError: as `evaluate_examples`, or the answers given as `original` are of other
            examples, another tokenizer or another template.
        FloatingPointError: a loss that is not finite; names the example.
    """
    sets = {
        name: EvalSet.tokenize(
            name, some, tokenizer, template=template or Template(), max_length=max_length
        )
        for name, some in examples.items()
    }
    sizes = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    after = _answers(model, tokenizer, sets, sizes)
    if original is model:
        before = after
    elif isinstance(original, nn.Module):
        before = _answers(original, tokenizer, sets, sizes)
    else:
        before = list(original)
        _check_same(before, after)
    return [
        {
            **one,
            "original": known["answer"],
            "tokens": [
                {**token, "before": old["after"]}
                for token, old in zip(one["tokens"], known["tokens"], strict=True)
            ],
        }
        for one, known in zip(after, before, strict=True)
    ]


def _answers(
    model: nn.Module, tokenizer: Any, sets: Mapping[str, EvalSet], sizes: Mapping[str, int]
) -> list[Answer]:
    """Return the answers of one model, as its own original."""
    evaluator = Evaluator(model, tokenizer, sets, **sizes)
    found = []
    with eval_mode(model):
        for name, data in sets.items():
            said = evaluator.answers(name)
            scores = [score for (score,) in evaluator.scores(name, ANSWER)]
            rows = [row for (row,) in data.rows[ANSWER]]
            for number, (example, row, score) in enumerate(
                zip(data.examples, rows, scores, strict=True)
            ):
                texts = _texts(tokenizer, row, len(score.nll))
                probabilities = [float(f"{p:.6g}") for p in np.exp(-score.nll)]
                answer = said[number].text if number in said else None
                tokens = zip(texts, probabilities, score.sensitive.tolist(), strict=True)
                found.append(
                    {
                        "set": name,
                        "id": example.id,
                        "question": example.question,
                        "original": answer,
                        "answer": answer,
                        "tokens": [
                            {"text": text, "before": p, "after": p, "sensitive": marked}
                            for text, p, marked in tokens
                        ],
                    }
                )
    return found


def _texts(tokenizer: Any, row: LabeledExample, count: int) -> list[str]:
    """Return the text of each of a row's last `count` tokens: what the tokens up to it say more
    than those before it do."""
    ids = row["input_ids"]
    start = len(ids) - count
    # Behind a token of the prompt, a tokenizer that puts spaces before words writes the first one.
    lead = ids[max(start - 1, 0) : start]
    known = tokenizer.decode(lead, clean_up_tokenization_spaces=False)
    texts = []
    for end in range(start + 1, len(ids) + 1):
        said = tokenizer.decode([*lead, *ids[start:end]], clean_up_tokenization_spaces=False)
        # A part of a character is decoded as U+FFFD until the rest of it follows.
        whole = said.rstrip("\ufffd")
        texts.append(whole[len(known) :])
        known = max(known, whole, key=len)
    return texts


def _check_same(before: Sequence[Mapping[str, Any]], after: Sequence[Answer]) -> None:
    """Raise ValueError where answers are not of the same tokens of the same examples."""

    def of(answer: Mapping[str, Any]) -> Any:
        tokens = [(token["text"], token["sensitive"]) for token in answer["tokens"]]
        return answer["set"], answer["id"], answer["question"], tokens

    named = [[(one["set"], one["id"]) for one in side] for side in (before, after)]
    if named[0] != named[1]:
        raise ValueError(
            f"original: has answers to {len(before)} examples that are not the {len(after)} "
            "given here"
        )
    for one, other in zip(before, after, strict=True):
        if of(one) != of(other):
            raise ValueError(
                f"original: its answer {one['id']!r} of set {one['set']!r} has other tokens or "
                "spans; it was made with another tokenizer, template, max_length or data"
            )

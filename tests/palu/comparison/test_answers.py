"""Answers of a run: each token's text, mark and probability before and after."""

import copy
import math

import pytest
import torch

from palu.comparison.answers import token_answers
from palu.data.labels import label_example
from palu.data.records import Example
from palu.evaluation.evaluator import evaluate_examples
from tests.support import small


@pytest.fixture
def model(tok):
    return small.model(tok)


def always(tok, word, odds):
    """A model that gives a token `odds` times the probability of every other, whatever was said."""
    model = small.model(tok)
    with torch.no_grad():
        # Normalised hidden states of equal entries are 1 everywhere.
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[word] = math.log(odds) / model.config.hidden_size
    return model


def test_probabilities_by_hand(tok):
    """Of V tokens one is 9 times as likely as the others: 9 / (V + 8), the others 1 / (V + 8)."""
    likely, size = tok.eos_token_id, len(tok)
    example = small.examples()[0]  # Ada is in Paris now.
    uniform, ends = always(tok, likely, 1.0), always(tok, likely, 9.0)
    (answer,) = token_answers(uniform, ends, tok, {"forget": [example]}, max_new_tokens=4)
    assert (answer["set"], answer["id"]) == ("forget", "0")
    assert answer["question"] == "Where is Ada?" and answer["answer"] == ""
    *words, end = answer["tokens"]
    assert "".join(one["text"] for one in words).strip() == "Ada is in Paris now."
    assert end["text"] == tok.eos_token and not end["sensitive"]
    marked = "".join(one["text"] for one in words if one["sensitive"])
    assert marked.strip() == "Paris"
    assert {one["before"] for one in answer["tokens"]} == {float(f"{1 / size:.6g}")}
    assert end["after"] == pytest.approx(9 / (size + 8), rel=2e-6)
    for one in words:
        assert one["after"] == pytest.approx(1 / (size + 8), rel=2e-6)


def test_probabilities_are_those_of_the_metrics(tok, model):
    other, examples = small.model(tok, seed=1), small.examples()
    sets = {"forget": examples[:2], "general": examples[2:]}
    answers = token_answers(other, model, tok, sets, batch_size=2, max_new_tokens=6)
    assert [one["set"] for one in answers] == ["forget"] * 2 + ["general"] * 3
    for side, text, measured in (("before", "original", other), ("after", "answer", model)):
        wanted = evaluate_examples(measured, tok, examples, max_new_tokens=6)["examples"]
        for answer, want in zip(answers, wanted, strict=True):
            assert answer["id"] == want["id"] and answer[text] == want["generated"]
            logs = [math.log(one[side]) for one in answer["tokens"]]
            mean = math.exp(math.fsum(logs) / len(logs))
            assert mean == pytest.approx(want["answer_probability"], rel=1e-4)
            logs = [math.log(one[side]) for one in answer["tokens"] if one["sensitive"]]
            if logs:
                mean = math.exp(math.fsum(logs) / len(logs))
                assert mean == pytest.approx(want["sensitive_probability"], rel=1e-4)


def test_the_originals_answers_stand_for_the_original(tok, model):
    original, sets = small.model(tok, seed=1), {"forget": small.examples()}
    known = token_answers(original, original, tok, sets, max_new_tokens=6)
    assert all(one["original"] == one["answer"] for one in known)
    assert all(t["before"] == t["after"] for one in known for t in one["tokens"])
    both = token_answers(original, model, tok, sets, max_new_tokens=6)
    assert token_answers(known, model, tok, sets, max_new_tokens=6) == both != known


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda known: known.pop(), "4 examples that are not the 5"),
        (lambda known: known.reverse(), "not the 5"),
        (lambda known: known[1]["tokens"].pop(), "'1' of set 'forget' has other tokens"),
        (lambda known: known[2]["tokens"][0].update(sensitive=True), "'2' of set 'forget'"),
        (lambda known: known[0].update(question="Who?"), "'0' of set 'forget'"),
    ],
)
def test_answers_of_something_else_are_refused(tok, model, spoil, words):
    sets = {"forget": small.examples()}
    known = copy.deepcopy(token_answers(model, model, tok, sets, max_new_tokens=0))
    assert known[0]["answer"] is None
    spoil(known)
    with pytest.raises(ValueError, match=words):
        token_answers(known, model, tok, sets, max_new_tokens=0)


def test_the_texts_of_tokens_are_the_answer(any_tokenizer):
    """Characters of several tokens and spaces of each family's kind included."""
    tok = any_tokenizer
    said = "Who wrote it? Bj\u00f6rn \u4f60\u597d \U0001f642 did, in 1991.\n  It was he."
    example = Example("a", "Who wrote it?", said, ((14, 19),), {})
    model = small.model(tok)
    (answer,) = token_answers(model, model, tok, {"x": [example]}, max_new_tokens=0)
    row = label_example(tok, example.question, said, example.spans, max_length=512)
    assert len(answer["tokens"]) == len(row["input_ids"]) - row.answer_start
    text = "".join(one["text"] for one in answer["tokens"])
    ids = row["input_ids"]
    assert tok.decode(ids, clean_up_tokenization_spaces=False).endswith(text.strip())
    marked = "".join(one["text"] for one in answer["tokens"] if one["sensitive"])
    assert marked.strip() in ("Bj\u00f6rn", "bjorn", "Bj<unk>rn", "[UNK]")

"""`evaluate_examples` and greedy answers against plain loops; measuring changes nothing."""

import math
from dataclasses import fields, replace
from inspect import signature

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console

from palu.cli.attack import AttackOptions
from palu.cli.evaluate import EvaluateOptions
from palu.comparison.answers import token_answers
from palu.data.labels import label_example
from palu.data.records import Example
from palu.distributed import Processes
from palu.evaluation import METRICS, evaluate_examples, metrics_table
from palu.evaluation.attacks.settings import AttackSettings
from palu.evaluation.inference import continuations
from palu.evaluation.metrics import extraction_strength, rouge
from tests.support import planted, small
from tests.support.answers import greedy_answers
from tests.support.tofu_small import learn


@pytest.fixture
def model(tok):
    return small.model(tok)


def by_hand(model, tok, example):
    """Answer and sensitive probability and memorization of one example, unpadded."""
    row = label_example(tok, example.question, example.answer, example.spans, max_length=64)
    ids, labels = torch.tensor([row["input_ids"]]), row["labels"]
    logits = model(input_ids=ids).logits[0].double()
    logp = logits.log_softmax(-1)
    places = [t for t in range(1, len(labels)) if labels[t] != -100]
    nll = {t: -logp[t - 1, ids[0, t]].item() for t in places}
    sensitive = [nll[t] for t in places if labels[t] >= 0]
    words = [t for t in places if ids[0, t] != tok.eos_token_id]
    correct = [logits[t - 1].argmax().item() == ids[0, t].item() for t in words]
    assert len(places) == len(words) + 1  # the closing token counts for the probability alone
    return {
        "answer_probability": math.exp(-sum(nll.values()) / len(nll)),
        "sensitive_probability": math.exp(-sum(sensitive) / len(sensitive)) if sensitive else None,
        "exact_memorization": sum(correct) / len(correct),
        "extraction_strength": extraction_strength(correct),
    }


@pytest.mark.parametrize("batch_size", [2, 16])
def test_numbers_are_their_definitions(tok, model, batch_size):
    examples = small.examples()
    learn(model, tok, [(e.question, e.answer) for e in examples], 12)
    result = evaluate_examples(model, tok, examples, batch_size=batch_size, max_new_tokens=0)
    wanted = [by_hand(model, tok, example) for example in examples]
    for example, got, want in zip(examples, result["examples"], wanted, strict=True):
        assert got["id"] == example.id
        for name, value in want.items():
            assert got[name] == (None if value is None else pytest.approx(value, rel=1e-4))
    known = [w["exact_memorization"] for w in wanted]
    assert 0 < sum(known) < len(known)
    for name in wanted[0]:
        values = [w[name] for w in wanted if w[name] is not None]
        assert result["mean"][name] == pytest.approx(sum(values) / len(values), rel=1e-4)
    assert len([w for w in wanted if w["sensitive_probability"] is None]) == 1
    assert result["mean"]["rougeL_recall"] is None and result["count"] == len(examples)


def test_secrets_that_answers_say_are_counted():
    tok = planted.tokenizer()
    second = planted.FORGET[1]
    told = replace(second, spans=((0, 8), *second.spans))  # the name, which the question says
    examples = [planted.FORGET[0], told, planted.RETAIN[0]]
    for model, leaked in ((planted.knows_all(), [2, 2, 2]), (planted.never_saw(), [0, 0, 2])):
        rows = evaluate_examples(model, tok, examples)["examples"]
        assert [row["asked"] for row in rows] == [2, 2, 2]
        assert [row["leaked"] for row in rows] == leaked
    rows = evaluate_examples(model, tok, examples, max_new_tokens=0)["examples"]
    assert [row["leaked"] for row in rows] == [None] * 3


def test_answers_have_one_limit():
    limits = [signature(f).parameters["max_new_tokens"] for f in (evaluate_examples, token_answers)]
    for options in (EvaluateOptions, AttackOptions, AttackSettings):
        limits += [one for one in fields(options) if one.name == "max_new_tokens"]
    assert [limit.default for limit in limits] == [200] * 5  # open-unlearning's


def greedy_by_hand(model, tok, prompt, limit):
    ids = list(prompt)
    for _ in range(limit):
        token = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
        if token == tok.eos_token_id:
            break
        ids.append(token)
    return tok.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_answers_do_not_depend_on_padding(model, pad_is_eos):
    tok = small.tokenizer()
    prompts = [tok(text)["input_ids"] for text in ("Question: Who", "Ada", "Bob is in Lisbon. It")]
    assert len({len(p) for p in prompts}) == 3
    want = [greedy_by_hand(model, tok, p, 8) for p in prompts]
    if pad_is_eos:
        tok.pad_token = tok.eos_token
    options = {"eos_token_ids": [tok.eos_token_id], "max_new_tokens": 8, "batch_size": 3}
    got = greedy_answers(model, tok, prompts, **options)
    assert got == want and len(set(want)) > 1


@pytest.mark.parametrize("adapter", [False, True])
def test_stored_sampling_settings_have_no_effect(tok, model, adapter):
    prompt = [tok("Ada is")["input_ids"]]
    options = {"eos_token_ids": [tok.eos_token_id], "max_new_tokens": 6, "batch_size": 1}
    plain = greedy_answers(model, tok, prompt, **options)
    stored = model.generation_config
    stored.update(do_sample=True, temperature=5.0, repetition_penalty=9.0)
    called = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if adapter else model
    assert greedy_answers(called, tok, prompt, **options) == plain
    assert called.generation_config is model.generation_config is stored
    assert stored.temperature == 5.0


def test_nothing_is_changed_and_nothing_drops_out(tok):
    model = small.model(tok, attention_dropout=0.5)
    side, before = tok.padding_side, [p.clone() for p in model.parameters()]
    options = {"batch_size": 2, "max_new_tokens": 3}
    plain = evaluate_examples(model, tok, small.examples(), **options)
    model.train()
    model.lm_head.eval()  # a part with a mode of its own
    state = torch.random.get_rng_state()
    assert evaluate_examples(model, tok, small.examples(), **options) == plain
    assert model.training and not model.lm_head.training and tok.padding_side == side
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.random.get_rng_state())


def test_rouge_of_the_greedy_answer(tok, model):
    example = small.examples()[0]
    result = evaluate_examples(model, tok, [example], max_new_tokens=5)["examples"][0]
    row = label_example(tok, example.question, example.answer, (), max_length=64)
    want = greedy_by_hand(model, tok, row["input_ids"][: row.answer_start], 5)
    assert result["generated"] == want
    assert result["rougeL_recall"] == rouge(example.answer, want)["rougeL_recall"]


def test_a_document_has_no_answer_to_generate(tok, model):
    document = Example("d", None, "Ada is in Paris now.", ((10, 15),), {})
    result = evaluate_examples(model, tok, [document], max_new_tokens=4)
    assert result["mean"]["rougeL_recall"] is None
    assert 0 < result["mean"]["sensitive_probability"] < 1


def test_progress_reaches_its_total(tok, model):
    seen = []
    options = {"batch_size": 2, "max_new_tokens": 2, "progress": lambda *done: seen.append(done)}
    evaluate_examples(model, tok, small.examples(), **options)
    assert seen[-1] == (10, 10) and [d for d, _ in seen] == sorted(d for d, _ in seen)


def test_bad_arguments(tok, model):
    with pytest.raises(ValueError, match="at least one example"):
        evaluate_examples(model, tok, [])
    with pytest.raises(ValueError, match=r"batch_size must be at least 1 .* not 0 and 1"):
        evaluate_examples(model, tok, small.examples(), batch_size=0, max_new_tokens=1)


def test_table_fits_80_columns():
    result = {"count": 400, "mean": dict.fromkeys(METRICS, 0.12345)}
    result["mean"]["rougeL_recall"] = None
    console = Console(width=80)
    with console.capture() as said:
        console.print(metrics_table("t", [("unlearned", "forget", result)]))
    text = said.get()
    assert "…" not in text and "0.123" in text and " - " in text and "memorization" in text


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_samples_are_drawn_from_the_tempered_softmax(tok, model, temperature):
    prompt = tok("Ada is")["input_ids"]
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=1, top_p=0.1)
    options = {"eos_token_ids": [], "max_new_tokens": 1, "batch_size": 500}
    drawn = continuations(model, tok, [prompt] * 4000, temperature=temperature, **options)
    tokens = torch.tensor([one.tokens[0] for one in drawn])
    logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].detach()

    def mean(t):
        return ((logits / t).softmax(-1) * logits).sum().item()

    assert logits[tokens].mean().item() == pytest.approx(mean(temperature), abs=0.1)
    assert abs(mean(temperature) - mean(1.0)) > 0.3  # the temperature shows


def test_samples_depend_on_the_seed_alone(tok, model):
    prompts = [tok(text)["input_ids"] for text in ("Ada", "Ada", "Bob is in Lisbon. It", "Who")]
    options = {"eos_token_ids": [tok.eos_token_id], "max_new_tokens": 6, "batch_size": 2}
    state = torch.random.get_rng_state()
    first = continuations(model, tok, prompts, temperature=1.0, seed=3, **options)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(99)
    assert continuations(model, tok, prompts, temperature=1.0, seed=3, **options) == first
    assert continuations(model, tok, prompts, temperature=1.0, seed=4, **options) != first
    assert first[0] != first[1]  # the same prompt twice is two draws
    # The second of two processes does the second batch, and draws the same there.
    half = Half(1, 2)
    continuations(model, tok, prompts, temperature=1.0, seed=3, processes=half, **options)
    assert half.done and all(first[i] == one for i, one in half.done.items())


class Half(Processes):
    """One of several processes, whose own work is kept."""

    def gather(self, value):
        self.done = dict(value)
        return [dict.fromkeys(range(99)), value]


def test_a_continuation_says_whether_it_ended(tok):
    model = small.model(tok)
    learn(model, tok, [("Who came?", "Nobody came.")], 60)
    prompt = tok("Question: Who came?\nAnswer:")["input_ids"]
    options = {"eos_token_ids": [tok.eos_token_id], "batch_size": 1}
    whole, cut = (
        continuations(model, tok, [prompt], max_new_tokens=n, **options)[0] for n in (20, 2)
    )
    assert whole.ended and whole.text == "Nobody came." and tok.eos_token_id not in whole.tokens
    assert not cut.ended and cut.tokens == whole.tokens[:2]

"""open-unlearning's stress tests: its trainer, its quantization, its probe and the ratios that it
forms, against transformers' Trainer, bitsandbytes and sums by hand."""

from __future__ import annotations

import copy
import math
import random
from contextlib import nullcontext

import pytest
import torch
from rich.console import Console
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from palu.data.records import Example
from palu.data.template import Template
from palu.evaluation import evaluate_examples
from palu.evaluation.attacks import AttackSettings, run_attacks, weights
from palu.evaluation.attacks.open_unlearning import (
    metrics,
    quantized_ratio,
    relearned_ratio,
    sets_of,
    steps_of,
    stress_tests,
    truth_ratio,
)
from palu.evaluation.attacks.probes import label_all
from palu.evaluation.attacks.settings import check_names
from palu.evaluation.attacks.table import stress_table
from palu.evaluation.evaluator import Evaluator
from tests.support import planted, small
from tests.support.planted import FORGET, RETAIN

SETTINGS = AttackSettings(relearning_rates=(1e-3,), max_new_tokens=20)


def rows_of(tokenizer, examples):
    return label_all(examples, tokenizer, template=Template(), max_length=64)


def test_relearning_is_that_of_the_trainer(tmp_path):
    """Two steps of two micro-batches of two, the rate falling in a line; micro-batches weigh alike
    though their answers have other lengths, as in transformers 4.45."""
    tokenizer, model = planted.tokenizer(), planted.never_saw()
    rows = rows_of(tokenizer, [*FORGET, *RETAIN])[:8]
    assert len({len(row["input_ids"]) for row in rows}) > 1
    order = random.Random(5).sample(range(8), 8)
    collate = weights.Collator(tokenizer)

    def batch(some):
        made = collate(some)
        labels = made["input_ids"].masked_fill(made["labels"] == weights.IGNORE, -100)
        return {**{k: made[k] for k in ("input_ids", "attention_mask")}, "labels": labels}

    class Plain(Trainer):
        def _get_train_sampler(self, *args):
            return SequentialSampler(self.train_dataset)

    other = copy.deepcopy(model)
    trainer = Plain(
        model=other,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            learning_rate=1e-2,
            num_train_epochs=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            remove_unused_columns=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=[rows[i] for i in order],
        data_collator=batch,
    )
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    how = {"steps": 2, "learning_rate": 1e-2, "seed": 5, "batch": 2, "accumulate": 2}
    with weights.relearned(model, tokenizer, rows, decay=True, **how) as trained:
        for (name, one), two in zip(trained.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one.data, two.data, rtol=0, atol=2e-6, msg=name)
    with weights.relearned(model, tokenizer, rows, **how) as constant:
        pairs = zip(constant.parameters(), other.parameters(), strict=True)
        assert any((one - two).abs().max() > 1e-4 for one, two in pairs)


@pytest.mark.parametrize(("rows", "steps"), [(5, 1), (32, 1), (40, 1), (64, 2), (400, 12)])
def test_steps_of_an_epoch(rows, steps):
    assert steps_of(rows) == steps


def test_fp4_takes_the_nearest_of_eight_magnitudes():
    weight = torch.tensor([[0.3, -0.05, 1.2, 0.01, -0.5, 0.0, 0.7, -1.2, 0.24]])
    # Over 1.2: 0.25, -0.042, 1, 0.008, -0.417, 0, 0.583, -1, 0.2.
    wanted = [0.3, -0.00625, 1.2, 0.00625, -0.4, 0.0, 0.6, -1.2, 0.2]
    assert weights.fp4(weight)[0].tolist() == pytest.approx(wanted, abs=1e-7)


def test_fp4_is_that_of_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(48, 40, generator=torch.Generator().manual_seed(0)) * 0.02
    coded, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="fp4")
    wanted = bnb.dequantize_4bit(coded, state)
    torch.testing.assert_close(weights.fp4(weight), wanted, rtol=0, atol=1e-8)


def test_a_probe_ends_after_its_layers_and_trains_its_head_alone():
    tokenizer = planted.tokenizer()
    model = small.model(tokenizer, num_hidden_layers=3, tie_word_embeddings=True)
    before = copy.deepcopy(model.state_dict())
    ids = torch.tensor([tokenizer("Question: Where was Ada born?")["input_ids"]])
    how = {"learning_rate": 1e-2, "seed": 0, "batch": 2, "accumulate": 1, "decay": True}
    how["report"] = None
    with weights.probed(model, tokenizer, [], share=0.5, steps=0, **how) as probe:
        hidden = model.model(ids, output_hidden_states=True).hidden_states[2]
        wanted = model.lm_head(model.model.norm(hidden))
        torch.testing.assert_close(probe(ids).logits, wanted)
    rows = rows_of(tokenizer, RETAIN)
    with weights.probed(model, tokenizer, rows, share=1.0, steps=2, **how) as probe:
        changed = {
            name
            for name, parameter in probe.named_parameters()
            if not torch.equal(parameter, before[name])
        }
        assert changed == {"lm_head.weight"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_ratios_by_hand():
    assert relearned_ratio(0.2, 0.6, 0.1, 0.3) == pytest.approx(0.5)  # gains 0.4, usual 0.2
    assert relearned_ratio(0.2, 0.3, 0.1, 0.3) == 1.0  # slower than usual
    assert relearned_ratio(0.2, 0.2, 0.1, 0.3) == 1.0 and relearned_ratio(0.2, 0.3, 0.1, 0.0) == 0.0
    assert quantized_ratio(0.2, 0.5) == pytest.approx(0.4)
    assert quantized_ratio(0.2, 0.1) == 1.0 and quantized_ratio(0.0, 0.0) == 1.0
    right = {"0": {"avg_loss": 1.0}, "1": {"avg_loss": 0.5}}
    wrong = {"0": {"avg_loss": [1.0, 3.0]}, "1": {"avg_loss": [0.5, 0.5]}}
    p, q = math.exp(-1), math.exp(-2)
    assert truth_ratio(right, wrong) == pytest.approx((p / (p + q) + 0.5) / 2, abs=1e-9)


OF_OPEN_UNLEARNING = {
    "none": (0.001164842, 0.06458333, 0.4580979),
    "relearning": (0.002833463, 0.06458333, 0.5208607),
    "probing": (0.001349311, 0.06458333, 0.4700113),
}
"""Probability, extraction strength and truth ratio by open-unlearning's own code (commit d3d7cf9:
`FinetuneTrainer`, `ProbedLlamaForCausalLM`, `evals.metrics.memorization`; transformers 4.45.1) on
this model and these tokens, with our order of examples."""


def test_numbers_are_those_of_open_unlearnings_code():
    tokenizer = planted.tokenizer()
    model = small.model(tokenizer, num_hidden_layers=3)
    rows = rows_of(tokenizer, [*FORGET, *RETAIN])[:8]
    how = {"steps": 2, "learning_rate": 1e-2, "seed": 5, "batch": 2, "accumulate": 2}
    how |= {"decay": True, "report": None}
    changes = {
        "none": nullcontext(model),
        "relearning": weights.relearned(model, tokenizer, rows, **how),
        "probing": weights.probed(model, tokenizer, rows, share=0.5, **how),
    }
    shape = {"template": Template(), "max_length": 64}
    sets = sets_of(with_wrong_answers(FORGET), [], tokenizer, **shape)
    for name, wanted in OF_OPEN_UNLEARNING.items():
        with changes[name] as changed, torch.no_grad():
            sizes = {"batch_size": 16, "max_new_tokens": 0}
            found = metrics(Evaluator(changed.eval(), tokenizer, sets, **sizes))
        names = ("forget_Q_A_Prob", "extraction_strength", "truth_ratio")
        assert [found[n] for n in names] == pytest.approx(wanted, rel=2e-5), name


def entry(test, unlearned, retrained, **setting):
    results = {"unlearned": unlearned, "retrained": retrained}
    return {
        "title": test,
        "setting": {"test": test, **setting},
        "results": {m: {"metrics": {"forget_Q_A_Prob": v}} for m, v in results.items()},
    }


def test_robustness_is_the_harmonic_mean_at_the_papers_rate():
    entries = [
        entry("none", 0.2, 0.1),
        entry("relearning", 0.6, 0.3, learning_rate=2e-5),
        entry("relearning", 0.9, 0.9, learning_rate=1e-3),
        entry("quantization", 0.8, 0.1),
    ]
    found = stress_tests(entries)
    ratios = [one["metrics"]["forget_Q_A_Prob"]["ratio"] for one in found["ratios"]]
    assert ratios == pytest.approx([0.5, 1.0, 0.25])
    assert found["robustness"] == {"forget_Q_A_Prob": pytest.approx(2 * 0.125 / 0.75)}
    # Without a retrained model there is nothing to compare relearning with.
    for one in entries:
        del one["results"]["retrained"]
    found = stress_tests(entries)
    ratios = [one["metrics"]["forget_Q_A_Prob"]["ratio"] for one in found["ratios"]]
    assert ratios == [None, None, pytest.approx(0.25)] and found["robustness"] == {}
    assert stress_tests([]) is None


def with_wrong_answers(examples):
    return [
        Example(
            e.id,
            e.question,
            e.answer,
            e.spans,
            {"paraphrased_answer": e.answer, "perturbed_answer": [e.answer.replace("a", "o")]},
        )
        for e in examples
    ]


def test_the_tests_are_made_where_they_are_named(tmp_path):
    models = {"unlearned": planted.never_saw(), "original": planted.knows_all()}
    states = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
    forget, path = with_wrong_answers(FORGET), tmp_path / "attack.json"
    how = {"retain": RETAIN, "settings": SETTINGS, "attacks": ["open_unlearning"], "resume": path}
    content = run_attacks(models, planted.tokenizer(), forget, **how)
    assert content["attacks"] == [] and content["worst"] is None
    found = content["open_unlearning"]
    assert [test["setting"]["test"] for test in found["tests"]] == [
        *("none", "relearning", "relearning", "quantization", "probing", "probing")
    ]
    for name, model in models.items():
        assert all(torch.equal(v, states[name][k]) for k, v in model.state_dict().items())
        mean = evaluate_examples(model, planted.tokenizer(), forget, max_new_tokens=20)["mean"]
        metrics = found["tests"][0]["results"][name]["metrics"]
        assert metrics["forget_Q_A_Prob"] == pytest.approx(mean["answer_probability"])
        assert metrics["forget_Q_A_ROUGE"] == pytest.approx(mean["rougeL_recall"])
        assert metrics["extraction_strength"] == pytest.approx(mean["extraction_strength"])
        assert metrics["exact_memorization"] == pytest.approx(mean["exact_memorization"])
        assert metrics["truth_ratio"] > 0.5 if name == "original" else metrics["truth_ratio"] < 0.9
    console = Console(width=80, record=True)
    for name in models:
        console.print(stress_table(content, name))
    assert "…" not in console.export_text()
    # A second start has nothing to do.
    first = path.read_bytes()
    again = run_attacks(models, planted.tokenizer(), forget, **how)
    assert again["open_unlearning"] == found and path.read_bytes() == first


def test_they_are_not_among_all_attacks():
    assert "open_unlearning" not in check_names(None)
    assert check_names(["open_unlearning", "greedy"]) == ["greedy", "open_unlearning"]
    with pytest.raises(ValueError, match="open_unlearning"):
        check_names(["open-unlearning"])

"""PALUTrainer: the right loss, the right scale, the same batches after a resume, honest logs."""

import copy
import math

import pytest
import torch
from accelerate.utils import DistributedType
from torch.nn import functional

from palu.data.collator import Collator
from palu.data.roles import IGNORE, KEEP
from palu.loss import PALULoss
from palu.models import forward as modeling
from palu.training.batching import retain_rows
from tests.support import small
from tests.support.training import config, micro_batches, trainer, weights


def expected_terms(model, ref, tok, forget, retain, args):
    """The three terms from full logits, with PALULoss on [B, T, V] and PyTorch's cross-entropy."""
    batch = Collator(tok)(forget)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    loss_fn = PALULoss(**args.loss_options(), eos_token_id=tok.eos_token_id)
    with torch.no_grad():
        ref_logits = ref(**inputs).logits
    output = loss_fn(model(**inputs).logits, batch["labels"], ref_logits)
    kept = Collator(tok)(retain)
    logits = model(input_ids=kept["input_ids"], attention_mask=kept["attention_mask"]).logits
    answer = kept["labels"][:, 1:] != -100
    nll = functional.cross_entropy(logits[:, :-1][answer], kept["input_ids"][:, 1:][answer])
    return output, nll


def test_the_loss_and_its_gradient_are_the_formula(tok, tmp_path):
    args = config(tmp_path, forget_weight=0.7, preserve_weight=0.3, retain_weight=2.0)
    made = trainer(tok, args)
    with torch.no_grad():  # away from the reference, or the preserve term would be 0
        for p in made.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    rows = small.rows(tok)
    batch = dict(Collator(tok)(rows[:3]), palu_retain=Collator(tok)(rows[3:]))
    loss = made.compute_loss(made.model, batch)
    loss.backward()
    got = [p.grad.clone() for p in made.model.parameters()]
    made.model.zero_grad()
    ref = small.model(tok)
    output, nll = expected_terms(made.model, ref, tok, rows[:3], rows[3:], args)
    want = output.loss + 2.0 * nll
    want.backward()
    assert output.preserve > 0.01 and output.forget > 0.1
    torch.testing.assert_close(loss, want)
    for one, parameter in zip(got, made.model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad)


def test_only_rows_with_a_loss_go_through_the_head(tok, tmp_path):
    made = trainer(tok, config(tmp_path))
    rows = small.rows(tok)
    batch = dict(Collator(tok)(rows[:3]), palu_retain=Collator(tok)(rows[3:]))
    seen = []
    # a hook on the head also sees to it that its logits are taken
    made.model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape[0]))
    made.compute_loss(made.model, batch)  # the first call may be the probe
    seen.clear()
    made.compute_loss(made.model, batch)
    if not modeling._TAKES_MASK[type(made.model)]:
        pytest.skip("this transformers takes no boolean mask as logits_to_keep")
    roles = made.method.roles(batch["labels"])
    answers = (batch["palu_retain"]["labels"] != -100).sum()
    assert seen == [int((roles != 0).sum() + answers)]
    assert seen[0] < batch["labels"].numel()


@pytest.mark.parametrize("retain_loss", ["nll", "kl"])
def test_accumulation_is_the_same_objective(tok, tmp_path, retain_loss):
    """Two micro-batches with unequal row counts give the step of one batch: no per-batch means."""
    rows = small.rows(tok)
    results = []
    for size, steps in ((4, 1), (2, 2)):
        args = config(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            num_train_epochs=2,
            retain_loss=retain_loss,
            max_grad_norm=0.0,
            optim="sgd",
            learning_rate=0.05,
        )
        made = trainer(tok, args, forget=rows[:4], retain=rows[1:])
        made.train()
        logs = [entry for entry in made.state.log_history if "forget" in entry]
        results.append((weights(made.model), logs))
    assert (results[0][0] - weights(small.model(tok))).norm() > 0.01
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-6)
    for one, two in zip(results[0][1], results[1][1], strict=True):
        for name in ("loss", "forget", "preserve", "retain", "num_forget", "num_retain"):
            assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    "options", [{}, {"method": "npo", "retain_loss": "kl"}], ids=["palu", "npo"]
)
def test_backends_of_one_backward_get_both_together(tok, tmp_path, monkeypatch, options):
    """As DeepSpeed and FSDP do: the steps are those of a micro-batch after the other."""
    after = []
    for kinds in ((), (DistributedType.NO,)):
        monkeypatch.setattr("palu.training.trainer._ONE_BACKWARD", kinds)
        settings = {**options, "max_steps": 3, "optim": "sgd", "learning_rate": 0.1}
        if options:
            settings |= {"objective": "flatten", "top_k": 50}  # as PALUConfig has them
        made = trainer(tok, config(tmp_path, **settings))
        calls = []
        made.model.model.register_forward_pre_hook(lambda *_: calls.append(1))  # noqa: B023
        made.train()
        after.append((weights(made.model), len(calls)))
    (one, separate), (both, joined) = after
    assert joined < separate
    assert (one - weights(small.model(tok))).norm() > 1e-3
    torch.testing.assert_close(both, one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("hidden", [True, False], ids=["hidden", "logits"])
@pytest.mark.parametrize("method", ["palu", "npo"])
@pytest.mark.parametrize("retain_loss", ["nll", "kl"])
def test_the_original_is_asked_about_what_needs_it(tok, tmp_path, hidden, method, retain_loss):
    """Of both together, not about retained examples that are trained on their tokens."""
    options = {"objective": "flatten", "top_k": 50} if method != "palu" else {}
    made = trainer(tok, config(tmp_path, method=method, retain_loss=retain_loss, **options))
    if not hidden:
        made.model.lm_head.register_forward_hook(lambda *_: None)
    rows = small.rows(tok)
    batch = dict(Collator(tok)(rows[:3]), palu_retain=Collator(tok)(rows[3:]))
    whole = made._terms(made.model, batch)  # the first call tries heads out
    asked = []
    made.reference.model.model.register_forward_hook(
        lambda m, args, kwargs, out: asked.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    assert made._terms(made.model, batch).loss == whole.loss
    assert asked == [3 if retain_loss == "nll" else len(rows)]
    apart = [made._terms(made.model, part).loss for part in micro_batches(made, batch)]
    torch.testing.assert_close(sum(apart), whole.loss, rtol=1e-5, atol=0)


def test_logs_are_the_terms_and_counts(tok, tmp_path):
    rows = small.rows(tok)
    args = config(
        tmp_path, per_device_train_batch_size=3, max_steps=2, forget_weight=0.5, learning_rate=0.0
    )
    made = trainer(tok, args, forget=rows[:3], retain=rows[3:4])
    made.train()
    ref = small.model(tok)
    output, nll = expected_terms(ref, ref, tok, rows[:3], [rows[3]] * 3, args)
    logs = [entry for entry in made.state.log_history if "forget" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert entry["forget"] == pytest.approx(output.forget.item(), rel=1e-4)
        assert entry["preserve"] == pytest.approx(0.0, abs=1e-6)
        assert entry["retain"] == pytest.approx(nll.item(), rel=1e-4)
        assert entry["loss"] == pytest.approx(0.5 * entry["forget"] + entry["retain"], rel=1e-4)
        assert entry["num_forget"] == output.num_forget
        assert entry["num_preserve"] == output.num_preserve


def test_logs_average_over_their_window(tok, tmp_path):
    runs = []
    for every in (1, 3):
        made = trainer(tok, config(tmp_path, max_steps=3, logging_steps=every))
        made.train()
        runs.append([e for e in made.state.log_history if "forget" in e])
    single, window = runs
    assert len(single) == 3 and len(window) == 1
    for name in ("forget", "retain"):
        rows = sum(e[f"num_{name}"] for e in single)
        mean = sum(e[name] * e[f"num_{name}"] for e in single) / rows
        assert window[0][name] == pytest.approx(mean, rel=1e-5)
        assert window[0][f"num_{name}"] == pytest.approx(rows / 3)


def test_the_reference_stays_frozen_and_out_of_the_checkpoint(tok, tmp_path):
    # Dropout would show a reference in training mode: its logits would change from call to call.
    model = small.model(tok, attention_dropout=0.5)
    made = trainer(tok, config(tmp_path, num_train_epochs=2), model=model)
    before = weights(made.reference.model)
    made.train()
    assert torch.equal(weights(made.reference.model), before)
    assert not torch.equal(weights(made.model), before)
    assert not made.reference.model.training
    assert not any(p.requires_grad for p in made.reference.model.parameters())
    made.save_model(str(tmp_path / "saved"))
    from safetensors.torch import load_file

    names = set(load_file(tmp_path / "saved" / "model.safetensors"))
    assert names and all("reference" not in name for name in names)


def test_a_given_reference_is_used(tok, tmp_path):
    other = small.model(tok, seed=5)
    made = trainer(tok, config(tmp_path), ref_model=other)
    assert made.reference.model is other
    rows = small.rows(tok)
    terms = made._terms(made.model, Collator(tok)(rows[:3]))
    want, _ = expected_terms(made.model, other, tok, rows[:3], rows[3:], made.args)
    assert want.preserve > 0.1
    torch.testing.assert_close(terms.means[1], want.preserve)


def test_no_reference_is_kept_when_none_is_needed(tok, tmp_path):
    made = trainer(tok, config(tmp_path, select_from="current", preserve="none"))
    assert made.reference is None
    made.train()


@pytest.mark.parametrize("spans", ["none", "all"])
def test_batches_without_forget_or_preserve_rows(tok, tmp_path, spans):
    rows = copy.deepcopy(small.rows(tok)[:2])
    for row in rows[: 1 if spans == "none" else 2]:  # a set with nothing to forget is refused
        for i, label in enumerate(row["labels"]):
            if label != -100:
                row["labels"][i] = -200 if spans == "none" else row["input_ids"][i]
        if spans == "all":
            row["labels"][-1] = -100
    made = trainer(
        tok, config(tmp_path, prefix_length=0, per_device_train_batch_size=1), forget=rows
    )
    made.train()
    empty = "forget" if spans == "none" else "preserve"
    entry = next(e for e in made.state.log_history if e.get(f"num_{empty}") == 0)
    assert entry[empty] == 0
    assert math.isfinite(entry["loss"]) and torch.isfinite(weights(made.model)).all()


def test_evaluate_reports_the_terms_over_all_rows(tok, tmp_path):
    rows = small.rows(tok)
    args = config(tmp_path, per_device_eval_batch_size=2, retain_weight=0.5)
    made = trainer(tok, args, forget=rows[:3], retain=rows[3:4])
    metrics = made.evaluate()
    ref = small.model(tok)
    output, nll = expected_terms(ref, ref, tok, rows[:3], rows[3:4], args)
    assert metrics["eval_forget"] == pytest.approx(output.forget.item(), rel=1e-4)
    assert metrics["eval_retain"] == pytest.approx(nll.item(), rel=1e-4)
    assert metrics["eval_num_forget"] == output.num_forget
    assert metrics["eval_loss"] == pytest.approx(output.loss.item() + 0.5 * nll.item(), rel=1e-4)
    assert made.evaluate()["eval_loss"] == metrics["eval_loss"]


def test_evaluation_while_training_leaves_the_training_logs_alone(tok, tmp_path):
    runs = []
    for strategy in ("no", "steps"):
        args = config(tmp_path, max_steps=3, eval_strategy=strategy, eval_steps=1)
        made = trainer(tok, args, eval_dataset=small.rows(tok)[:2])
        made.train()
        runs.append([e for e in made.state.log_history if "forget" in e])
        evaluations = [e for e in made.state.log_history if "eval_loss" in e]
        assert len(evaluations) == (3 if strategy == "steps" else 0)
    names = ("loss", "forget", "preserve", "retain", "num_retain")
    assert [[e[n] for n in names] for e in runs[0]] == [[e[n] for n in names] for e in runs[1]]


def test_a_resumed_run_ends_where_the_whole_one_does(tok, tmp_path):
    rows = small.rows(tok)
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "num_train_epochs": 2,
        "lr_scheduler_type": "linear",
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1,
    }
    whole = trainer(tok, config(tmp_path, **options), forget=rows[:4], retain=rows[1:])
    whole.train()
    again = trainer(tok, config(tmp_path, **options), forget=rows[:4], retain=rows[1:])
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert again.state.global_step == whole.state.global_step == 4
    torch.testing.assert_close(weights(again.model), weights(whole.model), rtol=0, atol=0)
    keys = ("step", "forget", "preserve", "retain", "num_forget", "num_retain")
    logs = [
        [{k: e[k] for k in keys} for e in run.state.log_history if "forget" in e]
        for run in (whole, again)
    ]
    assert logs[0] == logs[1]


def test_a_loss_that_is_not_finite_names_step_and_term(tok, tmp_path):
    made = trainer(tok, config(tmp_path))
    original = made._terms

    def terms(*args):
        found = original(*args)
        if made.state.global_step == 1:
            found.means[2] = math.nan
            found.loss = found.loss * math.nan
        return found

    made._terms = terms
    with pytest.raises(FloatingPointError, match=r"not finite at step 2: retain = nan"):
        made.train()


def test_peft_trains_the_adapter_only(tok, tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(small.model(tok), settings)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    made = trainer(tok, config(tmp_path, num_train_epochs=2), model=model)
    made.train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("lora" in name for name in changed)


def test_gradient_checkpointing(tok, tmp_path):
    results = []
    for on in (False, True):
        made = trainer(tok, config(tmp_path, gradient_checkpointing=on))
        made.train()
        results.append(weights(made.model))
    torch.testing.assert_close(*results)


def test_every_micro_step_takes_its_own_retain_rows(tok, tmp_path):
    class Watched(list):
        taken: list[int]

        def __getitem__(self, i):
            self.taken.append(i)
            return super().__getitem__(i)

    retain = Watched(small.rows(tok))
    retain.taken = []
    options = {"retain_batch_size": 3, "per_device_train_batch_size": 1, "seed": 4}
    args = config(tmp_path, gradient_accumulation_steps=2, max_steps=3, **options)
    made = trainer(tok, args, forget=small.rows(tok)[:4], retain=retain)
    made.train()
    # three rows for each of the two micro-batches of a step, without a gap
    # the first one is looked at twice before: is it tokenised, and has it a token to keep
    assert retain.taken == [0, 0, *retain_rows(5, range(18), seed=4)]


def test_a_loss_asked_for_in_evaluation_is_not_logged(tok, tmp_path):
    made = trainer(tok, config(tmp_path))
    made.model.eval()
    made.compute_loss(made.model, Collator(tok)(small.rows(tok)))
    assert not made.step_log.terms.any()


def test_retain_rows_is_pure_and_fair():
    seen = [
        i for start in range(0, 60, 3) for i in retain_rows(10, range(start, start + 3), seed=1)
    ]
    assert seen == retain_rows(10, range(60), seed=1)
    assert [seen.count(i) for i in range(10)] == [6] * 10
    assert seen[:10] != seen[10:20]
    assert retain_rows(10, range(10), seed=2) != seen[:10]


def test_bad_arguments(tok, tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(TypeError, match="args must be a PALUConfig, not TrainingArguments"):
        trainer(tok, TrainingArguments(output_dir=str(tmp_path)))
    args = config(tmp_path)
    with pytest.raises(ValueError, match=r"train_dataset .* at least one row"):
        trainer(tok, args, forget=[])
    with pytest.raises(ValueError, match="retain_dataset must have at least one row"):
        trainer(tok, args, retain=[])
    rows = small.rows(tok)
    with pytest.raises(TypeError, match="train_dataset is a generator; it must have a length"):
        trainer(tok, args, forget=(row for row in rows))
    with pytest.raises(TypeError, match="retain_dataset is a set; it must have a length and rows"):
        trainer(tok, args, retain={1, 2})
    for data in ((row for row in rows), {"one": rows, "other": (row for row in rows)}):
        with pytest.raises(TypeError, match="eval_dataset is a generator; it must have a length"):
            trainer(tok, args, eval_dataset=data)
    with pytest.raises(TypeError, match="example 0 of the batch is a tuple; it must be a mapping"):
        Collator(0)([(1, 2)])
    with pytest.raises(ValueError, match="retain_batch_size is 2 and there is no retain set"):
        trainer(tok, config(tmp_path, retain_batch_size=2), retain=None)
    for name, value in (("retain_weight", 0.5), ("retain_loss", "kl")):
        with pytest.raises(ValueError, match=f"{name} is {value!r} and there is no retain set"):
            trainer(tok, config(tmp_path, **{name: value}), retain=None)
    with pytest.raises(TypeError, match="compute_loss_func is not supported"):
        trainer(tok, args, compute_loss_func=lambda *a: 0)
    model = small.model(tok)
    with pytest.raises(ValueError, match="ref_model must be another object"):
        trainer(tok, args, model=model, ref_model=model)
    with pytest.raises(ValueError, match="vocabulary of 330 entries, not 331"):
        trainer(tok, args, ref_model=small.model(tok, vocab_size=331))


def test_tokens_and_labels_that_are_none_are_named(tok, tmp_path):
    def refused(words, which, name, value):
        rows = small.rows(tok)
        rows[0] = {**rows[0], name: [*rows[0][name][:-1], value]}
        with pytest.raises(ValueError, match=words):
            trainer(tok, config(tmp_path), **{which: rows}).train()

    for which in ("forget", "retain"):
        refused("labels holds -300; a label must be -100", which, "labels", -300)
        refused(r"input_ids holds 330; a token id must be in 0\.\.329", which, "input_ids", 330)


def test_a_backend_that_cannot_serve_is_refused(tok, tmp_path, monkeypatch):
    for name in ("TRITON_INTERPRET", "PALU_TRITON_CPU"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="backend is 'triton', which cannot run on cpu"):
        trainer(tok, config(tmp_path, backend="triton"))


def test_training_with_nothing_to_forget_is_refused(tok, tmp_path):
    rows = small.rows(tok)
    for row in rows:  # the first place of a row is never predicted, EOS is never forgotten
        middle = [KEEP] * (len(row["labels"]) - 2)
        row["labels"] = [row["input_ids"][0], *middle, tok.eos_token_id]
    with pytest.raises(ValueError, match="train_dataset has no token to forget"):
        trainer(tok, config(tmp_path), forget=rows).train()
    whole = config(tmp_path, method="grad_ascent", max_steps=1)
    trainer(tok, whole, forget=rows, retain=None).train()
    none = config(tmp_path, method="ce_u", ignore_first=64)
    with pytest.raises(ValueError, match=r"no token to forget: method 'ce_u' \(ignore_first=64\)"):
        trainer(tok, none, forget=rows).train()


def test_a_retain_set_with_nothing_to_keep_is_refused(tok, tmp_path):
    rows = small.rows(tok)
    for row in rows:
        row["labels"] = [row["input_ids"][0], *[IGNORE] * (len(row["labels"]) - 1)]
    with pytest.raises(ValueError, match="retain_dataset has no token to keep"):
        trainer(tok, config(tmp_path), retain=rows).train()

"""One objective by two roads, hidden rows and logits, and three references: the same numbers."""

import gc
import logging
import warnings
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import LlamaForCausalLM

from palu.data.collator import Collator
from palu.methods.micro_batch import ROLES
from palu.methods.micro_batch import together as joined
from palu.models.forward import model_hidden_states
from palu.reference.cached import CachedReference
from palu.reference.model import AdapterOffReference, LiveReference
from palu.storage.fingerprint import example_ids
from palu.training.trainer_checks import refuse_cached
from tests.support import small
from tests.support.training import config, micro_batches, trainer, weights


def moved(model, seed=1, size=0.05):
    """Away from the reference, or its terms would be 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=generator))
    return model


def both_roads(tok, tmp_path, model=None, **options):
    """Loss, terms and gradients of one batch by hidden rows and by logits, in this order."""
    found = []
    rows = small.rows(tok)
    for hook in (False, True):
        own = small.model(tok) if model is None else model()
        made = trainer(tok, config(tmp_path, **options), model=own)
        moved(made.model)
        if hook:  # what cannot be seen through takes the road of logits
            made.model.get_output_embeddings().register_forward_hook(lambda *_: None)
        batch = dict(Collator(tok)(rows[:3]), palu_retain=Collator(tok)(rows[3:]))
        terms = made._terms(made.model, batch)
        terms.loss.backward()
        assert made.step_loss.without_logits != hook
        grads = [p.grad for p in made.model.parameters() if p.grad is not None]
        found.append((terms.loss.detach(), terms.means, torch.cat([g.flatten() for g in grads])))
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"objective": "flatten"},
        {"objective": "flatten", "center": "local_mean", "preserve": "forward_kl"},
        {"objective": "flatten", "center": "0.5", "preserve": "nll", "retain_loss": "kl"},
        {"select_from": "current", "preserve": "none"},
        {"select_from": "current", "preserve": "none", "retain_loss": "kl"},
        {"prefix_length": 0, "forget_weight": 0.3, "preserve_weight": 0.0, "retain_weight": 2.0},
    ],
    ids=str,
)
def test_hidden_rows_and_logits_give_the_same(tok, tmp_path, options):
    (loss, means, grad), (loss_b, means_b, grad_b) = both_roads(tok, tmp_path, **options)
    assert loss > 0
    torch.testing.assert_close(loss, loss_b, rtol=1e-5, atol=0)
    torch.testing.assert_close(means, means_b, rtol=1e-5, atol=1e-7)
    assert (grad - grad_b).norm() <= 1e-5 * grad_b.norm()


def test_no_logits_are_made_by_hidden_rows(tok, tmp_path):
    made = trainer(tok, config(tmp_path))
    rows = small.rows(tok)
    batch = dict(Collator(tok)(rows[:3]), palu_retain=Collator(tok)(rows[3:]))
    made._terms(made.model, batch)
    made.model.lm_head.register_forward_hook(
        lambda m, args, out: pytest.fail("logits") if out.numel() else None
    )
    made._terms(made.model, batch).loss.backward()


def test_the_road_of_logits_is_named_once(tok, tmp_path, caplog):
    model = small.model(tok)
    nn.utils.parametrizations.weight_norm(model.lm_head)
    made = trainer(tok, config(tmp_path, num_train_epochs=2), model=model)
    with caplog.at_level(logging.WARNING, "palu"):
        made.train()
    told = [r.message for r in caplog.records if "computed from logits" in r.message]
    assert len(told) == 1 and "parametrizations" in told[0]


def test_float64_has_its_digits(tok, tmp_path):
    def model():
        return small.model(tok).double()

    hidden, logits = both_roads(tok, tmp_path, model, retain_weight=0.7, forget_weight=0.1)
    assert hidden[0].dtype == torch.float64
    assert (hidden[0] / logits[0] - 1).abs() < 1e-13
    assert (hidden[2] - logits[2]).norm() < 1e-12 * logits[2].norm()


def run(tok, tmp_path, steps=20, model=None, **options):
    args = {
        "max_steps": steps,
        "optim": "sgd",
        "learning_rate": 0.05,
        "max_grad_norm": 0,
        "objective": "flatten",
        "top_k": 30,
        "forget_weight": 0.1,
        **options,
    }
    made = trainer(tok, config(tmp_path, **args), model=model)
    made.train()
    return made, [e["loss"] for e in made.state.log_history if "forget" in e]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("retain_loss", ["nll", "kl"])
def test_live_and_cached_runs_are_the_same(tok, tmp_path, tied, retain_loss):
    def model():
        return small.model(tok, tie_word_embeddings=tied).double()

    live, losses = run(tok, tmp_path, model=model(), retain_loss=retain_loss)
    cached, again = run(
        tok, tmp_path / "b", model=model(), retain_loss=retain_loss, reference="cached"
    )
    assert isinstance(live.reference, LiveReference)
    assert isinstance(cached.reference, CachedReference)
    assert len(losses) == 20 and abs(losses[0] - losses[-1]) > 1e-3
    assert again == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(weights(cached.model), weights(live.model), rtol=1e-6, atol=1e-8)
    assert (weights(live.model) - weights(model())).norm() > 1e-2


def test_no_second_model_exists_beside_a_cache(tok, tmp_path):
    def alive():
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some modules warn of being looked at
            kept = (torch.Tensor, nn.Parameter, LlamaForCausalLM)
            return {id(o): o for o in gc.get_objects() if type(o) in kept}

    before = alive()  # held, so that no id is given twice
    made, _ = run(tok, tmp_path, steps=2, reference="cached")
    new = [o for name, o in alive().items() if name not in before]
    models = [o for o in new if isinstance(o, nn.Module)]
    assert len(models) == 1 and models[0] is made.model
    shape = made.model.lm_head.weight.shape
    tables = [o for o in new if isinstance(o, torch.Tensor) and o.shape == shape and o.is_leaf]
    # embedding, head, their gradients, and the frozen copy of the head
    assert len({t.data_ptr() for t in tables}) <= 5


def test_a_resumed_run_takes_its_own_cache(tok, tmp_path):
    options = {"reference": "cached", "save_strategy": "steps", "save_steps": 3}
    whole, _ = run(tok, tmp_path, steps=6, **options)
    checkpoint = tmp_path / "out" / "checkpoint-3"
    assert (checkpoint / "palu_reference.json").is_file()
    # from the checkpoint's weights, which are not those of the cache
    args = {**options, "max_steps": 6, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0}
    args |= {"objective": "flatten", "top_k": 30, "forget_weight": 0.1}
    model = type(whole.model).from_pretrained(checkpoint)
    again = trainer(tok, config(tmp_path, **args), model=model)
    again.train(resume_from_checkpoint=str(checkpoint))
    torch.testing.assert_close(weights(again.model), weights(whole.model), rtol=0, atol=0)


def test_a_cache_of_another_model_is_refused(tok, tmp_path):
    run(tok, tmp_path, steps=1, reference="cached")
    with pytest.raises(ValueError, match="model"):
        run(tok, tmp_path, steps=1, reference="cached", model=moved(small.model(tok)))


def test_evaluation_with_a_cache(tok, tmp_path):
    live = trainer(tok, config(tmp_path)).evaluate()
    made = trainer(tok, config(tmp_path / "b"), reference="cached")
    found = made.evaluate()
    for name in ("eval_loss", "eval_forget", "eval_preserve", "eval_retain"):
        assert found[name] == pytest.approx(live[name], rel=1e-4, abs=1e-6)
    with pytest.raises(ValueError, match="not in the forget set"):
        made.evaluate(small.rows(tok)[3:])


def lora(tok, model=None, **settings):
    peft = pytest.importorskip("peft")
    settings = {
        "r": 2,
        "target_modules": ["q_proj", "v_proj"],
        "init_lora_weights": False,
    } | settings
    torch.manual_seed(0)
    return peft.get_peft_model(
        small.model(tok) if model is None else model,
        peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **settings),
    )


@pytest.mark.parametrize("hidden", [True, False])
def test_adapters_off_is_the_model_without_them(tok, tmp_path, hidden):
    found = []
    rows = small.rows(tok)
    for reference in ("live", "adapter_off"):
        other = small.model(tok) if reference == "live" else None
        made = trainer(tok, config(tmp_path), model=lora(tok), reference=reference, ref_model=other)
        if not hidden:
            made.model.get_output_embeddings().register_forward_hook(lambda *_: None)
        made.model.train()
        batch = dict(Collator(tok)(rows[:3]), palu_retain=Collator(tok)(rows[3:]))
        terms = made._terms(made.model, batch)
        terms.loss.backward()
        assert made.model.training and made.step_loss.without_logits == hidden
        grads = [p.grad.flatten() for p in made.model.parameters() if p.grad is not None]
        found.append((terms.means, torch.cat(grads)))
    assert isinstance(made.reference, AdapterOffReference)
    assert found[0][0][1] > 1e-3  # the adapter does something
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_an_adapter_can_be_cached(tok, tmp_path):
    options = {"learning_rate": 0.01, "steps": 5}
    _, losses = run(tok, tmp_path, model=lora(tok, init_lora_weights=True), **options)
    made, again = run(
        tok, tmp_path / "b", model=lora(tok, init_lora_weights=True), reference="cached", **options
    )
    assert made.reference.head is None  # the head does not train: the model's own serves
    assert again == pytest.approx(losses, rel=1e-4)


def test_references_that_cannot_be(tok, tmp_path):
    with pytest.raises(ValueError, match="adapter_off' needs a PEFT model"):
        trainer(tok, config(tmp_path), reference="adapter_off")
    with pytest.raises(ValueError, match="reference must be one of"):
        trainer(tok, config(tmp_path), reference="dead")
    with pytest.raises(ValueError, match="reference must be one of"):
        config(tmp_path, reference="dead")
    with pytest.raises(ValueError, match="ref_model is given and reference is 'cached'"):
        trainer(tok, config(tmp_path), reference="cached", ref_model=small.model(tok))
    model = lora(tok)
    model.get_input_embeddings().weight.requires_grad_()
    with pytest.raises(ValueError, match="belongs to no adapter"):
        trainer(tok, config(tmp_path), reference="adapter_off", model=model)


def test_a_cache_that_cannot_serve_is_not_built(tok, tmp_path, monkeypatch):
    made = trainer(tok, config(tmp_path), reference="cached")
    state = made.accelerator.state
    monkeypatch.setattr(state.dynamo_plugin, "backend", DynamoBackend.EAGER)
    with pytest.raises(ValueError, match=r"reference='cached' needs .* torch_compile is set"):
        made.train()
    assert not (tmp_path / "out" / "reference-cache").exists()
    plain = SimpleNamespace(backend=DynamoBackend.NO)
    state = SimpleNamespace(dynamo_plugin=plain, deepspeed_plugin=SimpleNamespace(zero_stage=3))
    with pytest.raises(ValueError, match="ZeRO 3"):
        refuse_cached(SimpleNamespace(state=state))
    state.deepspeed_plugin.zero_stage = 2
    refuse_cached(SimpleNamespace(state=state))


@pytest.mark.parametrize("reference", ["live", "adapter_off"])
def test_dropout_stays_on_in_the_model_and_off_in_the_reference(tok, tmp_path, reference):
    model = small.model(tok, attention_dropout=0.5).train()
    if reference == "adapter_off":
        model = lora(tok, model=model).train()
    made = trainer(tok, config(tmp_path), model=model, reference=reference)
    batch = Collator(tok)(small.rows(tok)[:3])
    made._terms(made.model, batch)
    inputs = batch["input_ids"], batch["attention_mask"]

    def of(model):
        return model_hidden_states(model, *inputs)

    rows = [made.reference.of(made.model, of) for _ in range(2)]
    assert torch.equal(*rows)
    hidden = [of(made.model) for _ in range(2)]
    assert made.model.training and not torch.equal(*hidden)


@pytest.mark.parametrize("options", [{}, {"retain_loss": "kl"}, {"reference": "cached"}], ids=str)
def test_turns_leave_the_gradient_of_both_together(tok, tmp_path, options):
    made = trainer(tok, config(tmp_path, **options))
    made.open_cache()
    moved(made.model)
    rows = small.rows(tok)
    batch = dict(Collator(tok)(rows[:3]), palu_retain=Collator(tok)(rows[3:]))
    parts = micro_batches(made, batch)
    both = joined(*parts)
    denominators = torch.tensor(made.method.counts(both[ROLES])).float()
    loss, means = made.step_loss(made.model, both, denominators)
    loss.backward()
    together = [p.grad.clone() for p in made.model.parameters()]
    made.model.zero_grad()
    parts = [made.step_loss(made.model, part, denominators) for part in parts]
    for part, _ in parts:
        part.backward()
    torch.testing.assert_close(sum(part for part, _ in parts), loss)
    torch.testing.assert_close(sum(found for _, found in parts), means)
    for one, both in zip(made.model.parameters(), together, strict=True):
        assert (one.grad - both).norm() <= 1e-5 * both.norm()


def test_a_cache_is_not_asked_about_examples_that_need_no_original(tok, tmp_path, monkeypatch):
    """Their ids are hashes of tokens, which would have to come from the device."""
    hashed = []
    made = trainer(tok, config(tmp_path, reference="cached"))
    made.open_cache()
    real = example_ids
    monkeypatch.setattr(
        "palu.methods.palu.example_ids", lambda b: hashed.append(len(b["labels"])) or real(b)
    )
    rows = small.rows(tok)
    batch = dict(Collator(tok)(rows[:3]), palu_retain=Collator(tok)(rows[3:]))
    for part in micro_batches(made, batch):
        made._terms(made.model, part)
    assert hashed == [3]


def test_a_training_step_takes_turns(tok, tmp_path):
    made = trainer(tok, config(tmp_path, max_steps=1))
    shapes = []
    made.model.model.register_forward_hook(
        lambda m, args, kwargs, out: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    made.train()
    rows = small.rows(tok)
    trained = [s for s in shapes if s[0] == 2][-2:]  # forget rows, then retain rows
    longest = max(len(row["input_ids"]) for row in rows)
    assert len(trained) == 2 and all(length <= longest for _, length in trained)


def test_length_grouping_reaches_the_retain_rows(tok, tmp_path):
    options = config(tmp_path)
    if not hasattr(options, "train_sampling_strategy"):
        pytest.skip("this transformers names the option otherwise")
    assert trainer(tok, options)._retain_lengths is None
    made = trainer(tok, config(tmp_path, train_sampling_strategy="group_by_length"))
    assert made._retain_lengths == [len(row["input_ids"]) for row in small.rows(tok)[3:]]
    made.train()

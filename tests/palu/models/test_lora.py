"""LoRA in training: the original without a second model, checkpointing, the plain head."""

import logging

import pytest
import torch
from transformers import TrainerCallback

from palu.models.forward import logits_at, model_hidden_states
from palu.models.lora import LoRASettings, refuse_prompt_learning
from tests.support import small, training
from tests.support.adapters import PROMPTS, adapted, inputs

peft = pytest.importorskip("peft")


def trainer(tok, tmp_path, model, **options):
    """One step over all rows, forget rows in one batch."""
    settings = {
        "per_device_train_batch_size": 3,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "reference": "adapter_off",
        "base_is_original": True,  # the adapters here do something from the start
        **options,
    }
    return training.trainer(tok, training.config(tmp_path, **settings), model=model)


class Gradients(TrainerCallback):
    """What every parameter that trains got in the last step; None where it got nothing."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {
            name: None if p.grad is None else p.grad.clone()
            for name, p in model.named_parameters()
            if p.requires_grad
        }


def step(tok, tmp_path, model, **options):
    """-> (the terms of a step, its gradients)."""
    made, watch = trainer(tok, tmp_path, model, **options), Gradients()
    made.add_callback(watch)
    made.train()
    names = ("loss", "forget", "preserve", "retain")
    entry = next(e for e in made.state.log_history if "forget" in e)
    return [entry[name] for name in names], watch.found


# ---- without a second model ----------------------------------------------------------------------


def test_with_the_adapter_off_it_is_the_base_model(tok, tmp_path):
    made = trainer(tok, tmp_path, adapted(tok))
    given = inputs(tok)
    keep = given["attention_mask"].bool()
    base = small.model(tok)(**given).logits[keep]
    off = made.reference.of(made.model, lambda m: logits_at(m, positions=keep, **given))
    assert torch.equal(off, base)
    assert (made.model(**given).logits[keep] - base).norm() > 0.1 * base.norm()
    # no copy of the model anywhere in the trainer
    assert not any(isinstance(x, torch.nn.Module) for x in vars(made.reference).values())


def test_every_reference_gives_the_same_step(tok, tmp_path):
    wanted = None
    for kind in ("live", "cached", "adapter_off"):
        found = step(tok, tmp_path / kind, adapted(tok, fresh=True), reference=kind)
        wanted = found if wanted is None else wanted
        assert found[0] == pytest.approx(wanted[0], rel=1e-5, abs=1e-6)
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-6)


def test_dropout_is_the_adapters_and_not_the_references(tok, tmp_path):
    settings = LoRASettings(rank=4, alpha=8, dropout=0.5, target="all-linear")
    made = trainer(tok, tmp_path, adapted(tok, settings=settings, attention_dropout=0.5))
    made.model.train()

    def hidden(model):
        return model_hidden_states(model, **inputs(tok))

    rows = [made.reference.of(made.model, hidden) for _ in range(2)]
    assert torch.equal(*rows)
    assert not torch.equal(*(made.model(**inputs(tok)).logits for _ in range(2)))
    off = trainer(tok, tmp_path, small.model(tok), reference="live").reference
    torch.testing.assert_close(rows[0], off.of(made.model, hidden))


@pytest.mark.parametrize("reentrant", [False, True, None])
@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_checkpointing_trains_every_adapter_parameter_alike(tok, tmp_path, reentrant, dropout):
    """Frozen embeddings in front of a re-entrant checkpoint would leave all of them untrained."""
    settings = LoRASettings(rank=4, alpha=8, dropout=dropout, target="all-linear")
    results, calls = [], []
    for on in (False, True):
        model = adapted(tok, settings=settings)
        first = model.get_base_model().model.layers[0].mlp
        first.register_forward_pre_hook(lambda *_: calls.append(on))  # noqa: B023
        options = {} if reentrant is None else {"use_reentrant": reentrant}
        names = {"gradient_checkpointing": on, "gradient_checkpointing_kwargs": options}
        results.append(step(tok, tmp_path, model, **names))
    plain, found = results
    assert calls.count(True) == calls.count(False) + 2  # once more for each backward
    assert len(found[1]) == 2 * 2 * 7 and all("lora_" in name for name in found[1])
    for name, grad in found[1].items():
        assert grad is not None and grad.norm() > 1e-6, name
        torch.testing.assert_close(grad, plain[1][name], rtol=1e-5, atol=1e-7)
    assert found[0] == pytest.approx(plain[0], rel=1e-6)


# ---- which layers, which road --------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_leaves_the_head_plain(tok, tmp_path, tied, caplog, monkeypatch):
    model = adapted(tok, tie_word_embeddings=tied)
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    made = trainer(tok, tmp_path, model)
    monkeypatch.delattr("palu.methods.step_loss.logits_at")  # nobody asks for logits
    with caplog.at_level(logging.WARNING, "palu.methods.step_loss"):
        made.train()
    assert made.step_loss.without_logits and "from logits" not in caplog.text
    (in_head,) = made.step_loss._in_head.values()
    assert in_head.head().weight is model.get_output_embeddings().weight
    assert not in_head.head().weight.requires_grad


def test_hidden_rows_and_logits_are_one_objective(tok, tmp_path):
    hidden = step(tok, tmp_path, adapted(tok))
    model = adapted(tok)
    model.get_output_embeddings().register_forward_hook(lambda *_: None)  # so it is not plain
    logits = step(tok, tmp_path, model)
    assert hidden[0] == pytest.approx(logits[0], rel=1e-4)
    torch.testing.assert_close(hidden[1], logits[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["adapter_off", "live"])
def test_an_adapter_on_the_head_takes_the_logits_and_says_so(tok, tmp_path, kind, caplog):
    settings = LoRASettings(rank=4, alpha=8, dropout=0.0, target=["q_proj", "lm_head"])
    made = trainer(tok, tmp_path, adapted(tok, settings=settings, fresh=True), reference=kind)
    with caplog.at_level(logging.WARNING, "palu.methods.step_loss"):
        made.train()
    assert not made.step_loss.without_logits
    assert "losses are computed from logits" in caplog.text and "lora" in caplog.text


def test_an_adapter_on_the_head_cannot_be_cached(tok, tmp_path):
    settings = LoRASettings(rank=4, alpha=8, dropout=0.0, target=["lm_head"])
    made = trainer(tok, tmp_path, adapted(tok, settings=settings), reference="cached")
    with pytest.raises(ValueError, match="cannot be cached, use reference='live'"):
        made.train()


# ---- adapters that cannot be used ----------------------------------------------------------------


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompt_learning_is_refused_with_a_reason(tok, tmp_path, kind):
    model = peft.get_peft_model(small.model(tok), PROMPTS[kind]())
    reason = "switching them off" if kind == "ADAPTION_PROMPT" else "virtual tokens"
    for reference in ("live", "adapter_off", "cached"):
        with pytest.raises(ValueError, match=f"^{kind} adapters cannot be used here: .*{reason}"):
            trainer(tok, tmp_path, model, reference=reference)
    with pytest.raises(ValueError, match=kind):
        refuse_prompt_learning(torch.nn.Sequential(model))  # in a wrapper


def test_other_adapters_and_plain_models_pass(tok):
    refuse_prompt_learning(small.model(tok))
    refuse_prompt_learning(adapted(tok))
    config = peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[]
    )
    refuse_prompt_learning(peft.get_peft_model(small.model(tok), config))

"""A mixture's router loss in the retain term: that of the model's own loss on the retain rows."""

import warnings

import pytest
import torch
import transformers

from palu.data.collator import Collator
from palu.methods.micro_batch import RETAIN
from palu.models.lora import LoRASettings, add_lora
from palu.models.router_loss import RouterLoss
from tests.support import small, training

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
}
MIXTURES = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 16},
    "Olmoe": {"num_experts": 4},
    "GptOss": {"num_local_experts": 4},
    "GraniteMoe": {"num_local_experts": 4, "logits_scaling": 2.0},
    "Jamba": {"num_experts": 4, "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2,
              "use_mamba_kernels": False, "attn_layer_offset": 1},
}  # fmt: skip


def mixture(tok, name="Mixtral", **settings):
    settings = {"vocab_size": len(tok), **SMALL, **MIXTURES[name], **settings}
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(**settings)
    return getattr(transformers, name + "ForCausalLM")(config)


def trainer(tok, tmp_path, model, *, hidden=True, **options):
    args = training.config(tmp_path, forget_weight=0.0, preserve_weight=0.0, **options)
    made = training.trainer(tok, args, model=model)
    if not hidden:
        made.step_loss._path_chosen = True  # as if the head were none of its own
    return made


def own_loss(model, rows):
    mask = rows["labels"] == -100
    labels = rows["input_ids"].masked_fill(mask, -100)
    given = {name: rows[name] for name in ("input_ids", "attention_mask")}
    return model(**given, labels=labels).loss


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("hidden", [True, False], ids=["hidden", "logits"])
@pytest.mark.parametrize("name", MIXTURES)
def test_it_is_the_models_own(tok, tmp_path, name, hidden):
    model = mixture(tok, name).eval()
    rows = small.rows(tok)
    made = trainer(tok, tmp_path, model, hidden=hidden)
    batch = {**Collator(tok)(rows[:2]), RETAIN: Collator(tok)(rows[2:])}
    try:
        own = own_loss(model, batch[RETAIN])
    except AttributeError:  # transformers 5.0 and 5.17, which record no router logits of it
        assert name == "GraniteMoe"
        with pytest.raises(ValueError, match="GraniteMoeForCausalLM gives no router loss"):
            made._terms(model, batch)
        return
    own.backward()
    wanted = gradients(model)
    # rows of both kinds in one call, and the retain rows in a call of their own
    for one in (batch, training.micro_batches(made, batch)[1]):
        terms = made._terms(model, one)
        terms.loss.backward()
        torch.testing.assert_close(terms.means[2], own.detach(), rtol=1e-5, atol=1e-6)
        found = gradients(model)
        for name_, grad in wanted.items():
            got = found.get(name_, torch.zeros_like(grad))
            torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-6)
    model.config.output_router_logits = False
    without = trainer(tok, tmp_path, model, hidden=hidden)
    assert own - without._terms(model, batch).means[2] > 0.3


@pytest.mark.parametrize("method", ["grad_diff", "pdu"])
def test_methods_have_it_too(tok, tmp_path, method):
    model = mixture(tok).eval()
    rows = small.rows(tok)
    options = {"num_train_epochs": 9} if method == "pdu" else {}
    made = training.trainer(tok, training.config(tmp_path, method=method, **options), model=model)
    batch = {**Collator(tok)(rows[:2]), RETAIN: Collator(tok)(rows[2:])}
    found = made._terms(model, batch).means[2]
    torch.testing.assert_close(found, own_loss(model, batch[RETAIN]).detach())


def test_micro_batches_count_by_their_rows_and_the_log_shows_it(tok, tmp_path, monkeypatch):
    settings = {"max_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": 1}
    made = trainer(tok, tmp_path, mixture(tok), gradient_accumulation_steps=2, **settings)
    seen = []
    of = RouterLoss.of
    with monkeypatch.context() as patch:
        patch.setattr(RouterLoss, "of", lambda *given: seen.append(of(*given)) or seen[-1])
        made.train()
    (entry,) = training.logged(made)
    assert len(seen) == 2
    losses = torch.stack(seen).detach()
    assert entry["router_loss"] == pytest.approx(losses.mean().item() / 0.5)
    plain = mixture(tok, output_router_logits=False)
    without = trainer(tok, tmp_path, plain, gradient_accumulation_steps=2, **settings)
    without.train()
    extra = entry["retain"] - training.logged(without)[0]["retain"]
    assert losses.min().item() - 1e-5 <= extra <= losses.max().item() + 1e-5
    assert "router_loss" not in training.logged(without)[0]


def test_what_has_no_place_for_it_says_so(tok, tmp_path, caplog):
    args = training.config(tmp_path, retain_loss="kl")
    training.trainer(tok, args, model=mixture(tok))
    assert "router loss (router_aux_loss_coef) is not part of the loss" in caplog.text
    assert "retain_loss is 'kl'" in caplog.text
    training.trainer(tok, training.config(tmp_path), model=mixture(tok), retain=None)
    assert "there is no retain term" in caplog.text
    caplog.clear()
    training.trainer(tok, training.config(tmp_path), model=mixture(tok))
    assert "router" not in caplog.text


def test_rmu_needs_no_mixture_among_its_layers(tok, tmp_path):
    args = training.config(tmp_path, method="rmu", layer_id=0, max_steps=1)
    made = training.trainer(tok, args, model=mixture(tok, "Jamba"))  # whose second layer is one
    made.train()
    assert training.logged(made)[0]["forget"] > 0


def test_a_model_that_does_not_give_it_is_refused(tok, tmp_path):
    model = small.model(tok)
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="LlamaForCausalLM gives no router loss"):
        training.trainer(tok, training.config(tmp_path), model=model).train()


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe", "GptOss", "Jamba"])
def test_it_is_said_which_experts_get_no_adapter(tok, name):
    """PEFT adapts fused experts of some models, and of others it says nothing."""
    pytest.importorskip("peft")
    model = mixture(tok, name)
    fused = [n for n, p in model.named_parameters() if p.dim() == 3 and "experts." in n]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapted = add_lora(model, LoRASettings(2, 4, 0.0, "all-linear"), seed=0)
    told = [str(one.message) for one in said if "--lora-target" in str(one.message)]
    trains = [n for n, p in adapted.named_parameters() if p.requires_grad and "experts" in n]
    assert fused and bool(trains) != bool(told)
    assert (
        not told or f"{len(fused)} weights of experts get no adapter, such as {fused[0]}" in told[0]
    )

"""Which models are taken: causal ones, and with `adapter_off` those that are the original when
their adapter is off; and that a model which does not move has a preserve term of 0."""

import json

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from typer.testing import CliRunner

from palu.cli.app import app
from palu.errors import UserError
from palu.models.checks import check_adapter_off, check_causal, first_texts
from tests.support import small, training

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def texts(tok):
    return first_texts(small.rows(tok))


# ---- adapter off ---------------------------------------------------------------------------------


def lora(tok, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    return peft.get_peft_model(small.model(tok).to(dtype), peft.LoraConfig(**settings))


def kind(tok, name, **settings):
    settings = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    return peft.get_peft_model(small.model(tok), getattr(peft, name)(**settings))


def move(model, part, size=0.3):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.normal_(0, size)
    return model


def two(tok, fresh):
    """Adapter `first`, and the fresh `second`; which of them is trained depends."""
    model = lora(tok)
    if not fresh:
        move(model, "lora_B")
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    return model


FRESH = {
    "LoRA": lora,
    "LoRA with dropout": lambda tok: lora(tok, lora_dropout=0.5).train(),
    "gaussian": lambda tok: lora(tok, init_lora_weights="gaussian"),
    "orthogonal B=0": lambda tok: lora(tok, use_rslora=True),
    "DoRA": lambda tok: lora(tok, use_dora=True),
    "DoRA in bfloat16": lambda tok: lora(tok, torch.bfloat16, use_dora=True),
    "modules to save": lambda tok: lora(tok, modules_to_save=["lm_head"]),
    "trainable tokens": lambda tok: lora(
        tok, target_modules=["q_proj"], trainable_token_indices=[5, 6, 7]
    ),
    "two adapters": lambda tok: two(tok, fresh=True),
    "IA3": lambda tok: kind(tok, "IA3Config", feedforward_modules=[]),
    "OFT": lambda tok: kind(tok, "OFTConfig", oft_block_size=4),
    "LoHa": lambda tok: kind(tok, "LoHaConfig"),
    "AdaLoRA": lambda tok: kind(tok, "AdaLoraConfig", total_step=10),
}

OTHERS = {
    "pissa": lambda tok: lora(tok, init_lora_weights="pissa"),
    "pissa in bfloat16": lambda tok: lora(tok, torch.bfloat16, init_lora_weights="pissa"),
    "pissa_niter_4": lambda tok: lora(tok, init_lora_weights="pissa_niter_4"),
    "olora": lambda tok: lora(tok, init_lora_weights="olora"),
    "random": lambda tok: lora(tok, init_lora_weights=False),
    "trained": lambda tok: move(lora(tok), "lora_B"),
    "trained a little": lambda tok: move(lora(tok), "lora_B", 1e-3),
    "trained DoRA": lambda tok: move(lora(tok, use_dora=True), "lora_magnitude"),
    "a saved module that was trained": lambda tok: move(
        lora(tok, modules_to_save=["lm_head"]), "modules_to_save"
    ),
    "one of two trained": lambda tok: two(tok, fresh=False),
}


@pytest.mark.parametrize("name", FRESH)
def test_a_fresh_adapter_is_taken(tok, tmp_path, name):
    model = FRESH[name](tok)
    # PEFT would turn it on when it puts the adapters back.
    next(p for n, p in model.named_parameters() if p.requires_grad).requires_grad_(False)
    modes, trains = (
        [x.training for x in model.modules()],
        [p.requires_grad for p in model.parameters()],
    )
    made = training.trainer(tok, training.config(tmp_path), model=model, reference="adapter_off")
    made.check_model()
    assert modes == [x.training for x in model.modules()]
    assert trains == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("name", OTHERS)
def test_an_adapter_that_changes_the_model_already_is_refused(tok, texts, name):
    with pytest.raises(ValueError, match=r"reference='live' or 'cached'.*base_is_original=True"):
        check_adapter_off(OTHERS[name](tok), texts)


def test_before_training_and_evaluation_unless_the_user_means_the_base(tok, tmp_path):
    def make(**options):
        args = training.config(tmp_path, reference="adapter_off", max_steps=1, **options)
        return training.trainer(tok, args, model=move(lora(tok), "lora_B"))

    for begin in (make().train, make().evaluate):
        with pytest.raises(ValueError, match="the adapter changes the logits already"):
            begin()
    made = make(base_is_original=True)
    made.train()
    assert training.logged(made)[0]["preserve"] > 0.01


def test_a_run_that_goes_on_is_not_asked_again(tok, tmp_path):
    settings = {"reference": "adapter_off", "max_steps": 2, "save_steps": 1}
    training.trainer(tok, training.config(tmp_path, **settings), model=lora(tok)).train()
    settings["max_steps"] = 3
    again = training.trainer(tok, training.config(tmp_path, **settings), model=lora(tok))
    again.check_model(resumed=True)
    move(again.model, "lora_B")
    again.check_model()  # once


def test_a_merged_adapter_is_refused(tok, tmp_path):
    model = lora(tok)
    model.merge_adapter()
    with pytest.raises(ValueError, match="an adapter is merged into the weights"):
        training.trainer(tok, training.config(tmp_path), model=model, reference="adapter_off")


# ---- causal --------------------------------------------------------------------------------------

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
HEAD = {"head_dim": 8}
CAUSAL = {
    "Bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "Mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "RecurrentGemma": {**SMALL, "num_hidden_layers": 3, "attention_window_size": 8},
    "Mistral": {**SMALL, "sliding_window": 4},
    "Mixtral": {**SMALL, "num_local_experts": 4},
    "Qwen3Moe": {**SMALL, **EXPERTS, **HEAD},
    "Llama4": {**SMALL, **HEAD, "attention_chunk_size": 4, "intermediate_size_mlp": 32},
}


def made_of(tok, name, settings, dtype=torch.float32):
    model = getattr(transformers, name + "ForCausalLM")
    config = getattr(transformers, name + ("TextConfig" if name == "Llama4" else "Config"))
    torch.manual_seed(0)
    return model(config(vocab_size=len(tok), pad_token_id=0, **settings)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models_are_taken(tok, texts, name, dtype):
    model = made_of(tok, name, CAUSAL[name], dtype)
    check_causal(model, texts)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_that_see_later_tokens_are_refused(tok, texts, dtype):
    for name in ("Bert", "Roberta", "XLNet"):
        if name == "XLNet":
            config = transformers.XLNetConfig(
                vocab_size=len(tok), d_model=16, n_layer=2, n_head=2, d_inner=16
            )
            model = transformers.XLNetLMHeadModel(config).to(dtype)
        else:
            model = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.for_model(name.lower(), vocab_size=len(tok), **SMALL)
            ).to(dtype)
        with pytest.raises(ValueError, match="must be a causal language model; the logits of"):
            check_causal(model, texts)


@pytest.mark.parametrize("kind", ["AutoModel", "AutoModelForSequenceClassification"])
def test_models_without_logits_of_tokens_are_refused(tok, texts, kind):
    model = getattr(transformers, kind).from_config(small.model(tok).config)
    with pytest.raises(ValueError, match=r"AutoModelForCausalLM.* gives no logits"):
        check_causal(model, texts)


def test_a_trainer_refuses_what_is_not_causal(tok, tmp_path):
    bert = transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=len(tok), **SMALL))
    made = training.trainer(tok, training.config(tmp_path), model=bert)
    for begin in (made.train, made.evaluate):
        with pytest.raises(ValueError, match="must be a causal language model"):
            begin()
    small_t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**small_t5))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        training.trainer(tok, training.config(tmp_path), model=t5)


def test_a_trainer_refuses_parts_of_a_model(tok, tmp_path):
    """Ranks of a tensor parallel head must have the same rows, and get rows of their own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = small.model(tok)
        plan = {"lm_head": ColwiseParallel(use_local_output=False)}
        parallelize_module(model, init_device_mesh("cpu", (1,)), plan)
        with pytest.raises(ValueError, match=r"parameter lm_head\.weight of model is a DTensor"):
            training.trainer(tok, training.config(tmp_path), model=model)
    finally:
        dist.destroy_process_group()


def test_the_commands_refuse_it_in_one_line(tok, tmp_path):
    model = tmp_path / "m"
    bert = transformers.BertConfig(vocab_size=len(tok), **SMALL)
    transformers.BertLMHeadModel(bert).save_pretrained(model)
    tok.save_pretrained(model)
    row = {"question": "Where is Ada?", "answer": "Ada is in Paris.", "spans": [[10, 15]]}
    (tmp_path / "f.jsonl").write_text(json.dumps(row) + "\n")
    given = ["--model", str(model), "--forget", str(tmp_path / "f.jsonl")]
    out = ["--output", str(tmp_path / "o")]
    for command in (
        ["evaluate", *given],
        ["cache", "build", *given, *out],
        ["unlearn", *given, *out],
    ):
        error = CliRunner().invoke(app, command).exception
        assert isinstance(error, UserError), error
        assert str(error).startswith("the model must be a causal language model"), error
    assert not (tmp_path / "o").exists()


def test_a_few_wrong_places_are_no_proof(tok, texts, monkeypatch):
    """A mixture may send a token elsewhere after a rounding."""
    for leaks, refused in (([1, 0, 0], False), ([0, 0, 0], False), ([1, 1, 0], True)):
        changes = [(0.5, 0.5 * leak, 1e-3) for leak in leaks]
        monkeypatch.setattr("palu.models.checks._changes", lambda *_: changes)  # noqa: B023
        if refused:
            with pytest.raises(ValueError, match="causal"):
                check_causal(small.model(tok), texts[:1])
        else:
            check_causal(small.model(tok), texts[:1])


# ---- a model that does not move ------------------------------------------------------------------


# A cache is the one that is computed elsewhere than the step.
GRID = [("cached", kind) for kind in ("float32", "bf16", "launcher", "bfloat16 weights")]
GRID += [
    pytest.param(reference, kind, marks=pytest.mark.slow)
    for reference in ("live", "adapter_off")
    for _, kind in GRID
]


@pytest.mark.parametrize(("reference", "precision"), GRID)
def test_without_learning_preserve_is_zero(tok, tmp_path, monkeypatch, reference, precision):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    if precision == "launcher":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    model = lora(tok, torch.bfloat16 if precision == "bfloat16 weights" else torch.float32)
    settings = {"learning_rate": 0.0, "max_steps": 1, "retain_loss": "kl"}
    if precision == "bf16":
        settings["bf16"] = True
    args = training.config(tmp_path, reference=reference, **settings)
    made = training.trainer(tok, args, model=model)
    made.train()
    AcceleratorState._reset_state(reset_partial_state=True)
    for entry in training.logged(made):
        # Roundings: a cache is made of batches of its own, and threads share out products anew.
        zero = 1e-6 if precision == "float32" else 1e-4
        assert abs(entry["preserve"]) <= zero and abs(entry["retain"]) <= zero

"""RMU: against its formula, written out in float64 from the activations of plain transformers; what
trains; the same steps however they are split, resumed or shared out."""

import json
import math
from functools import partial

import pytest
import torch

from palu import PALUTrainer
from palu.data.collator import Collator
from palu.methods import RMU
from palu.models.layers import decoder_layers, layer_output
from palu.training.callbacks import StopAtForgetProb
from tests.palu.methods.test_methods import (
    RUN,
    half_learned,
    moved,
    same_when_split,
    unmarked,  # noqa: F401
)
from tests.support import families, small
from tests.support.training import config, micro_batches, trainer, weights

OPTIONS = {"method": "rmu", "layer_id": 1, "steering_coeff": 6.5}


def deep(tok, layers=4):
    return small.model(tok, num_hidden_layers=layers, initializer_range=0.1).double()


def made_by(tok, tmp_path, *, model=None, retain=True, **options):
    args = config(tmp_path, **{**OPTIONS, **options})
    made = trainer(tok, args, model=deep(tok) if model is None else model, retain=retain)
    moved(made.model)
    return made


def batch_of(tok, retain=True):
    collator = Collator(tok)
    rows = small.rows(tok)
    return dict(collator(rows[:3]), palu_retain=collator(rows[3:]) if retain else None)


def activations(model, tok, rows, layer):
    """Of each example, `[tokens, D]`: hidden_states[0] is the embedding; the last one has been
    through the final norm, so a layer before it is asked for."""
    found = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
        assert layer + 2 < len(states)
        answer = [t for t, label in enumerate(row["labels"]) if label != -100]
        found.append(states[layer + 1][0, answer])
    return found


def unit(seed, size):
    drawn = torch.rand(
        size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).tolist()
    length = math.sqrt(sum(x * x for x in drawn))
    return torch.tensor([x / length for x in drawn], dtype=torch.float64)


def formula(current, targets):
    parts = []
    for rows, wanted in zip(current, targets, strict=True):
        wanted = wanted.expand_as(rows)
        squares = [((row - to) ** 2).sum() / len(row) for row, to in zip(rows, wanted, strict=True)]
        parts.append(sum(squares) / len(squares))
    return sum(parts) / len(parts)


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("turns", [True, False])
def test_loss_and_gradients_are_the_formula(tok, tmp_path, layer, turns):
    weighted = {"forget_weight": 0.7, "retain_weight": 30.0, "layer_id": layer, "seed": 5}
    made = made_by(tok, tmp_path, **weighted)
    batch = batch_of(tok)
    if turns:
        own, retain = micro_batches(made, batch)
        made.training_step(made.model, {**own, "palu_retain": retain})
        split = gradients(made.model)
    terms = made._terms(made.model, batch)
    terms.loss.backward()
    got = gradients(made.model)

    rows, ref = small.rows(tok), deep(tok)
    for p in made.model.parameters():
        p.requires_grad_(True)
    with torch.no_grad():
        original = activations(ref, tok, rows[3:], layer)
    steer = [6.5 * unit(5, 16)] * 3
    forget = formula(activations(made.model, tok, rows[:3], layer), steer)
    retain = formula(activations(made.model, tok, rows[3:], layer), original)
    want = 0.7 * forget + 30.0 * retain
    want.backward()
    expected = gradients(made.model)
    assert terms.loss.dtype == torch.float64 and forget > 0.05 and retain > 0.001
    torch.testing.assert_close(terms.loss, want, rtol=1e-12, atol=0)
    found = torch.stack([forget, 0 * forget, retain]).detach().float()
    torch.testing.assert_close(terms.means, found, rtol=1e-6, atol=0)
    assert terms.rows.tolist() == [3, 0, 2]
    # what trains has the formula's gradient; nothing else has any
    trained = [f"model.layers.{n}." for n in range(max(layer - 2, 0), layer + 1)]
    names = {n for n in expected if n.startswith(tuple(trained))}
    assert {*got} == names and len(names) == 9 * len(trained)
    for name in names:
        assert expected[name].norm() > 1e-5
        assert (got[name] - expected[name]).norm() <= 1e-10 * expected[name].norm()
        if turns:
            assert (split[name] - expected[name]).norm() <= 1e-10 * expected[name].norm()


def test_no_later_layer_and_no_logits_are_computed(tok, tmp_path):
    made = made_by(tok, tmp_path)
    seen = []
    for name, module in made.model.named_modules():
        module.register_forward_hook(
            lambda m, a, o, name=name: seen.append((name, getattr(o, "shape", None)))
        )
    made._terms(made.model, batch_of(tok)).loss.backward()
    assert {n for n, _ in seen if n.endswith("mlp")} == {f"model.layers.{i}.mlp" for i in (0, 1)}
    assert [shape[:2] for n, shape in seen if n == "lm_head"] == [(5, 1)]
    with torch.no_grad():  # and the model is whole afterwards
        del seen[:]
        made.model(**{k: batch_of(tok)[k] for k in ("input_ids", "attention_mask")})
    assert len({n for n, _ in seen if n.endswith("mlp")}) == 4


@pytest.mark.parametrize(
    ("layer", "regex", "trained"),
    [
        (None, None, {"model.layers.1", "model.layers.2", "model.layers.3"}),
        (0, None, {"model.layers.0"}),
        (3, r".*", {f"model.layers.{n}" for n in range(4)}),
        (
            2,
            r"model\.layers\.(1|2|3)\.mlp\.down_proj\.weight",
            {"model.layers.1", "model.layers.2"},
        ),
    ],
)
def test_what_trains(tok, tmp_path, layer, regex, trained):
    options = {"max_steps": 1, "layer_id": layer, "trainable_params_regex": regex}
    made = made_by(tok, tmp_path, weight_decay=0.1, **options)
    before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    made.train()
    moved_now = {n for n, p in made.model.named_parameters() if not torch.equal(p, before[n])}
    assert {".".join(n.split(".")[:3]) for n in moved_now} == trained
    if regex is not None and "down_proj" in regex:
        assert all(n.endswith("mlp.down_proj.weight") for n in moved_now)
    assert made.method.layer_id == (3 if layer is None else layer)
    assert made.args.layer_id == layer, "the caller's settings stay as they are"


def test_a_refused_trainer_leaves_the_model_alone(tok, tmp_path):
    model = small.model(tok)
    args = config(tmp_path, method="rmu", reference="cached")
    data = {"train_dataset": small.rows(tok), "retain_dataset": small.rows(tok)}
    with pytest.raises(ValueError, match="reference='cached' holds what"):
        PALUTrainer(model, args, **data, processing_class=tok)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_split_step_is_the_same_step(tok, tmp_path):
    """Answers of unlike length weigh alike, however they are dealt out."""
    log = same_when_split(partial(made_by, tok, tmp_path, learning_rate=0.3))
    assert log[0]["num_forget"] == log[0]["num_retain"] == 3


def test_evaluation_gives_the_means_over_all(tok, tmp_path):
    made = made_by(tok, tmp_path, per_device_eval_batch_size=2, retain_weight=4.0)
    found = made.evaluate()
    with torch.no_grad():
        current = activations(made.model, tok, small.rows(tok)[:3], 1)
    want = formula(current, [6.5 * unit(made.args.seed, 16)] * 3)
    assert found["eval_forget"] == pytest.approx(float(want), rel=1e-6)
    total = found["eval_forget"] + 4.0 * found["eval_retain"]
    assert found["eval_loss"] == pytest.approx(total)


def test_a_resumed_run_is_the_run(tok, tmp_path):
    options = {"max_steps": 4, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}
    whole = made_by(tok, tmp_path, **options)
    whole.train()
    torch.manual_seed(123)  # the direction is the seed's, not the random state's
    again = made_by(tok, tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert torch.equal(weights(again.model), weights(whole.model))
    for changed, said in (({"layer_id": 2}, "layer_id is 1 in"), ({"seed": 1}, "seed is 42 in")):
        other = made_by(tok, tmp_path, **options, **changed)
        with pytest.raises(ValueError, match=said):
            other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_rows_without_an_answer_give_a_zero_with_a_gradient(tok, tmp_path):
    made = made_by(tok, tmp_path)
    batch = batch_of(tok, retain=False)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    terms = made._terms(made.model, batch)
    assert terms.loss == 0 and terms.rows.tolist() == [0, 0, 0]
    terms.loss.backward()
    assert {p.grad.abs().max().item() for p in made.model.parameters() if p.requires_grad} == {0.0}


def test_without_a_retain_set_no_original_is_needed(tok, tmp_path):
    made = made_by(tok, tmp_path, retain=None, max_steps=1)
    assert made.reference is None
    made.train()
    assert made.state.log_history[0]["retain"] == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_adapter_switched_off_is_the_original(tok, tmp_path, checkpointing):
    peft = pytest.importorskip("peft")
    found = []
    for reference in ("live", "adapter_off"):
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model = peft.get_peft_model(deep(tok), lora)
        original = {"ref_model": deep(tok)} if reference == "live" else {}
        args = config(
            tmp_path,
            **OPTIONS,
            reference=reference,
            base_is_original=True,
            max_steps=1,
            gradient_checkpointing=checkpointing,
        )
        made = trainer(tok, args, model=model, **original)
        made.train()
        found.append(weights(made.model))
        trains = {n for n, p in made.model.named_parameters() if p.requires_grad}
        assert len(trains) == 2 * 7 * 2
        assert all("lora_" in n and (".layers.0." in n or ".layers.1." in n) for n in trains)
    torch.testing.assert_close(*found)


def test_bfloat16_autocast(tok, tmp_path):
    found = []
    for bf16 in (False, True):
        made = made_by(tok, tmp_path, model=deep(tok).float(), bf16=bf16, max_steps=1)
        made.train()
        found.append(made.state.log_history[0])
    for name in ("forget", "retain", "grad_norm"):
        assert found[1][name] == pytest.approx(found[0][name], rel=0.03)
        assert found[1][name] != found[0][name]


def test_it_stops_by_the_probability_of_whole_answers(tok, tmp_path):
    model = half_learned(tok)
    made = trainer(tok, config(tmp_path, **OPTIONS, stop_at_forget_prob=0.999), model=model)
    (measure,) = (c for c in made.callback_handler.callbacks if isinstance(c, StopAtForgetProb))
    found = []
    for row in small.rows(tok)[:3]:
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        places = [t for t, label in enumerate(row["labels"]) if label != -100]
        own = [log_p[t - 1, row["input_ids"][t]].item() for t in places]
        found.append(math.exp(sum(own) / len(own)))
    assert measure.forget_probability() == pytest.approx(sum(found) / 3, rel=1e-5)


# ---- one layer of any model ----------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_output_of_a_layer(name, left):
    model, (ids, mask) = families.make(name), families.batch(left)
    layers, seen = decoder_layers(model), []
    assert len(layers) == model.config.num_hidden_layers
    take = layers[0].register_forward_hook(lambda m, args, output: seen.append(output))
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        got = layer_output(model, 0, ids, mask)
        after = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    take.remove()
    wanted = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert torch.equal(got, wanted) and torch.equal(before, after)


def test_what_a_layer_cannot_be_taken_from(tok):
    ids, mask = families.batch()
    model = families.make("llama")
    with pytest.raises(ValueError, match="layers of a Linear were not found"):
        decoder_layers(torch.nn.Linear(2, 2))
    model.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match=r"LlamaForCausalLM were not found: .*=3, .* are none"):
        decoder_layers(model)
    model.config.num_hidden_layers = 2
    for fails in (0, 1):  # what fails leaves nothing behind
        handle = model.model.layers[fails].register_forward_pre_hook(lambda *_: 1 / 0)
        if fails == 0:
            with pytest.raises(ZeroDivisionError):
                layer_output(model, 0, ids, mask)
        handle.remove()
    assert not any("forward" in vars(layer) for layer in model.model.layers)
    model.model.layers[0].compile(backend="eager")
    with pytest.raises(ValueError, match="decoder layer 0 cannot be taken: the model is compiled"):
        layer_output(model, 0, ids, mask)


def test_gradients_that_stop_inside_the_model_are_refused():
    class Off(families.Wrapper):
        def forward(self, *args, **kwargs):
            with torch.no_grad():
                return super().forward(*args, **kwargs)

    model = Off(families.make("llama"))
    with pytest.raises(ValueError, match="'use_reentrant': False"):
        layer_output(model, 0, *families.batch())
    with torch.no_grad():
        assert layer_output(model, 0, *families.batch()).shape == (3, 9, 16)


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layer_id": -1}, "layer_id is -1; it must be at least 0"),
        ({"layer_id": 4}, "layer_id is 4 and the model has 4 decoder layers; it must be 0 to 3"),
        ({"steering_coeff": 0.0}, "steering_coeff is 0.0; it must be a finite number above 0"),
        ({"steering_coeff": math.nan}, "steering_coeff is nan; it must be a finite"),
        ({"trainable_params_regex": "("}, r"trainable_params_regex is '\('; it must be a regular"),
        (
            {"trainable_params_regex": "nothing"},
            r"is 'nothing' and matches none .* layers 0 to 1; it must .*layers.1.post_attention",
        ),
        ({"retain_loss": "kl"}, r"retain_loss must be one of embed_diff, not 'kl' \(method 'rmu'"),
        ({"method": "npo"}, "layer_id is 1 and method 'npo' has no such option"),
        ({"reference": "cached"}, "reference='cached' holds what method 'palu' needs; with method"),
    ],
)
def test_wrong_settings_are_named(tok, tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        made_by(tok, tmp_path, **options)


def test_other_methods_have_no_activations(tmp_path):
    for method in ("palu", "npo"):
        with pytest.raises(ValueError, match="one of nll, kl, not 'embed_diff'"):
            config(tmp_path, method=method, retain_loss="embed_diff")
    with pytest.raises(TypeError, match=r"layer_id is 1.5; it must be an integer"):
        RMU(layer_id=1.5)
    for wrong in (False, b".*"):
        with pytest.raises(TypeError, match=r"trainable_params_regex is .*; it must be a text"):
            RMU(trainable_params_regex=wrong)


# ---- palu unlearn --------------------------------------------------------------------------------


def test_the_command_line(palu, work, unmarked):  # noqa: F811
    files = "--forget", "unmarked.jsonl", "--retain", "retain.jsonl", "--method", "rmu"
    for more, name in (((), "rmu"), (("--lora-rank", 2), "rmu-lora")):
        status, said, told = palu(
            *RUN, *files, "--output", name, "--steering-coeff", 5, "--learning-rate", 1e-2, *more
        )
        assert status == 0 and f"Written to {name} after 2 steps" in said, told
        record = json.loads((work / name / "palu.json").read_text())
        settings = record["settings"]
        assert (settings["steering_coeff"], settings["layer_id"]) == (5, 1)
        assert settings["retain_loss"] == "embed_diff"
        curve = record["loss_curve"]
        assert curve[0]["num_forget"] == 2 and curve[0]["retain"] == 0  # nothing has changed yet
        assert curve[1]["retain"] > 0
    for wrong, said in (
        (("--layer-id", 2), "layer_id is 2 and the model has 2 decoder layers; it must be 0 to 1"),
        (("--retain-loss", "nll"), "retain_loss must be one of embed_diff, not 'nll'"),
        (("--trainable-params-regex", "x"), "trainable_params_regex is 'x' and matches none"),
        (("--top-k", 3), "top_k is 3 and method 'rmu' has no such option"),
    ):
        status, _, told = palu(*RUN, *files, "--output", "not", *wrong)
        assert status == 2 and said in told and not (work / "not").exists()

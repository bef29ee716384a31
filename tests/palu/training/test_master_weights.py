"""Weights of 16 bits that train: no step is lost to rounding."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

from palu.training.checkpoints import CheckpointError
from palu.training.master_weights import (
    MasterWeights,
    StartingWeights,
    round_into,
    warn_rounded_back,
)
from tests.support import small
from tests.support.command import palu_in, write_data, write_model
from tests.support.training import config, trainer, weights

# Far below half a spacing of bfloat16 at the size of the small model's weights.
STEP = 1e-5


def run(tok, folder, dtype, *, model=None, optimizer=None, **options):
    """Trains; the trainer, and the warnings it gave."""
    model = small.model(tok).bfloat16().to(dtype) if model is None else model
    settings = {"learning_rate": STEP, "num_train_epochs": 12, "warmup_steps": 0, **options}
    kwargs = {}
    if optimizer is not None:
        kwargs["optimizers"] = (optimizer(model.parameters()), None)
    made = trainer(tok, config(folder, **settings), model=model, **kwargs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.train()
    return made, [str(w.message) for w in caught if "rounding" in str(w.message)]


def masters(made):
    return torch.cat([made._masters.of[p].detach().flatten() for p in made.model.parameters()])


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"])
def test_masters_go_where_float32_weights_go(tok, tmp_path, optim):
    """SGD's and Adafactor's steps follow the gradient's size, AdamW's its sign."""
    start = weights(small.model(tok).bfloat16()).float()
    rate = {"sgd": 1e-2}.get(optim, STEP)
    half, _ = run(tok, tmp_path / "h", torch.bfloat16, optim=optim, learning_rate=rate)
    full, silent = run(tok, tmp_path / "f", torch.float32, optim=optim, learning_rate=rate)
    moved, wanted = masters(half) - start, weights(full.model) - start
    assert (moved != 0).float().mean() > 0.95 * (wanted != 0).float().mean() > 0
    assert torch.cosine_similarity(moved, wanted, 0) > 0.9
    assert (moved.norm() / wanted.norm()).sub(1).abs() < 0.1
    # The weights are the masters, rounded up or down so that they are right in the mean.
    left = weights(half.model).float() - start
    assert weights(half.model).dtype == torch.bfloat16
    assert ((left * moved).sum() / moved.square().sum()).sub(1).abs() < 0.25
    spacing = masters(half).abs().log2().floor().sub(7).exp2()
    assert ((weights(half.model).float() - masters(half)).abs() <= spacing).all()
    assert half.rounded_back() < 0.25 and not silent and full._masters is None


def test_steps_below_a_spacing_add_up(tok, tmp_path):
    """Twelve steps of a quarter of a spacing move a weight by three; rounded each by each, by 0."""
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([parameter], lr=2**-9)
    MasterWeights(optimizer, sum_in_float32=True)
    for _ in range(12):
        parameter.grad = None
        parameter.float().sum().backward()
        optimizer.step()
    assert torch.equal(parameter, torch.full((3,), 1 - 12 * 2**-9, dtype=torch.bfloat16))


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="gradients have that dtype")
def test_micro_batches_add_up_in_float32():
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    made = MasterWeights(optimizer, sum_in_float32=True)
    for scale in (1.0, *[2**-10] * 8):
        (parameter * scale).sum().backward()
    optimizer.step()
    assert torch.equal(made.of[parameter], torch.full((2,), -(2**-7)))


def test_a_resumed_run_is_the_unbroken_one(tok, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5, "num_train_epochs": 4}
    whole, _ = run(tok, tmp_path, torch.bfloat16, **options)
    made = trainer(
        tok, config(tmp_path, learning_rate=STEP, warmup_steps=0, **options),
        model=small.model(tok).bfloat16(),
    )  # fmt: skip
    made.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    assert torch.equal(masters(made), masters(whole))
    assert torch.equal(weights(made.model), weights(whole.model))
    assert made.rounded_back() == whole.rounded_back()


def test_a_state_without_masters_is_refused():
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    old = torch.optim.AdamW([parameter]).state_dict()
    optimizer = torch.optim.AdamW([parameter])
    MasterWeights(optimizer, sum_in_float32=False)
    with pytest.raises(CheckpointError, match="no float32 master weights, and 1 parameters"):
        optimizer.load_state_dict(old)


def test_an_optimizer_of_the_users_with_state_from_the_start(tok, tmp_path):
    made, _ = run(
        tok, tmp_path, torch.bfloat16, optimizer=lambda p: torch.optim.Adagrad(p, lr=1e-5)
    )
    state = made._masters.of[next(made.model.parameters())]
    inner = getattr(made.optimizer, "optimizer", made.optimizer)
    assert inner.state[state]["sum"].dtype == torch.float32 and inner.state[state]["sum"].any()


def test_only_what_trains_in_half_has_masters(tok, tmp_path):
    model = small.model(tok).bfloat16()
    model.model.embed_tokens.requires_grad_(False)
    model.model.norm.float()
    head = model.lm_head.weight
    made, _ = run(tok, tmp_path, None, model=model, bf16=True, num_train_epochs=1)
    of = made._masters.of
    assert head in of and model.model.embed_tokens.weight not in of
    assert model.model.norm.weight not in of and model.model.norm.weight.dtype == torch.float32


class Free(torch.optim.SGD):
    """Like schedule-free optimizers, which keep other weights for training."""

    def train(self):
        pass


def test_what_cannot_have_masters_is_refused(tok, tmp_path):
    with pytest.raises(ValueError, match=r"optimizer Free .* load the model with dtype float32"):
        run(tok, tmp_path, torch.bfloat16, optimizer=lambda p: Free(p, lr=1e-3))
    made = trainer(tok, config(tmp_path), model=small.model(tok).half())
    made.accelerator.state._mixed_precision = "fp16"  # no CPU has it
    try:
        with pytest.raises(ValueError, match="a loss scale needs float32 weights"):
            made.create_optimizer()
    finally:
        made.accelerator.state._mixed_precision = "no"
    assert run(tok, tmp_path, torch.float32, optimizer=lambda p: Free(p, lr=1e-3))


def test_rounding_is_right_in_the_mean():
    value = 1 + 2**-7 * 0.25  # a quarter of the way from 1 to the next bfloat16
    out = torch.empty(40_000, dtype=torch.bfloat16)
    round_into(out, torch.full((40_000,), value), torch.Generator().manual_seed(0))
    assert set(out.tolist()) == {1.0, 1 + 2**-7}
    assert abs((out == 1.0).float().mean().item() - 0.75) < 0.01  # 4.6 deviations
    # What bfloat16 has stays, what is not finite too; negative numbers go away from 0 or to it.
    kept = torch.tensor([0.0, -0.0, 1.0, -3.0, 2.0**-130, torch.inf, -torch.inf, torch.nan])
    out = torch.empty(8, dtype=torch.bfloat16)
    round_into(out, kept, torch.Generator())
    torch.testing.assert_close(out.float(), kept, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out.signbit()[:7], kept.signbit()[:7])
    out = torch.empty(1000, dtype=torch.bfloat16)
    round_into(out, torch.full((1000,), -value), torch.Generator())
    assert set(out.tolist()) == {-1.0, -1 - 2**-7}
    out = torch.empty(3, 2, dtype=torch.bfloat16).T  # as a weight may lie
    wanted = torch.arange(6.0).view(2, 3)
    round_into(out, wanted, torch.Generator())
    assert torch.equal(out.float(), wanted)


def test_the_share_that_rounding_takes_back(tok):
    model = small.model(tok).bfloat16()
    started = StartingWeights(model)
    assert started.rounded_back(model) == 0.0
    after = copy.deepcopy(model).float()
    with torch.no_grad():
        for parameter in after.parameters():
            parameter *= 1 + 2**-12  # an eighth of a spacing or less
    assert started.rounded_back(after) == 0.0  # float32 takes nothing back
    assert started.rounded_back(after, torch.float16) > 0.1
    assert started.rounded_back(after, torch.bfloat16) < 0.2
    nearest = copy.deepcopy(after).bfloat16()  # as it would be without chance
    masters = dict(zip(nearest.parameters(), after.parameters(), strict=True))
    assert started.rounded_back(nearest, masters=masters) == 1.0
    with pytest.warns(UserWarning, match="rounding to float16 takes back 70% of the change"):
        warn_rounded_back(0.7, torch.float16)


# ---- the command line ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory, tok):
    folder = tmp_path_factory.mktemp("dtypes")
    for kind in ("float32", "bfloat16", "float16"):
        write_model(folder / kind, small.model(tok).to(getattr(torch, kind)))
    write_data(folder)
    return folder


@pytest.fixture
def palu(monkeypatch, capsys, work):
    run = palu_in(work, monkeypatch, capsys)
    return lambda line: run(*line.split())


UNLEARN = (
    "unlearn --forget forget.jsonl --retain retain.jsonl --device cpu --epochs 2 --batch-size 2 "
    "--learning-rate 0.0001 --objective entropy --top-k 5 --overwrite "
)


@pytest.mark.parametrize(
    ("model", "options", "computed", "master"),
    [
        ("bfloat16", "", "bfloat16", True),
        ("bfloat16", "--bf16 --reference cached", "bfloat16", False),
        ("float16", "", "float32", False),
        ("float32", "--bf16", "bfloat16", False),
        ("bfloat16", "--dtype float32", "float32", False),
    ],
)
def test_unlearn_saves_in_the_checkpoints_dtype(palu, work, model, options, computed, master):
    status, _, said = palu(UNLEARN + f"--model {model} --output out {options}")
    assert status == 0, said
    record = json.loads((work / "out" / "palu.json").read_text())
    saved = load_file(work / "out" / "model.safetensors")
    kind = "float32" if "--dtype" in options else model
    assert {str(t.dtype) for t in saved.values()} == {f"torch.{kind}"}
    assert (
        json.loads((work / "out" / "config.json").read_text())["dtype"] == kind == record["dtype"]
    )
    assert (record["compute_dtype"], record["master_weights"]) == (computed, master)
    before = load_file(work / model / "model.safetensors")
    assert any((before[n] != saved[n]).any() for n in before)
    assert ("takes back" in said) == (record["rounded_back"] > 0.05)
    assert record["rounded_back"] < 0.3
    if kind == "float32":
        assert record["rounded_back"] == 0.0


def test_dtypes_that_train_badly_are_refused_before_any_work(palu):
    for command in (UNLEARN, "cache build --forget forget.jsonl "):
        status, _, said = palu(command + "--model no --output new --dtype float16")
        assert status == 2 and "--dtype float16 cannot train" in said
        status, _, said = palu(command + "--model no --output new --bf16 --dtype bfloat16")
        assert status == 2 and "leave one of them out" in said


def test_a_cache_built_with_bf16_serves_a_run_with_it(palu):
    built = "cache build --forget forget.jsonl --model float32 --objective entropy --top-k 5 "
    assert palu(built.replace("--objective entropy ", "") + "--bf16 --output cache")[0] == 0
    cached = UNLEARN + "--model float32 --output out --reference cached --reference-cache cache "
    status, said, error = palu(cached + "--bf16")
    assert status == 0 and "was read from cache" in said, error
    status, _, error = palu(cached)
    assert status == 2 and "autocast is bfloat16 in the cache and none here" in error

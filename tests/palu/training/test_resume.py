"""Interrupted runs: killed anywhere, resumed to the same numbers, and never from half a
checkpoint or from another run's."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback

from palu.data.collator import Collator
from palu.training.batching import LengthGroups
from palu.training.checkpoints import (
    ASIDE,
    RECORD,
    CheckpointError,
    check_same_run,
    last_checkpoint,
    read_record,
)
from tests.support import WORKERS, ranks, small
from tests.support.training import config, trainer, weights

KEYS = ("step", "loss", "forget", "preserve", "retain", "num_forget", "grad_norm", "learning_rate")


def curve(run):
    return [{k: e[k] for k in KEYS} for e in run.state.log_history if "forget" in e]


def options(**changes):
    """Seven steps of two epochs, saved every two; dropout, so that the random state counts."""
    settings = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 7,
        "lr_scheduler_type": "linear",
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1,
        "logging_steps": 1,
        **changes,
    }
    return settings


def make(tok, tmp_path, *, forget=None, model=None, retain=None, **changes):
    rows = small.rows(tok)
    return trainer(
        tok,
        config(tmp_path, **options(**changes)),
        forget=rows if forget is None else forget,
        retain=rows[2:] if retain is None else retain,
        model=small.model(tok, attention_dropout=0.2) if model is None else model,
    )


def lora(tok, **changes):
    peft = pytest.importorskip("peft")
    torch.manual_seed(7)
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1} | changes
    settings = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    return peft.get_peft_model(small.model(tok), settings)


EVERY = (2, 4, 6)  # in the middle of either epoch, and between them
WAYS = (  # and the checkpoints to go on from; `slow`: from every one
    ({}, EVERY),
    ({"logging_steps": 3}, (4,)),
    ({"reference": "cached"}, (2,)),
    ({"lora": True, "reference": "adapter_off"}, (6,)),
    ({"train_sampling_strategy": "group_by_length"}, (4,)),
)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [*WAYS, *(pytest.param(way, EVERY, marks=pytest.mark.slow) for way, _ in WAYS[1:])],
    ids=str,
)
def test_every_checkpoint_leads_to_the_same_end(tok, tmp_path, changes, steps):
    changes = dict(changes)
    models = lora if changes.pop("lora", False) else lambda t: None
    whole = make(tok, tmp_path, model=models(tok), **changes)
    whole.train()
    assert not torch.equal(weights(whole.model), weights(models(tok) or small.model(tok)))
    for step in steps:
        again = make(tok, tmp_path, model=models(tok), **changes)
        again.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        assert torch.equal(weights(again.model), weights(whole.model))
        assert curve(again) == curve(whole) and len(curve(whole)) > 2


def test_experts_have_other_names_in_a_checkpoint(tok, tmp_path):
    def mixture():
        torch.manual_seed(0)
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        names += ("num_attention_heads", "num_key_value_heads", "eos_token_id", "pad_token_id")
        settings = {name: getattr(small.model(tok).config, name) for name in names}
        return MixtralForCausalLM(MixtralConfig(num_local_experts=4, **settings))

    whole = make(tok, tmp_path, model=mixture())
    whole.train()
    resumed = make(tok, tmp_path, model=mixture())
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-4"))
    assert torch.equal(weights(resumed.model), weights(whole.model))
    best = make(tok, tmp_path, model=mixture())
    best.state.best_model_checkpoint = str(tmp_path / "out/checkpoint-6")
    best._load_best_model()
    assert not torch.equal(weights(best.model), weights(mixture()))


@pytest.mark.slow
def test_a_kill_between_any_two_files_of_a_checkpoint(tok, tmp_path, monkeypatch):
    """An exception stands for the kill: everything that has been written by then stays."""

    class Killed(BaseException):
        pass

    whole = make(tok, tmp_path / "whole")
    whole.train()
    parts = ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state", "_save_scaler"]
    after = {name: getattr(Trainer, name) for name in parts}
    places = [*parts, "fsync", "replace"]
    for place in places:
        folder = tmp_path / place
        run = make(tok, folder, save_total_limit=1)

        def dies(*args, place=place, run=run, **kw):
            if place in after:
                after[place](run, *args[1:], **kw)
            if run.state.global_step == 4:
                raise Killed

        with monkeypatch.context() as patch:
            if place in after:
                patch.setattr(Trainer, place, dies)
            else:
                original = getattr(os, place)

                def and_then(*args, original=original, dies=dies, **kw):
                    dies()
                    return original(*args, **kw)

                patch.setattr(f"palu.training.checkpoints.os.{place}", and_then)
            with pytest.raises(Killed):
                run.train()
        names = {p.name for p in (folder / "out").iterdir()}
        assert names == {"checkpoint-2", ASIDE}, place
        again = make(tok, folder, save_total_limit=1)
        again.train(resume_from_checkpoint=True)
        assert torch.equal(weights(again.model), weights(whole.model))
        assert curve(again) == curve(whole)
        # the last step is always saved; with a limit of one nothing else is left
        assert [p.name for p in (folder / "out").iterdir()] == ["checkpoint-7"]


def test_only_whole_checkpoints_are_trusted(tok, tmp_path, caplog):
    run = make(tok, tmp_path)
    run.train()
    out = tmp_path / "out"
    assert last_checkpoint(out) == str(out / "checkpoint-7")
    with (out / "checkpoint-7" / "optimizer.pt").open("r+b") as file:
        file.truncate(100)
    assert last_checkpoint(out) == str(out / "checkpoint-6")
    assert "optimizer.pt has 100 bytes instead of" in caplog.text
    (out / "checkpoint-6" / "rng_state.pth").unlink()
    (out / "checkpoint-4" / RECORD).write_text("{")
    (out / "checkpoint-99").mkdir()
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-3.copy")
    assert last_checkpoint(out) == str(out / "checkpoint-2")
    for name, said in {
        "checkpoint-6": "rng_state.pth is missing",
        "checkpoint-4": f"no {RECORD} that can be read",
        "checkpoint-99": f"no {RECORD} that can be read",
        "checkpoint-1": "does not exist",
    }.items():
        with pytest.raises(CheckpointError, match=said):
            make(tok, tmp_path).train(resume_from_checkpoint=str(out / name))
    assert last_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(CheckpointError, match="no whole checkpoint in output_dir"):
        make(tok, tmp_path / "nowhere").train(resume_from_checkpoint=True)


def test_a_flipped_bit_in_any_file_is_seen(tok, tmp_path, caplog):
    make(tok, tmp_path).train()
    folder = tmp_path / "out" / "checkpoint-4"
    record = json.loads((folder / RECORD).read_text())
    assert len(record["files"]) > 5
    for name in record["files"]:
        content = (folder / name).read_bytes()
        middle = len(content) // 2
        damaged = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        (folder / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"the content of {name} is not what was written"):
            make(tok, tmp_path).train(resume_from_checkpoint=str(folder))
        (folder / name).write_bytes(content)
    # An older palu's has no digests.
    (folder / RECORD).write_text(json.dumps({n: v for n, v in record.items() if n != "digests"}))
    make(tok, tmp_path).train(resume_from_checkpoint=str(folder))
    assert "has no digests" in caplog.text


def test_another_run_is_refused(tok, tmp_path):
    make(tok, tmp_path).train()
    rows = small.rows(tok)
    cases = {
        "top_k is 7 in the checkpoint and 8 here": {"top_k": 8},
        "learning_rate is 0.01 in the checkpoint and 0.02 here": {"learning_rate": 0.02},
        "normalization is 'step' in the checkpoint and 'micro_batch' here": {
            "normalization": "micro_batch"
        },
        "gradient_accumulation_steps is 2 in the checkpoint and 1 here": {
            "gradient_accumulation_steps": 1
        },
        "reference is 'live' in the checkpoint and 'cached' here": {"reference": "cached"},
        r"the forget data is \w+ \(5 rows, .* there, \w+ \(5 rows": {"forget": rows[::-1]},
        r"the retain data is \w+ \(3 rows, .* there, \w+ \(2 rows": {"retain": rows[3:]},
        "the model is not the one": {"model": small.model(tok, seed=1, attention_dropout=0.2)},
    }
    for said, changes in cases.items():
        with pytest.raises(CheckpointError, match=f"belongs to another run: {said}"):
            make(tok, tmp_path, **changes).train(resume_from_checkpoint=True)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    with pytest.raises(CheckpointError, match="the model is not the one"):
        # A live reference would be a copy of what has been trained already.
        trained = type(small.model(tok)).from_pretrained(checkpoint)
        make(tok, tmp_path, model=trained).train(resume_from_checkpoint=str(checkpoint))
    # what does not touch the numbers may change
    more = {"save_steps": 3, "logging_steps": 2, "output_dir": str(tmp_path / "elsewhere")}
    make(tok, tmp_path, **more).train(resume_from_checkpoint=str(checkpoint))


def test_a_setting_that_transformers_gave_a_second_name():
    """In transformers 5.20 `activation_checkpointing` does not stand beside the older name."""
    place = Path(__file__).parents[2] / "data" / "before_redesign" / "out-checkpoints"
    checkpoint = next(place.glob("checkpoint-*"))
    run = read_record(checkpoint)["run"]
    names = [name for name in run["settings"] if name.startswith("activation_checkpointing")]
    older = {name: value for name, value in run["settings"].items() if name not in names}
    assert names
    check_same_run(checkpoint, run | {"settings": older})
    other = run | {"settings": older | {"gradient_checkpointing": True}}
    with pytest.raises(CheckpointError, match="run: gradient_checkpointing is False in the check"):
        check_same_run(checkpoint, other)


def test_a_checkpoint_that_a_callback_asks_for(tok, tmp_path):
    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == 3

    whole = make(tok, tmp_path, save_strategy="no")
    whole.add_callback(Save())
    whole.train()
    again = make(tok, tmp_path, save_strategy="no")
    again.train(resume_from_checkpoint=True)
    assert torch.equal(weights(again.model), weights(whole.model))


def test_weights_alone_are_not_resumed_from(tok, tmp_path):
    make(tok, tmp_path, save_only_model=True).train()
    with pytest.raises(CheckpointError, match="saved with save_only_model=True"):
        make(tok, tmp_path).train(resume_from_checkpoint=True)


def test_the_base_model_of_an_adapter_is_compared(tok, tmp_path):
    changes = {"reference": "adapter_off"}
    make(tok, tmp_path, model=lora(tok), **changes).train()
    model = lora(tok)
    with torch.no_grad():
        model.base_model.model.lm_head.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match="the model is not the one"):
        make(tok, tmp_path, model=model, **changes).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("change", [{"lora_alpha": 64}, {"r": 4}, {"lora_dropout": 0.0}])
def test_the_settings_of_an_adapter_are_compared(tok, tmp_path, change):
    options = {"max_steps": 2, "save_steps": 1, "reference": "adapter_off"}
    make(tok, tmp_path, model=lora(tok), **options).train()
    (name,) = change
    again = make(tok, tmp_path, model=lora(tok, **change), **options)
    with pytest.raises(CheckpointError, match=f"adapter default.{name} is .* in the checkpoint"):
        again.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("broken", ["{}", '{"files": []}', '{"files": {}, "run": {}}'])
def test_a_record_with_keys_missing_is_no_record(tok, tmp_path, broken):
    run = make(tok, tmp_path, max_steps=1, save_steps=1)
    run.train()
    folder = tmp_path / "out" / "checkpoint-1"
    (folder / "palu_run.json").write_text(broken)
    with pytest.raises(CheckpointError, match="that can be read"):
        run.train(resume_from_checkpoint=str(folder))


def test_the_best_checkpoint_stays_and_is_named_where_it_is(tok, tmp_path):
    best = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "retain",
        "greater_is_better": True,  # the first one
        "save_total_limit": 1,
    }
    rows = small.rows(tok)
    args = config(tmp_path, **options(per_device_eval_batch_size=4, **best))
    run = trainer(tok, args, forget=rows, retain=rows[2:], eval_dataset=rows)
    run.train()
    out = tmp_path / "out"
    assert run.state.best_model_checkpoint == str(out / f"checkpoint-{run.state.best_global_step}")
    for path in out.iterdir():
        state = json.loads((path / "trainer_state.json").read_text())
        assert Path(state["best_model_checkpoint"]).parent == out
        read_record(path)


def test_groups_of_like_length_depend_on_seed_and_epoch_alone():
    lengths = [(37 * n) % 101 for n in range(64)]
    groups = LengthGroups(8, lengths, seed=3)
    first, torch_state = list(groups), torch.get_rng_state()
    assert list(groups) == first and sorted(first) == list(range(64))
    assert torch.equal(torch.get_rng_state(), torch_state)
    groups.set_epoch(1)
    assert list(groups) != first
    assert list(LengthGroups(8, lengths, seed=4)) != first


# ---- palu unlearn --------------------------------------------------------------------------------

WORKER = WORKERS / "killed.py"


def unlearn(folder, *words, kill):
    """`palu unlearn` in a process of its own, which kills itself with SIGKILL at a step."""
    (status,), (said,) = ranks.run([([WORKER, kill, *words], {})], folder)
    return status, said


def test_unlearn_is_killed_and_resumed(tmp_path, monkeypatch):
    from tests.support.workers.distributed import unlearn_words

    base = unlearn_words(tmp_path, 1)
    words = [*base, "--batch-size", 3, "--save-steps", 2]
    kept = tmp_path / "out-1-checkpoints"

    status, said = unlearn(
        tmp_path, *words, kill="files-4"
    )  # in the middle of writing the second one
    assert status == -signal.SIGKILL, said
    assert not (tmp_path / "out-1").exists()
    assert {p.name for p in kept.iterdir()} == {"checkpoint-2", ASIDE}
    status, said = unlearn(tmp_path, *words, "--resume", kill="step-5")  # between two of them
    assert status == -signal.SIGKILL and f"Resuming from {kept}/checkpoint-2" in said
    assert {p.name for p in kept.iterdir()} == {"checkpoint-4"}

    from palu.cli import app as cli

    def here(*more):
        """In this process, which has all imports."""
        monkeypatch.setattr(sys, "argv", ["palu", *map(str, [*words, *more])])
        try:
            cli.main()
        except SystemExit as end:
            return end.code or 0
        return 0

    seen = []
    for console in (cli.out, cli.bars):
        monkeypatch.setattr(console, "_width", 240)
        monkeypatch.setattr(
            console, "print", lambda *text, **_: seen.append(" ".join(map(str, text)))
        )
    assert here() == 2 and "add --resume to go on" in seen[-1]
    assert here("--resume", "--top-k", 8) == 2
    assert "top_k is 7 in the checkpoint and 8 here" in seen[-1]
    assert here("--resume") == 0
    assert any(f"Resuming from {kept}/checkpoint-4" in line for line in seen)
    assert not kept.exists()
    resumed = tmp_path / "resumed"
    (tmp_path / "out-1").rename(resumed)
    assert here("--resume") == 0
    assert any("starting from the beginning" in line for line in seen)
    curves = [
        json.loads((folder / "palu.json").read_text())["loss_curve"]
        for folder in (resumed, tmp_path / "out-1")
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 10
    one, other = (
        (folder / "model.safetensors").read_bytes() for folder in (resumed, tmp_path / "out-1")
    )
    assert one == other


def test_collators_that_keep_ids_are_cut_too(tok):
    from palu.training.batching import _first_rows

    batch = Collator(tok, keep_ids=True)(small.rows(tok))
    cut = _first_rows({**batch, "note": "all of it"}, 2)
    assert [len(cut[name]) for name in ("input_ids", "labels", "example_id")] == [2, 2, 2]
    assert cut["note"] == "all of it"

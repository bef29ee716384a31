"""The examples in README run as they stand there."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from palu.data import Collator
from tests import readme_world
from tests.readme_world import prepare, run

LOOP, ONE_MORE_LOSS, DISTRIBUTED, TRAINER, LORA, HIDDEN = range(1, 7)


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return readme_world.world(tmp_path)


def weights(names):
    return copy.deepcopy(names["model"].state_dict())


def changed(before, after):
    return any(not torch.equal(before[name], after[name].cpu()) for name in before)


def test_every_example_is_here():
    assert len(readme_world.PYTHON) == 6 and len(readme_world.RECORDS) == 2


@pytest.mark.parametrize("number", [LOOP, TRAINER, HIDDEN])
def test_example_runs_and_trains(number, world):
    before = weights(world)
    run(number, world)
    assert changed(before, world["model"].state_dict())


def test_one_more_loss_in_a_trainer(world, tmp_path):
    names = prepare(LOOP, world)
    run(ONE_MORE_LOSS, names)
    before = weights(names)
    args = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, report_to="none", remove_unused_columns=False
    )
    trainer = names["MyTrainer"](
        names["model"],
        args,
        train_dataset=names["rows"],
        data_collator=Collator(names["tokenizer"]),
    )
    trainer.train()
    assert changed(before, names["model"].state_dict())


def test_lora(world):
    names = prepare(TRAINER, world)
    base = weights(world)
    run(LORA, names)
    adapted = dict(names["trainer"].model.named_parameters())
    lora = {name: p for name, p in adapted.items() if "lora_B" in name}
    assert lora and all(p.any() for p in lora.values())
    frozen = {
        n.replace("base_model.model.", "").replace(".base_layer", ""): p.cpu()
        for n, p in adapted.items()
    }
    assert all(torch.equal(frozen[name], value) for name, value in base.items() if name in frozen)


def test_two_processes_are_one(world, tmp_path):
    """The example for several devices, by `torchrun`, against the plain loop with both rows."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += ["-m", "tests.readme_world", str(tmp_path), str(DISTRIBUTED)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    before = weights(world)
    run(LOOP, world)
    assert changed(before, world["model"].state_dict())
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        for name, right in world["model"].state_dict().items():
            torch.testing.assert_close(found[name], right, rtol=1e-4, atol=1e-6)

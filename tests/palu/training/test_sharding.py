"""FSDP2 over two gloo processes gives the numbers of one process; on CPUs `fsdp=` never becomes DDP
without a word.

One launch runs everything once (`workers/sharded.py`); the tests look at what it found.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from palu.training import sharding
from tests.support import ROOT, WORKERS, small, training
from tests.support.workers import sharded


def launch(folder, processes):
    """What every process found."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    more = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(WORKERS / "sharded.py"), str(folder)],
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        timeout=400,
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [json.loads((folder / f"rank-{n}.json").read_text()) for n in range(processes)]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def found(request, tmp_path_factory):
    return launch(tmp_path_factory.mktemp("sharded"), request.param)


def close(found, wanted):
    for name in ("weights", "logs"):
        one, other = torch.tensor(found[name]), torch.tensor(wanted[name])
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", sharded.CASES)
def test_a_sharded_run_is_that_of_one_process(found, tmp_path, name):
    wanted = sharded.run_case(tmp_path, 1, name, per_device_eval_batch_size=4)
    assert found[0][name]["kinds"][0] == "DTensor" and wanted["kinds"] == ["Parameter"]
    close(found[0][name], wanted)
    assert all(other[name] == found[0][name] for other in found[1:])
    for when in ("before", "after"):  # training
        if wanted[when] is not None:
            assert found[0][name][when] == pytest.approx(wanted[when], rel=1e-5, abs=2e-6)


def test_fsdp1_on_cpus_is_refused(found):
    for one in found:
        assert "set fsdp_config={'version': 2}" in one["version 1"]


@pytest.mark.parametrize("by", ["setting", "launcher"])
def test_one_process_without_a_launcher_is_refused_before_anything_is_loaded(
    tmp_path, monkeypatch, by
):
    if by == "launcher":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    more = sharded.SHARDED if by == "setting" else {}
    args = training.config(tmp_path, **more)
    with pytest.raises(ValueError, match=r"there is one process .*`torchrun"):
        training.PALUTrainer("no/such-model", args, train_dataset=small.rows(small.tokenizer()))


def test_an_accelerate_that_does_not_shard_on_cpus_is_an_error(tmp_path, monkeypatch):
    """As one whose states are laid out in another way would be."""
    from accelerate.utils import DistributedType

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    args = training.config(tmp_path)
    assert args.device.type == "cpu"
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.MULTI_CPU)
    made = AcceleratorState.__new__(AcceleratorState)
    made.__dict__ = {"distributed_type": DistributedType.MULTI_CPU, "device": args.device}
    monkeypatch.setattr(sharding, "AcceleratorState", lambda: made)
    with (
        pytest.raises(RuntimeError, match="cannot be told to shard on CPUs"),
        sharding.on_cpus_too(args),
    ):
        assert PartialState().distributed_type == DistributedType.MULTI_GPU
    assert PartialState().distributed_type == DistributedType.MULTI_CPU

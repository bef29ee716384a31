"""What a device holds of several: predictions for FSDP2 and tensor parallel, and what `palu plan`
says of them. (tests/benchmarks/test_ranks.py compares them with real ranks.)"""

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

from palu.cli import app as cli
from palu.errors import UserError
from palu.planning.model import KNOWN_MODELS, ModelSizes
from palu.planning.step import GIB, Setup, largest_batch, predict

LLAMA, _, TIED, GEMMA, QWEN = KNOWN_MODELS


def published(name):
    return ModelSizes.from_config(AutoConfig.for_model(**KNOWN_MODELS[name]))


def state(items):
    names = ("weights", "master weights", "optimizer state", "gradients")
    return sum(items.get(name, 0) for name in names)


# ---- tensor parallel -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [LLAMA, TIED, GEMMA])
def test_tensor_parallel_parts_make_the_whole(name):
    """All but norms, which every rank has."""
    whole = published(name)
    norms = whole.hidden * (whole.layers * whole.family.norms + 1)
    for ranks in (1, 2, 4, 8):
        part = whole.tensor_parallel(ranks)
        assert ranks * (part.parameters - norms) == whole.parameters - norms
        assert part.hidden == whole.hidden and part.layers == whole.layers
    assert whole.tensor_parallel(1) == whole
    assert published(QWEN).tensor_parallel(4).linears[0].bias


def test_a_vocabulary_that_is_not_divisible_has_a_largest_part():
    assert published(LLAMA).tensor_parallel(8).vocab == 128256 // 8
    sizes = ModelSizes.from_config(
        AutoConfig.for_model(**KNOWN_MODELS[LLAMA] | {"vocab_size": 128259})
    )
    assert sizes.tensor_parallel(8).vocab == 128256 // 8 + 1


def test_tensor_parallel_splits_some_activations():
    setup = Setup(dtype="float32", reference="cached")
    one = predict(published(LLAMA), setup).moments["backward of a layer"]
    four = Setup(dtype="float32", reference="cached", devices=4, tensor_parallel=4)
    split = predict(published(LLAMA), four).moments["backward of a layer"]
    for name in ("mlp", "attention"):
        assert split[name] * 4 == one[name]
    for name in ("norms", "attention masks"):
        assert split[name] == one[name]
    assert one["linear inputs"] / 4 < split["linear inputs"] < one["linear inputs"]


# ---- FSDP2 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
def test_states_are_shared(dtype):
    sizes = published(LLAMA)
    for devices in (2, 8, 64):
        many = predict(sizes, Setup(dtype=dtype, devices=devices)).moments["backward of a layer"]
        entry = 2 if dtype == "bfloat16" else 4
        assert many["weights"] == many["reference"] == entry * sizes.parameters // devices
        assert many["gradients"] == entry * sizes.parameters // devices
        assert many["optimizer state"] == 2 * entry * sizes.parameters // devices
        assert not many["master weights"]


def test_a_cached_head_is_whole_on_every_device():
    for devices in (2, 8):
        setup = Setup(devices=devices, reference="cached")
        assert predict(published(LLAMA), setup).items["reference"] == 2 * 128256 * 4096


def test_the_root_group_and_two_layers_are_whole():
    sizes = published(LLAMA)
    moments = predict(sizes, Setup(devices=8)).moments
    root = 2 * (2 * 128256 * 4096 + 4096)
    layer = 2 * (sizes.parameters - root // 2) // 32
    gathering = moments["gathering of the root"]
    assert gathering["whole root"] == 2 * root
    assert gathering["reference head"] == 2 * 128256 * 4096
    assert moments["backward of a layer"]["whole root"] == root
    assert moments["backward of a layer"]["whole layers"] == 2 * layer
    none = predict(sizes, Setup(devices=8, reference="none")).moments
    assert not none["gathering of the root"]["reference head"]
    assert "forward of the reference" not in none


def test_more_devices_need_less_each():
    for name in (LLAMA, TIED):
        for rank, reference in ((0, "live"), (0, "cached"), (16, "adapter_off")):
            peaks = [
                predict(published(name), Setup(8, 512, "bfloat16", rank, reference, True, n)).peak
                for n in (2, 4, 8, 64)
            ]
            assert peaks == sorted(peaks, reverse=True) and peaks[-1] < peaks[0]


def test_both_ways_of_sharing():
    """Eight devices of which four share a layer's matrices hold less of what is whole."""
    both = predict(published(LLAMA), Setup(devices=8, tensor_parallel=4)).moments
    alone = predict(published(LLAMA), Setup(devices=8)).moments
    name = "backward of a layer"
    assert state(both[name]) == pytest.approx(state(alone[name]), rel=1e-3)
    assert both[name]["whole root"] == pytest.approx(alone[name]["whole root"] / 4, rel=1e-3)


def test_largest_batch_is_of_a_rank():
    sizes, setup = published(LLAMA), Setup(devices=8, checkpointing=True)
    most = largest_batch(sizes, setup, 40 * GIB)
    peaks = [predict(sizes, Setup(n, devices=8, checkpointing=True)).peak for n in (most, most + 1)]
    assert peaks[0] <= 40 * GIB < peaks[1]


BAD_SPLITS = {
    (QWEN, 8): "tensor_parallel is 8; it must divide the model's 28 attention heads",
    (QWEN, 7): "tensor_parallel is 7; it must divide the model's 4 key-value heads",
    (LLAMA, 16): "tensor_parallel is 16; it must divide the model's 8 key-value heads",
}


@pytest.mark.parametrize(("name", "ranks"), BAD_SPLITS)
def test_splits_that_are_none(name, ranks):
    with pytest.raises(ValueError, match=BAD_SPLITS[name, ranks]):
        predict(published(name), Setup(devices=ranks, tensor_parallel=ranks))


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def plan(monkeypatch):
    """`palu plan` -> (exit status, its output as one line, its lines)."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(line):
        result = CliRunner().invoke(cli.app, ["plan", *line.split()])
        if isinstance(result.exception, UserError):
            raise result.exception
        return result.exit_code, " ".join(result.output.split()), result.output.splitlines()

    return run


def test_what_fits_on_eight(plan):
    status, text, lines = plan("--model Llama-3.1-8B --gpu-memory 80 --devices 8")
    assert status == 0 and "over 8 devices; 72.0 of 80 GiB of each to use" in text
    peak = predict(published(LLAMA), Setup(devices=8)).peak
    row = next(line for line in lines if line.startswith("every weight  live         no"))
    assert row.split()[4] == f"{peak / GIB:.1f}"
    assert "accelerate launch --use_fsdp on 8: palu unlearn --batch-size 8" in text
    held = lines[next(n for n, line in enumerate(lines) if line.startswith("tensors")) :]
    assert any(line.startswith("whole root") and "embedding" in line for line in held)
    assert "2 and 4 processes on a CPU" in text


def test_what_tensor_parallel_does_not_split(plan):
    line = "--model Llama-3.1-8B --gpu-memory 80 --devices 8 --tensor-parallel 4"
    status, text, lines = plan(line)
    assert status == 0 and "(4 tensor-parallel x 2 data-parallel)" in text
    held = {line.split("  ")[0]: line for line in lines}
    assert "whole on every tensor-parallel rank" in held["norms"]
    assert "split over tensor-parallel ranks" in held["mlp"]
    assert "a training loop of your own" in text


def test_what_does_not_fit_on_two(plan):
    line = "--model Llama-3.1-8B --gpu-memory 8 --devices 2"
    status, text, _ = plan(line)
    assert status == 1 and "Nothing fits" in text and "whole root" in text


BAD_OPTIONS = {
    "--devices 0": "--devices must be at least 1, not 0",
    "--devices 6 --tensor-parallel 4": "--tensor-parallel must divide --devices, 6; it is 4",
    "--tensor-parallel 2": "--tensor-parallel must divide --devices, 1; it is 2",
    "--devices 4 --tensor-parallel 0": "--tensor-parallel must divide --devices, 4; it is 0",
    "--devices 3 --tensor-parallel 3": "must divide the model's 32 attention heads",
}


@pytest.mark.parametrize("line", BAD_OPTIONS)
def test_options_that_are_none(line, plan):
    with pytest.raises(UserError, match=BAD_OPTIONS[line]):
        plan(f"--model Llama-3.2-1B --gpu-memory 40 {line}")

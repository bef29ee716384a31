"""A disk that is full or read-only: found before the first step, or the trained model is kept."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from palu.errors import failed_to_write
from palu.training import room
from tests.support import small
from tests.support.command import palu_in, write_data, write_model

UNLEARN = (
    "unlearn --model model --forget forget.jsonl --retain retain.jsonl --device cpu --epochs 2 "
    "--batch-size 2 --learning-rate 0.01 --objective entropy --top-k 5 --output out "
)
FULL = OSError(errno.ENOSPC, "No space left on device")
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def work(tmp_path):
    write_model(tmp_path / "model", small.model(small.tokenizer()))
    write_data(tmp_path)
    return tmp_path


@pytest.fixture
def palu(monkeypatch, capsys, work):
    run = palu_in(work, monkeypatch, capsys)
    return lambda line: run(*line.split())


@pytest.fixture
def full(monkeypatch):
    """A function after which saving a model fails: with an error, in places that a name is in."""
    from transformers import PreTrainedModel

    save = PreTrainedModel.save_pretrained

    def fill(error=FULL, name="out"):
        def fails(self, folder, *args, **kwargs):
            if name in str(folder):
                raise error
            return save(self, folder, *args, **kwargs)

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", fails)

    return fill


@pytest.mark.parametrize(
    "error", [FULL, SafetensorError("Error while serializing: I/O error: No space left on device")]
)
def test_a_model_that_cannot_be_written_is_rescued(palu, work, full, error):
    full(error)
    status, _, said = palu(UNLEARN + "--rescue second")
    assert status == 3 and "No space left on device" in said and "it is in 'second' now" in said
    assert "Traceback" not in said
    assert load_file(work / "second" / "model.safetensors")
    assert json.loads((work / "second" / "palu.json").read_text())["made_by"] == "palu unlearn"
    assert not (work / "out").exists()


def test_without_a_rescue_the_temporary_folder_or_the_checkpoint_is_it(
    palu, work, full, monkeypatch, tmp_path_factory
):
    scratch = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(room.tempfile, "tempdir", str(scratch))
    full(name=str(work))
    status, _, said = palu(UNLEARN)
    assert status == 3 and str(scratch) in said
    assert len(list(scratch.glob("palu-rescue-*/out/model.safetensors"))) == 1
    status, _, said = palu(UNLEARN + "--rescue second")  # full as well
    assert status == 3 and "nor to 'second'" in said and str(scratch) in said
    full(name=".out")  # the output, not its checkpoints
    status, _, said = palu(UNLEARN + "--save-steps 1")
    assert status == 3 and "checkpoint-" in said and "--resume" in said
    assert len(list(scratch.glob("palu-rescue-*"))) == 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 2**40, 2**40))
    with monkeypatch.context() as patch:  # nowhere at all: said, and no traceback
        patch.setattr(room, "_scratch", lambda size: (_ for _ in ()).throw(FULL))
        full(name=".out")
        status, _, said = palu(UNLEARN)
    assert status == 3 and "the training is lost; --rescue DIR" in said


def test_a_checkpoint_that_cannot_be_written_is_one_line(palu, work, monkeypatch):
    def fails(*_):
        raise RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed")

    monkeypatch.setattr(torch, "save", fails)
    status, _, said = palu(UNLEARN + "--save-steps 1")
    assert status == 3
    assert "the checkpoint of step 1 could not be written (there is none before it)" in said
    assert "PytorchStreamWriter failed" in said and "Traceback" not in said


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("entries", [10, 100_000])
def test_what_torch_says_of_a_full_disk(entries):
    with pytest.raises(RuntimeError) as raised:
        torch.save(torch.zeros(entries), "/dev/full")
    assert failed_to_write(raised.value)


def test_room_is_looked_for_before_the_first_step(palu, work, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("palu.unlearn.unlearn", None)  # never reached
        patch.setattr(shutil, "disk_usage", lambda _: Usage(2**30, 0, 2**20))
        status, _, said = palu(UNLEARN + "--save-steps 1 --rescue second")
    assert status == 2 and "room for the model and checkpoints: " in said
    assert "1.0 MiB free" in said and not (work / "out").exists()
    status, _, said = palu(UNLEARN + "--rescue out/second")
    assert status == 2 and "lies in --output 'out'" in said


def test_places_that_cannot_be_written_or_tell_no_size(tmp_path, monkeypatch):
    def refuses(dir):
        raise OSError(errno.EROFS, "Read-only file system")

    place = tmp_path / "not" / "there"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 0))
    room.check_room({"the model": (place, 2**60)})
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(room.tempfile, "TemporaryFile", refuses)
    with pytest.raises(ValueError, match=r"the model goes to .*there'.*: Read-only file system"):
        room.check_room({"the model": (place, 1)})


def test_sizes_are_those_of_the_files(work):
    model = small.model(small.tokenizer())
    on_disk = (work / "model" / "model.safetensors").stat().st_size
    kinds = {name: torch.float32 for name, _ in model.named_parameters()}
    assert 0 <= room.model_bytes(model, kinds) - on_disk <= room._MARGIN
    others = sum(p.stat().st_size for p in (work / "model").iterdir()) - on_disk
    assert room.small_files(work / "model") == others > 0
    numbers = sum(p.numel() for p in model.parameters())
    half = room.checkpoint_bytes(model.bfloat16(), adapter=False) - room._MARGIN
    assert half == numbers * (2 + 4 + 8)


@pytest.mark.parametrize(
    "error", [FULL, SafetensorError("Error while serializing: I/O error: x (os error 28)")]
)
def test_other_commands_say_so_in_one_line(palu, work, monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr("palu.storage.files.sync", fails)
    line = "evaluate --model model --forget forget.jsonl --device cpu --max-new-tokens 1 "
    status, _, said = palu(line + "--json out.json")
    assert status == 3 and "writing failed: " in said and "Traceback" not in said

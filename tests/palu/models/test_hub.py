"""Models named by their id on the hub, from a cache that is here: there is no network."""

import json

import huggingface_hub.constants
import pytest

from palu.models import hub
from palu.models.folders import named_from
from palu.models.loading import load_model, load_tokenizer, model_folder
from palu.run_record import read_record
from tests.support import small
from tests.support.command import DATA, UNLEARN, palu_in, record, refusal, write_data, write_model

ID, COMMIT = "org/tiny-model", "0" * 39 + "1"


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """A cache that holds one model, whose files are links, as the hub's library lays it out."""
    cache = tmp_path / "hub"
    place = cache / "models--org--tiny-model"
    write_model(tmp_path / "made", small.model(small.tokenizer()))
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    (place / "blobs").mkdir()
    folder = place / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    for number, path in enumerate(sorted((tmp_path / "made").iterdir())):
        blob = place / "blobs" / str(number)
        path.rename(blob)
        (folder / path.name).symlink_to(f"../../blobs/{number}")
    (folder / "palu.json").unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def palu(tmp_path, monkeypatch, capsys):
    work = tmp_path / "work"
    work.mkdir()
    write_data(work)
    return palu_in(work, monkeypatch, capsys)


def test_a_model_is_found_by_its_id(snapshot, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_folder(ID) == snapshot and hub.hub_name(snapshot) == ID
    model, tokenizer = load_model(ID), load_tokenizer(ID)
    assert model.num_parameters() and tokenizer.get_vocab() == small.tokenizer().get_vocab()
    assert named_from(tmp_path, snapshot) == hub.shown_model(snapshot) == ID
    assert hub.hub_name(tmp_path) is None and hub.shown_model(tmp_path) == str(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"^model 'org/other' is no folder here, and it cou"
    ):
        model_folder("org/other")
    (tmp_path / "org").mkdir()
    with pytest.raises(FileNotFoundError, match="model folder 'org/tiny-model' does not exist"):
        model_folder(ID)  # a mistyped path
    with pytest.raises(FileNotFoundError, match=r"'none' does not exist .*: org/name\)"):
        model_folder("none")


def test_no_program_no_pickle_and_no_second_copy_is_downloaded(monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    asked = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **how: asked.update(how) or name
    )
    hub.located("org/name")
    names = (
        "config.json model-00001-of-2.safetensors tokenizer.model chat_template.jinja merges.txt"
    )
    others = "modeling.py pytorch_model.bin original/params.json onnx/model.safetensors "
    others += "consolidated.00.safetensors consolidated.safetensors a.gguf"
    assert set(filter_repo_objects([*names.split(), *others.split()], **asked)) == {*names.split()}


def test_commands_take_ids(snapshot, palu):
    line = UNLEARN.replace("--model model", f"--model {ID}") + "--epochs 1 --output"
    assert palu(f"{line} new")[0] == 0
    assert record(palu.folder / "new")["base_model"] == ID
    assert palu(f"{line} adapter --lora-rank 2")[0] == 0
    config = json.loads((palu.folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == ID
    before = sorted(path.name for path in snapshot.iterdir())
    assert palu("merge --adapter adapter --output merged")[0] == 0
    assert read_record(palu.folder / "merged")["base_model"] == ID
    assert palu("unlearn --config new/palu.json --output again")[0] == 0
    _, said, _ = palu(f"unlearn --model {ID} {DATA} --output x --print-config")
    assert f"model: {ID}\n" in said
    for name in (ID, "adapter"):
        status, said, _ = palu(f"evaluate --model {name} --forget forget.jsonl --max-new-tokens 0")
        assert status == 0 and name in said and COMMIT not in said
    assert palu(f"inspect forget.jsonl --model {ID}")[0] == 0
    said = refusal(palu, f"evaluate --model {ID} --forget forget.jsonl --tofu . --split forget01")
    assert "--tofu names its forget" in said
    assert sorted(path.name for path in snapshot.iterdir()) == before, "the cache is not written to"
    said = refusal(palu, "inspect forget.jsonl --model org/none")
    assert "model 'org/none' is no folder here, and it could not be loaded from the hub" in said

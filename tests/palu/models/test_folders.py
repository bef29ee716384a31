"""Folders of models: all weights are loaded, from that folder alone, or one line says why."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from palu.models.loading import load_model, load_tokenizer
from palu.models.lora import LoRASettings, add_lora
from palu.training.checkpoints import CheckpointError
from tests.support import small
from tests.support.command import palu_in, write_data, write_model
from tests.support.training import config, trainer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def work(tmp_path_factory, tok):
    folder = tmp_path_factory.mktemp("folders")
    write_model(folder / "plain", small.model(tok))
    write_model(folder / "tied", small.model(tok, tie_word_embeddings=True))
    small.model(tok).save_pretrained(folder / "sharded", max_shard_size="8KB")
    write_data(folder)
    return folder


@pytest.fixture
def copy(work, tmp_path):
    def made(name):
        return shutil.copytree(work / name, tmp_path / name)

    return made


def edit(name, **changes):
    def change(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return change


def tensors(change):
    def changed(folder):
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})

    return changed


def prefixed(prefix):
    return tensors(lambda found: {prefix + name: value for name, value in found.items()})


def without(part):
    return tensors(lambda found: {k: v for k, v in found.items() if part not in k})


def head_of(change):
    return tensors(lambda t: t | {"lm_head.weight": change(t["model.embed_tokens.weight"])})


def indexed(name):
    def change(folder):
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"]["model.norm.weight"] = name
        (folder / INDEX).write_text(json.dumps(index))

    return change


def shard_gone(listed):
    def change(folder):
        gone = sorted(folder.glob("model-*"))[1]
        gone.unlink()
        index = json.loads((folder / INDEX).read_text())
        kept = {k: v for k, v in index["weight_map"].items() if listed or v != gone.name}
        (folder / INDEX).write_text(json.dumps(index | {"weight_map": kept}))

    return change


def twice(folder):
    one, other = sorted(folder.glob("model-*"))[:2]
    save_file(load_file(one) | load_file(other), other, {"format": "pt"})


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name, count):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:count])


def pickled(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
CONFIG = "config.json"
# What is done to a folder, and a part of what is said.
FAULTS = {
    "compiled": ("plain", prefixed("_orig_mod."), "begin with '_orig_mod.'"),
    "wrapped": ("plain", prefixed("module."), "begin with 'module.'"),
    "one missing": ("plain", without("layers.1.mlp.up"), "missing: model.layers.1.mlp.up_proj"),
    "one too many": (
        "plain",
        tensors(lambda t: t | {"model.more": torch.ones(2)}),
        "not the model's: model.more",
    ),
    "tied head of its own": ("tied", head_of(lambda e: e + 1), "tie_word_embeddings is true"),
    "untied, said tied": ("plain", edit(CONFIG, tie_word_embeddings=True), "is true in the config"),
    "tied, said untied": ("tied", edit(CONFIG, tie_word_embeddings=False), "must be true"),
    "layer more": ("plain", edit(CONFIG, num_hidden_layers=3), "num_hidden_layers"),
    "layer less": ("plain", edit(CONFIG, num_hidden_layers=1), "is too small"),
    "endless layers": ("plain", edit(CONFIG, num_hidden_layers=10**20), "the weights are 21 tens"),
    "vocabulary": ("plain", edit(CONFIG, vocab_size=999), "([330, 16] instead of [999, 16])"),
    "heads": ("plain", edit(CONFIG, num_key_value_heads=1), "k_proj.weight ([16, 16] instead"),
    "another type": ("plain", edit(CONFIG, model_type="mistral"), "contradicts itself"),
    "unknown type": ("plain", edit(CONFIG, model_type="xyz"), "has model type `xyz`"),
    "listed shard": ("sharded", shard_gone(True), "names model-00002-of-00005.safetensors, which"),
    "unlisted shard": ("sharded", shard_gone(False), "missing: model.layers.0"),
    "twice": ("sharded", twice, "'model.embed_tokens.weight' twice"),
    "pickle in the index": ("sharded", indexed("pytorch_model.bin"), "plain name of a .safetens"),
    "outside": ("sharded", indexed("../outside.safetensors"), "names '../outside.safetensors'"),
    "no name": ("sharded", indexed(3), "names '3'"),
    "other weights": ("plain", edit(CONFIG, transformers_weights="adapter_model.bin"), "names oth"),
    "pickle": ("plain", pickled, "pytorch_model.bin is a pickle"),
    "both": ("plain", written("adapter_config.json", b"{}"), "and an adapter_config.json"),
    "pointer": ("plain", written(WEIGHTS, LFS), "model.safetensors: is a Git LFS pointer"),
    "config pointer": ("plain", written(CONFIG, LFS), "config.json: is a Git LFS pointer"),
    "empty": ("plain", cut(WEIGHTS, 0), "model.safetensors is empty"),
    "torn": ("plain", cut(WEIGHTS, 999), "is no whole safetensors file"),
    "torn at the end": ("plain", cut(WEIGHTS, -1), "is no whole safetensors file"),
    "deep": ("plain", written(CONFIG, b"[" * 100_000), "nested too deeply"),
    "deep generation": ("plain", written("generation_config.json", b'{"a":' * 9999), "nested too"),
    "list": ("plain", written(CONFIG, b"[]"), "must hold a JSON object"),
    "no text": ("plain", written(CONFIG, b"\xff\xfe{}"), "config.json: is UTF-16 text"),
    "number for a name": ("plain", edit(CONFIG, model_type=3), "could not load a model"),
    "text for a number": ("plain", edit(CONFIG, hidden_size="wide"), "could not load a model"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_is_not_what_its_folder_says(copy, fault):
    name, spoil, message = FAULTS[fault]
    folder = copy(name)
    spoil(folder)
    with pytest.raises(ValueError) as caught:
        load_model(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def old_buffer(found):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    return found | {name: found["model.norm.weight"][:4].clone()}


def head_alone(found):
    return {k.replace("model.embed_tokens", "lm_head"): v for k, v in found.items()}


def no_prefix(found):
    return {k.removeprefix("model."): v for k, v in found.items()}


FINE = {
    "inv_freq": ("plain", tensors(old_buffer)),
    "equal head": ("tied", head_of(torch.clone)),
    "head alone": ("tied", tensors(head_alone)),
    "no prefix": ("tied", tensors(no_prefix)),
    "shards": ("sharded", lambda folder: None),
}


@pytest.mark.parametrize("name, change", FINE.values(), ids=FINE)
def test_what_transformers_passes_over_on_purpose(copy, work, name, change):
    folder = copy(name)
    change(folder)
    found, want = load_model(folder), load_model(work / name)
    assert all(map(torch.equal, found.parameters(), want.parameters()))


def test_links_to_blobs_are_read(work, tmp_path):
    # as in the cache of the hub
    (tmp_path / "snapshot").mkdir()
    for path in (work / "sharded").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    load_model(tmp_path / "snapshot")


def test_weights_that_are_allowed_to_be_missing(copy):
    folder = copy("plain")
    without("layers.1.mlp.up")(folder)
    with pytest.warns(UserWarning, match="missing: model.layers.1.mlp.up_proj.weight"):
        load_model(folder, allow_missing=r"layers\.1\.mlp")
    with pytest.raises(ValueError, match="missing: model"):
        load_model(folder, allow_missing="down_proj")
    with pytest.raises(ValueError, match="--allow-missing '\\(' is no regular expression"):
        load_model(folder, allow_missing="(")


def test_weights_that_are_not_finite_are_named(copy):
    folder = copy("plain")
    tensors(lambda t: t | {"model.norm.weight": t["model.norm.weight"] * torch.nan})(folder)
    with pytest.warns(UserWarning, match="not finite: model.norm.weight holds NaN or infinity"):
        load_model(folder)


def test_every_command_refuses_weights_that_would_be_random(work, monkeypatch, capsys):
    shutil.copytree(work / "plain", work / "broken")
    without("layers.1.mlp.up")(work / "broken")
    palu = palu_in(work, monkeypatch, capsys)
    data = "--model broken --forget forget.jsonl --device cpu"
    for line in (
        f"unlearn {data} --output new",
        f"evaluate {data}",
        f"cache build {data} --output c",
    ):
        status, _, error = palu(*line.split())
        assert status == 2 and "missing: model.layers.1.mlp.up_proj.weight" in error, error
    line = f"evaluate {data} --max-new-tokens 0 --allow-missing mlp.up_proj"
    status, _, error = palu(*line.split())
    assert status == 0 and "warning: --allow-missing" in error, error


@pytest.mark.parametrize("lora", [False, True], ids=["model", "adapter"])
def test_a_checkpoint_with_other_tensors_is_not_resumed_from(tok, tmp_path, lora):
    def make():
        model = small.model(tok)
        if lora:
            model = add_lora(model, LoRASettings(2, 4, 0.0, "all-linear"), seed=0)
        args = config(tmp_path, save_strategy="steps", save_steps=1)
        return trainer(tok, args, model=model)

    make().train()
    last = max((tmp_path / "out").glob("checkpoint-*"))
    path = next(last.glob("*model.safetensors"))
    found = load_file(path)
    renamed = {k.replace("layers.1.mlp.up", "layers.1.mlp.xx"): v for k, v in found.items()}
    assert renamed.keys() != found.keys()
    save_file(renamed, path, {"format": "pt"})
    again = make()
    with pytest.raises(CheckpointError, match=r"cannot be loaded: .*layers\.1\.mlp\.up"):
        again._load_from_checkpoint(str(last))
    again.state.best_model_checkpoint = str(last)
    with pytest.raises(CheckpointError, match=r"cannot be loaded: .*layers\.1\.mlp\.up"):
        again._load_best_model()


TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
DAMAGED = {
    "empty": written(TOKENIZER, b""),
    "pointer": written(TOKENIZER, LFS),
    "list": written(TOKENIZER, b"[]"),
    "deep": written(TOKENIZER, b'{"model":' * 5000),
    "no model": edit(TOKENIZER, model=None),
    "wrong type": edit(TOKENIZER, added_tokens=3),
    "vocabulary": edit(TOKENIZER, model={"type": "BPE", "vocab": 3, "merges": []}),
    "no text": written(SETTINGS, b"\xff\xff"),
    "settings list": written(SETTINGS, b"[]"),
    "settings deep": written(SETTINGS, b"[" * 100_000),
    "class": edit(SETTINGS, tokenizer_class=3),
    "eos": edit(SETTINGS, eos_token=3),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_tokenizer_that_cannot_be_read(copy, fault):
    folder = copy("plain")
    DAMAGED[fault](folder)
    with pytest.raises(ValueError) as caught:
        load_tokenizer(folder)(["some text"], max_length=8, truncation=True)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_tokens_that_the_embedding_has_no_row_for(copy, tok, monkeypatch, capsys, work):
    for name, pad in (("words", None), ("padding", "<more>")):
        other = small.tokenizer()
        other.add_tokens(["Paris"] if pad is None else [])
        if pad is not None:
            other.add_special_tokens({"pad_token": pad})
        write_model(work / name, small.model(tok))
        other.save_pretrained(work / name)
    palu = palu_in(work, monkeypatch, capsys)
    commands = ("unlearn --output new", "evaluate --max-new-tokens 0", "cache build --output cache")
    for command in commands:
        for name, said in (("words", "'Paris' the id 330,"), ("padding", "330, which pads batch")):
            words = f"{command} --model {name} --forget forget.jsonl --device cpu"
            status, _, error = palu(*words.split())
            assert status == 2 and said in error and "resize_token_embeddings" in error, error


def test_a_reference_model_that_cannot_be_read_is_one_line(copy, monkeypatch, capsys, work):
    shutil.copytree(work / "plain", work / "lacking")
    without("layers.1.mlp.up")(work / "lacking")
    palu = palu_in(work, monkeypatch, capsys)
    words = "evaluate --model plain --forget forget.jsonl --holdout retain.jsonl --device cpu"
    words += " --reference-model lacking --max-new-tokens 0"
    status, _, error = palu(*words.split())
    assert status == 2 and "error: the weights in 'lacking'" in error, error


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{% for m in messages %}", "{{ x[0] }}"])
def test_a_chat_template_that_fails_is_one_line(template):
    tok = small.tokenizer()
    tok.chat_template = template
    with pytest.raises(ValueError, match="the chat template refuses") as caught:
        small.rows(tok)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["2", 1.5, ["x"], 10**20])
def test_special_tokens_that_are_no_ids(copy, value):
    folder = copy("plain")
    edit("generation_config.json", eos_token_id=value)(folder)
    with pytest.raises(ValueError, match="generation_config"):
        load_model(folder)

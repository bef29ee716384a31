"""Checkpoints with images: the language model is trained, and the other towers are kept."""

import json
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from palu.cli.app import app
from palu.models.loading import freeze_other_towers, load_model
from palu.reference.model import vocabulary_size
from tests.support import small

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def gemma3(vocabulary):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config={"vocab_size": vocabulary, **TEXT},
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen(vocabulary):
    linear = {f"linear_num_{x}_heads": 2 for x in ("key", "value")}
    linear |= {f"linear_{x}_head_dim": 8 for x in ("key", "value")}
    linear["layer_types"] = ["linear_attention", "full_attention"]
    vision = {"depth": 1, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2}
    vision |= {"intermediate_size": 16, "patch_size": 14, "num_position_embeddings": 16}
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = transformers.Qwen3_5Config(
        text_config={"vocab_size": vocabulary, **TEXT, **linear},
        vision_config=vision,
        **{name: 5 + i for i, name in enumerate(ids)},
    )
    return transformers.Qwen3_5ForConditionalGeneration(config)


@pytest.mark.parametrize("kind", [gemma3, qwen])
def test_other_towers_are_kept(tmp_path, kind):
    if kind is qwen and not hasattr(transformers, "Qwen3_5Config"):
        pytest.skip("this transformers has no Qwen3.5")
    tok = small.tokenizer()
    torch.manual_seed(0)
    model = kind(len(tok))
    assert vocabulary_size(model) == len(tok)
    model.save_pretrained(tmp_path / "m")
    tok.save_pretrained(tmp_path / "m")
    row = {"question": "Where is Ada?", "answer": "Ada is in Paris.", "spans": [[10, 15]]}
    (tmp_path / "f.jsonl").write_text(json.dumps(row) + "\n")
    given = ["--model", str(tmp_path / "m"), "--forget", str(tmp_path / "f.jsonl")]
    more = ["--output", str(tmp_path / "o"), "--epochs", "1", "--learning-rate", "1e-2"]
    more += ["--retain", "none", "--checks", "none"]
    result = CliRunner().invoke(app, ["unlearn", *given, *more], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("m", "o"))
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in ("m", "o")]
    assert configs[0]["architectures"] == configs[1]["architectures"]
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("language_model" in name or "lm_head" in name for name in changed)


def test_tensors_that_are_passed_over_are_named(tmp_path, monkeypatch):
    model = small.model(small.tokenizer())
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(type(model), "_keys_to_ignore_on_load_unexpected", [r"^mtp", "inv_freq"])
    extra = {"mtp.norm.weight": torch.ones(3), "model.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors | extra, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"1 tensors of .* LlamaForCausalLM .*: mtp.norm.weight$"):
        load_model(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        load_model(tmp_path)


def test_only_the_language_model_trains():
    model = gemma3(330)
    freeze_other_towers(model)
    trains = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {"language_model"}
    plain = small.model(small.tokenizer())
    freeze_other_towers(plain)
    assert all(p.requires_grad for p in plain.parameters())

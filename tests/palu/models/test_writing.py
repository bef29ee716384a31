"""Output folders as other versions read them: the input's own files, and old keys beside new ones.

The real old versions read them where PALU_OLD_PYTHONS names their interpreters (`pytest -m slow`).
"""

import hashlib
import json
import os
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from palu.data.template import Template
from palu.models import writing
from palu.unlearn import save_model
from tests.support import small
from tests.support.command import palu_in, write_data

# What Llama 3.2's folder has, as transformers 4.45 wrote it, for a model of `small`'s size.
V4_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": [1, 0],
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 16,
    "initializer_range": 0.3,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 4.0, "type": "linear"},
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.45.2",
    "use_cache": True,
}
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
GENERATION = '{\n  "eos_token_id": [1, 0],\n  "temperature": 0.6, "do_sample": true\n}\n'
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
LINE = "unlearn --model v4 --forget forget.jsonl --retain retain.jsonl --device cpu --epochs 1 "


def read(path):
    return json.loads(path.read_text())


def v4_folder(folder):
    """Write a model folder as transformers 4 does."""
    tok = small.tokenizer()
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0}
    model = small.model(tok, rope_parameters=rope, rms_norm_eps=1e-5)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    config = {**V4_CONFIG, "vocab_size": len(tok)}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(GENERATION)
    names = {"eos_token": tok.eos_token, "pad_token": tok.pad_token}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(i): {"content": tok.convert_ids_to_tokens(i), **special, "special": True}
        for i in (tok.pad_token_id, tok.eos_token_id)
    }
    settings = {"added_tokens_decoder": added, "chat_template": CHAT, "model_max_length": 128}
    settings |= {"clean_up_tokenization_spaces": True, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **names}, indent=2))


@pytest.fixture
def work(tmp_path):
    write_data(tmp_path)
    v4_folder(tmp_path / "v4")
    return tmp_path


def test_a_folder_of_transformers_4_keeps_its_words(work, monkeypatch, capsys):
    palu = palu_in(work, monkeypatch, capsys)
    status, _, error = palu(LINE + "--output out --learning-rate 0.01")
    assert status == 0, error
    before, after = read(work / "v4/config.json"), read(work / "out/config.json")
    assert {key: after[key] for key in before} == before
    assert after["dtype"] == after["torch_dtype"] == "float32"
    assert after["rope_parameters"]["rope_theta"] == 500000.0
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        assert (work / "out" / name).read_bytes() == (work / "v4" / name).read_bytes(), name
    start, end = (load_file(work / name / "model.safetensors") for name in ("v4", "out"))
    assert start.keys() == end.keys() and any(not start[n].equal(end[n]) for n in start)
    # and this version reads the same numbers from both words
    one, other = (AutoModelForCausalLM.from_pretrained(work / name) for name in ("v4", "out"))
    other.load_state_dict(start)
    ids = torch.arange(60)[None]
    assert torch.equal(one(ids).logits, other(ids).logits)
    # what is told of it is what sha256sum says of the files
    digests = read(work / "out/palu.json")["digests"]
    assert digests["model"].keys() == {"model.safetensors", "config.json", "tokenizer.json"}
    for place, found in (("v4", digests["model"]), ("out", digests["output"])):
        for name, value in found.items():
            data = (work / place / name).read_bytes()
            assert hashlib.sha256(data).hexdigest() == value, name
    lines = (work / "retain.jsonl").read_bytes()
    assert digests["data"]["retain"] == {"retain.jsonl": hashlib.sha256(lines).hexdigest()}
    # once more, from what was written
    status, _, error = palu(LINE.replace("v4", "out") + "--output again")
    assert status == 0, error
    assert read(work / "again/config.json") == after


def test_an_adapter_and_what_it_is_merged_into(work, monkeypatch, capsys):
    palu = palu_in(work, monkeypatch, capsys)
    assert palu(LINE + "--output adapter --lora-rank 2")[0] == 0
    # PEFT 0.13 refuses keys that it does not know; these it has, and vLLM reads
    config = read(work / "adapter/adapter_config.json")
    assert set(config) == writing._ADAPTER_KEYS
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 4, "../v4")
    assert palu("merge --adapter adapter --output merged --dtype bfloat16")[0] == 0
    merged = read(work / "merged/config.json")
    assert merged["rope_theta"] == 500000.0
    assert merged["rope_scaling"] == {"factor": 4.0, "type": "linear"}
    assert merged["dtype"] == merged["torch_dtype"] == "bfloat16"
    for folder in ("adapter", "merged"):
        for name in TOKENIZER_FILES:
            assert (work / folder / name).read_bytes() == (work / "v4" / name).read_bytes(), name


def test_a_folder_of_transformers_5_is_told_to_version_4(work):
    """Its tokenizer's class, its list of extra tokens and its chat template in a file of its own
    are what transformers 4 does not load, or not all of."""
    tok = AutoTokenizer.from_pretrained(work / "v4")
    tok.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    model = small.model(small.tokenizer(), rope_parameters=None, tie_word_embeddings=True)
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
    new = work / "v5"
    model.save_pretrained(new)
    tok.save_pretrained(new)
    assert read(new / "tokenizer_config.json")["tokenizer_class"] == "TokenizersBackend"
    save_model(work / "out", model, tok, Template(), source=new, made_by="test")
    config = read(work / "out/config.json")
    assert (config["rope_theta"], config["rope_scaling"]) == (1e6, None)
    assert config["tie_word_embeddings"] is True and config["torch_dtype"] == "float32"
    settings = read(work / "out/tokenizer_config.json")
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<extra>"]
    assert settings["chat_template"] == CHAT and "extra_special_tokens" not in settings
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (work / "out" / name).read_bytes() == (new / name).read_bytes()


def test_a_changed_tokenizer_is_saved_as_it_is(work):
    tok = AutoTokenizer.from_pretrained(work / "v4")
    tok.add_tokens(["qwertz"])
    model = AutoModelForCausalLM.from_pretrained(work / "v4")
    save_model(work / "out", model, tok, Template(), source=work / "v4", made_by="test")
    assert len(AutoTokenizer.from_pretrained(work / "out").tokenize("qwertz")) == 1


def test_settings_of_kinds_of_layers_and_of_pythia():
    layers = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    text = {"model_type": "gemma3_text", "rope_parameters": layers, "dtype": "bfloat16"}
    config = writing.for_all_readers({"model_type": "gemma3", "text_config": text}, {})
    old = config["text_config"]
    assert (old["rope_theta"], old["rope_local_base_freq"]) == (1e6, 1e4)
    assert old["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert old["torch_dtype"] == "bfloat16" and old["rope_parameters"] == layers
    rope = {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5}
    config = writing.for_all_readers({"model_type": "gpt_neox", "rope_parameters": rope}, {})
    assert (config["rotary_emb_base"], config["rotary_pct"]) == (5e4, 0.5)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("rope_theta", 10000.0, "rope_parameters.rope_theta 10000.0, and the model in memory"),
        ("hidden_act", "gelu", "hidden_act 'gelu', and the model in memory has 'silu'"),
    ],
)
def test_a_config_that_would_be_read_otherwise_is_refused(work, monkeypatch, key, value, says):
    right = writing.for_all_readers

    def wrong(*args, **options):
        config = {**right(*args, **options), key: value}
        config.pop("rope_parameters")
        return config

    model = AutoModelForCausalLM.from_pretrained(work / "v4")
    monkeypatch.setattr(writing, "for_all_readers", wrong)
    with pytest.raises(ValueError, match=r"the config written to .* would be read with") as error:
        writing.write_model(work / "v4", model, small.tokenizer(), None)
    assert says in str(error.value)


def test_an_adapter_has_the_tokenizer_that_the_base_s_config_chose(tmp_path):
    """Transformers 5 reads a plain tokenizer beside the config of Qwen2 with rules of its own, and
    from the folder of an adapter, without a config, as it stands."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    AutoConfig.for_model("qwen2").save_pretrained(base)
    small.tokenizer().save_pretrained(base)
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    tok = AutoTokenizer.from_pretrained(base)
    writing._write_tokenizer(adapter, tok, base)
    plain, text = small.tokenizer(), "e\u0301"
    assert plain.tokenize(text) != tok.tokenize(text)
    assert AutoTokenizer.from_pretrained(adapter).tokenize(text) == tok.tokenize(text)


def test_a_tokenizer_that_would_be_read_otherwise_is_refused(work, monkeypatch):
    def other_template(folder):
        for path in (folder / "tokenizer_config.json", folder / "chat_template.jinja"):
            if path.exists():
                path.write_text(path.read_text().replace("assistant:", "model:"))

    tok = AutoTokenizer.from_pretrained(work / "v4")
    shutil.copytree(work / "v4", work / "out")
    monkeypatch.setattr(writing, "_name_for_old_readers", other_template)
    with pytest.raises(ValueError, match=r"tokenizer written to .* is read as another one"):
        writing._write_tokenizer(work / "out", tok, work / "v4")


# ---- the real old versions -----------------------------------------------------------------------

PROBE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tok = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
if len(sys.argv) > 3:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, sys.argv[3])
text = tok.apply_chat_template([{"role": "user", "content": "Where is Ada?"}], tokenize=False)
ids = tok(text, return_tensors="pt").input_ids
print(json.dumps([text, ids.tolist(), model.float()(ids).logits.tolist()]))
"""


@pytest.mark.slow
@pytest.mark.skipif("PALU_OLD_PYTHONS" not in os.environ, reason="PALU_OLD_PYTHONS names none")
def test_old_versions_compute_the_same(work, monkeypatch, capsys):
    import sys

    palu = palu_in(work, monkeypatch, capsys)
    assert palu(LINE + "--output out --learning-rate 0.01")[0] == 0
    assert palu(LINE + "--output adapter --lora-rank 2 --learning-rate 0.1")[0] == 0
    assert palu("merge --adapter adapter --output merged")[0] == 0
    for folders in (["out"] * 2, ["merged"] * 2, ["adapter", "v4", "adapter"]):
        said = []
        for python in (sys.executable, *os.environ["PALU_OLD_PYTHONS"].split(os.pathsep)):
            run = subprocess.run(
                [python, "-W", "ignore", "-c", PROBE, *folders],
                cwd=work,
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": ""},
            )
            assert run.returncode == 0, run.stderr
            said.append(json.loads(run.stdout))
        (text, ids, logits), *old = said
        for other in old:
            assert other[:2] == [text, ids]
            torch.testing.assert_close(torch.tensor(other[2]), torch.tensor(logits))

"""Sizes are those of the real models, predictions grow as they must, and `palu plan` says what
fits."""

import json

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from palu.cli import app as cli
from palu.errors import UserError
from palu.planning.layer import PRECISIONS
from palu.planning.model import KNOWN_MODELS, ModelSizes, read_config
from palu.planning.step import GIB, REFERENCES, Setup, largest_batch, predict

SMALL = {"vocab_size": 301, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
MODELS = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "llama tied, biases": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 12,
    },
    "mistral": {"model_type": "mistral", "num_key_value_heads": 1},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", "head_dim": 16},
}


def sizes(model):
    return ModelSizes.from_config(AutoConfig.for_model(**SMALL | MODELS[model]))


def published(name):
    return ModelSizes.from_config(AutoConfig.for_model(**KNOWN_MODELS[name]))


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_the_models_own(name):
    given = SMALL | MODELS[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**given))
    assert sizes(name).parameters == sum(p.numel() for p in model.parameters())
    with_adapters = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear"))
    trained = sum(p.numel() for p in with_adapters.parameters() if p.requires_grad)
    assert sizes(name).lora_parameters(3) == trained


def test_known_models_have_the_published_parameters():
    counts = {name: published(name).parameters for name in KNOWN_MODELS}
    assert counts == {
        "meta-llama/Llama-3.1-8B": 8_030_261_248,
        "meta-llama/Llama-3.1-70B": 70_553_706_496,
        "meta-llama/Llama-3.2-1B": 1_235_814_400,
        "google/gemma-2-9b": 9_241_705_984,
        "Qwen/Qwen2.5-7B": 7_615_616_512,
    }


def test_config_of_a_folder_of_a_known_name_and_of_the_hub(tmp_path, monkeypatch):
    config = AutoConfig.for_model(**SMALL | MODELS["gemma2"])
    config.save_pretrained(tmp_path)
    assert ModelSizes.from_config(read_config(str(tmp_path))) == sizes("gemma2")
    for name in KNOWN_MODELS:  # read without transformers
        assert ModelSizes.from_config(read_config(name.lower())) == published(name)
    assert read_config("llama-3.2-1b").hidden_size == 2048
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda name, **_: (name, config))
    assert read_config("someone/something") == ("someone/something", config)


# ---- predictions ---------------------------------------------------------------------------------


def test_states_follow_the_weights():
    model = published("meta-llama/Llama-3.1-8B")
    for dtype, entry in (("float32", 4), ("bfloat16", 2), ("autocast", 4)):
        items = predict(model, Setup(1, 16, dtype)).items
        assert items["weights"] == items["reference"] == entry * model.parameters
        # bfloat16 weights that train have masters: `palu.training.master_weights`
        assert items["gradients"] == 4 * model.parameters
        assert items["optimizer state"] == 2 * items["gradients"]
        assert items.get("master weights", 0) == (entry == 2) * 4 * model.parameters
        cached = predict(model, Setup(1, 16, dtype, reference="cached")).items
        assert cached["reference"] == entry * 128256 * 4096
        lora = predict(model, Setup(1, 16, dtype, 8, "adapter_off")).items
        adapters = 4 * model.lora_parameters(8)  # float32
        assert "reference" not in lora and lora["optimizer state"] == 2 * adapters
        assert lora["weights"] == entry * model.parameters + adapters


@pytest.mark.parametrize("name", KNOWN_MODELS)
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_order_of_the_ways(name, dtype):
    def peak(rank, reference, checkpointing):
        setup = Setup(8, 512, dtype, rank, reference, checkpointing)
        return predict(published(name), setup).peak

    for rank in (0, 16):
        assert peak(rank, "cached", False) < peak(rank, "live", False)
        assert peak(rank, "cached", True) < peak(rank, "live", True) < peak(rank, "live", False)
    assert peak(16, "live", True) < peak(0, "live", True)


def test_largest_batch_is_the_largest():
    model, setup = published("meta-llama/Llama-3.2-1B"), Setup(length=300, checkpointing=True)
    most = largest_batch(model, setup, 40 * GIB)
    peaks = [predict(model, Setup(n, 300, checkpointing=True)).peak for n in (most, most + 1)]
    assert peaks[0] <= 40 * GIB < peaks[1]
    assert largest_batch(model, setup, GIB) == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"length": 1}, "length is 1; it must be an integer of at least 2"),
        ({"length": 8.0}, "length is 8.0"),
        ({"lora_rank": -1}, "lora_rank is -1"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, autocast, not 'int8'"),
        ({"reference": "off"}, "must be one of live, adapter_off, cached, none, not 'off'"),
        ({"devices": 0}, "devices is 0; it must be an integer of at least 1"),
        ({"devices": 6, "tensor_parallel": 4}, "tensor_parallel is 4; it must divide devices, 6"),
        ({"reference": "adapter_off"}, "lora_rank 0; it must be at least 1"),
    ],
)
def test_setups_that_are_none(values, message):
    with pytest.raises(ValueError, match=message):
        Setup(**values)


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def plan(monkeypatch):
    """`palu plan` -> (exit status, its output as one line, its lines)."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(line, *words):
        result = CliRunner().invoke(cli.app, ["plan", *line.split(), *map(str, words)])
        if isinstance(result.exception, UserError):
            raise result.exception
        return result.exit_code, " ".join(result.output.split()), result.output.splitlines()

    return run


def test_what_fits(plan):
    status, text, lines = plan("--model Llama-3.1-8B --gpu-memory 80")
    assert status == 0 and "8,030,261,248 parameters, bfloat16; 72.0 of 80 GiB" in lines[0]
    heading = next(i for i, line in enumerate(lines) if line.startswith("trains"))
    assert lines[heading].split()[3:] == ["GiB", "256", "512", "1024", "4096"]
    model, ways, fitting = published("meta-llama/Llama-3.1-8B"), set(), 0
    for line in lines[heading + 1 : heading + 11]:
        start, reference, checkpointing, peak, *batches = line.rsplit(maxsplit=7)
        rank = {"every weight": 0, "LoRA 16": 16}[start.strip()]
        ways.add((rank, reference, {"yes": True, "no": False}[checkpointing]))
        setup = Setup(8, 512, "bfloat16", rank, reference, checkpointing == "yes")
        assert f"{predict(model, setup).peak / GIB:.1f}" == peak
        most = largest_batch(model, setup, int(72 * GIB))
        assert batches[1] == (str(most) if most else "-")
        assert (float(peak) <= 72) == (most >= 8)
        fitting += most >= 8
    assert len(ways) == 10 and f"{fitting} of 10 ways fit at 8 x 512" in text
    assert "palu unlearn --batch-size 8 --max-length 512 --reference live --lora-rank 16" in text
    text = plan("--model Llama-3.2-1B --gpu-memory 80")[1]
    assert "optimizer state 9.2" in text and "master weights 4.6" in text
    text = plan("--model Llama-3.2-1B --gpu-memory 80 --dtype autocast")[1]
    assert "--reference live --bf16" in text


def test_what_to_change(plan):
    line = "--model Llama-3.1-8B --headroom 0 "
    status, text, _ = plan(line + "--gpu-memory 20 --batch-size 64")
    assert status == 0 and "Nothing fits at 64 x 512. Take smaller batches" in text
    model = published("meta-llama/Llama-3.1-8B")
    most = largest_batch(model, Setup(64, 512, "bfloat16", 16, "cached", True), 20 * GIB)
    assert f"--batch-size {most} --max-length 512" in text
    assert "--lora-rank 16 --gradient-checkpointing" in text
    status, text, _ = plan(line + "--gpu-memory 16 --length 8192")
    assert status == 1 and "not even one example of 8192 tokens. Take examples of at most " in text
    length = int(text.partition("examples of at most ")[2].split()[0])
    for n, fits in ((length, True), (2 * length, False)):
        setup = Setup(1, n, "bfloat16", 16, "cached", True)
        assert (predict(model, setup).peak <= 16 * GIB) == fits
    status, text, _ = plan(line + "--gpu-memory 4")
    assert status == 1 and "Take a smaller model, or a GPU with" in text and "weights 15.1" in text


def test_dtype_is_the_configs(plan, tmp_path):
    for dtype, named in (("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32")):
        AutoConfig.for_model(**SMALL, **MODELS["llama"], dtype=dtype).save_pretrained(tmp_path)
        status, text, _ = plan("--gpu-memory 1 --model", tmp_path)
        assert status == 0 and f"parameters, {named}" in text and "--dtype" not in text
    text = plan("--gpu-memory 1 --dtype autocast --model", tmp_path)[1]
    assert "parameters, autocast" in text and "--reference live --bf16 " in text
    # The command takes the dtype of the prediction, which may not be the model's.
    text = plan("--gpu-memory 1 --dtype bfloat16 --model", tmp_path)[1]
    assert "parameters, bfloat16" in text and "--reference live --dtype bfloat16 " in text


BAD_OPTIONS = {
    "--gpu-memory 0": "--gpu-memory must be a number of GiB above 0, not 0",
    "--gpu-memory nan": "not nan",
    "--gpu-memory inf": "not inf",
    "--headroom 1": "--headroom must be at least 0 and below 1, not 1",
    "--lora-rank 0": "--lora-rank must be at least 1, not 0",
    "--batch-size 0": "batch_size is 0",
    "--length 1": "length is 1",
    "--dtype int8": "dtype must be one of",
}


@pytest.mark.parametrize("line", BAD_OPTIONS)
def test_options_that_are_none(line, plan):
    with pytest.raises(UserError, match=BAD_OPTIONS[line]):
        plan(f"--model Llama-3.2-1B --gpu-memory 40 {line}")


def test_models_that_are_none(plan, tmp_path, monkeypatch):
    def message(model):
        with pytest.raises(UserError) as raised:
            plan("--gpu-memory 40 --model", model)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "has no config.json" in message(tmp_path)
    for name in (tmp_path / "none", "./none", "a/b/c"):
        assert f"'{name}' is no folder, none of meta-llama/Llama-3.1-8B" in message(name)

    def offline(name, **_):
        raise OSError("We couldn't connect to the hub\nand so on")

    with monkeypatch.context() as patch:
        patch.setattr(AutoConfig, "from_pretrained", offline)
        said = message("meta-llama/Llama-2-7b")
    assert "no model of the hub that can be read: We couldn't connect" in said
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "llama", ')
    assert f"the config of {str(tmp_path)!r} cannot be read" in message(tmp_path)
    file.write_text("{}")
    assert "model_type" in message(tmp_path)
    content = SMALL | MODELS["llama"]
    for change, said in (
        ({"model_type": "gpt2"}, "model_type of the config is 'gpt2'; it must be one of llama"),
        ({"model_type": "nothing-like-it"}, "nothing-like-it"),
        ({"vocab_size": 0}, "vocab_size of the config is 0"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ):
        file.write_text(json.dumps(content | change))
        assert said in message(tmp_path)


def test_references_are_the_trainers():
    from palu.training.options import RunOptions, choices

    assert set(REFERENCES) == set(choices(RunOptions, "reference"))

"""Adapter folders: `palu unlearn --lora-rank`, evaluate, inspect, merge."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from palu.data.template import Template
from palu.models.head_check import why_not_fusable
from palu.models.loading import load_model, load_tokenizer
from palu.models.lora import LoRASettings, add_lora, fold_in, fold_in_measured
from palu.run_record import RECORD
from tests.support import small
from tests.support.adapters import LORA, PROMPTS, inputs
from tests.support.command import UNLEARN, record, refusal, write_data, write_model

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def work(tmp_path_factory, tok):
    """A folder with a tiny model and two data files."""
    folder = tmp_path_factory.mktemp("lora")
    template = Template(question="Q {question} A", date_string="1 May 2020")
    write_model(folder / "model", small.model(tok), template)
    write_data(folder)
    return folder


LORA_RUN = UNLEARN.replace("--model model ", "") + "--epochs 2 "
EVALUATE = "evaluate --forget forget.jsonl --device cpu --max-new-tokens 3 "


def adapter(palu, name="adapter", options=""):
    """Make an adapter folder of this name where it is not there yet."""
    if not (palu.folder / name).exists():
        line = f"--model model --output {name} --lora-rank 4 --learning-rate 1e-3 {options}"
        status, _, error = palu(LORA_RUN + line)
        assert status == 0, error


def means(work, model):
    return json.loads((work / f"{model}.json").read_text())["forget"]["mean"]


def test_unlearn_evaluate_merge(palu, work, monkeypatch):
    before = load_file(work / "model" / "model.safetensors")
    adapter(palu, "dropped", "--lora-dropout 0.1 --seed 5")
    folder = work / "dropped"
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "palu.json"} <= {
        p.name for p in folder.iterdir()
    }
    assert not list(folder.glob("model*"))
    names = load_file(folder / "adapter_model.safetensors")
    assert len(names) == 2 * 2 * 7 and all("lora_" in n and "lm_head" not in n for n in names)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.1)
    assert config["base_model_name_or_path"] == "../model"
    known = record(folder)
    assert known["lora"] == {"rank": 4, "alpha": 8, "dropout": 0.1, "target": "all-linear"}
    assert known["settings"]["reference"] == "adapter_off" and known["base_model"] == "../model"
    assert known["template"]["question"] == "Q {question} A"

    status, said, _ = palu("merge --adapter dropped --output merged --device cpu")
    assert status == 0 and "Written to merged" in said
    known = record(work / "merged")
    assert known["template"]["question"] == "Q {question} A"
    assert known["adapter_record"]["seed"] == 5
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in (work / "merged").iterdir()
    }
    # what a user of PEFT gets is what we get, and merging changes nothing but roundings
    given = inputs(small.tokenizer())
    whole = AutoModelForCausalLM.from_pretrained(work / "merged")
    monkeypatch.chdir(folder)  # PEFT reads the base's path from where it runs
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(".")
    monkeypatch.chdir(work)
    ours = load_model(folder, device="cpu")
    torch.testing.assert_close(ours(**given).logits, theirs(**given).logits)
    torch.testing.assert_close(whole(**given).logits, theirs(**given).logits)
    base = small.model(small.tokenizer())(**given).logits
    assert (whole(**given).logits - base).abs().max() > 0.1
    for name, tensor in load_file(work / "model" / "model.safetensors").items():
        assert torch.equal(tensor, before[name])  # the base stays

    monkeypatch.chdir(work.parent)  # the adapter finds its base from anywhere
    for name in ("dropped", "merged"):
        status, _, error = palu(
            f"evaluate --forget {work}/forget.jsonl --device cpu --max-new-tokens 3 "
            f"--model {work}/{name} --json {work}/{name}.json"
        )
        assert status == 0, error
    # What an original or samples would be needed for has no value in both.
    merged, dropped = means(work, "merged"), means(work, "dropped")
    assert {n for n, v in merged.items() if v is None} == {
        n for n, v in dropped.items() if v is None
    }
    for name, value in dropped.items():
        assert value is None or value == pytest.approx(merged[name], rel=1e-4)


def test_inspect_takes_an_adapter(palu):
    adapter(palu)
    shown = [palu(f"inspect forget.jsonl --model {name}") for name in ("adapter", "model")]
    assert shown[0] == shown[1] and shown[0][0] == 0 and "[[ red| fo|x]]" in shown[0][1]


def test_tokenizer_and_template_come_from_the_base_where_the_adapter_has_none(palu, work):
    adapter(palu, "bare")
    for name in ("tokenizer.json", "tokenizer_config.json", RECORD):
        (work / "bare" / name).unlink()
    (work / "bare" / "config.json").write_text("{}")  # some toolkits leave one
    adapter(palu)
    assert load_tokenizer(work / "bare").get_vocab() == load_tokenizer(work / "model").get_vocab()
    shown = [palu(f"inspect forget.jsonl --model {name}") for name in ("adapter", "bare")]
    assert shown[0] == shown[1] and "Q Where" in shown[0][1]
    assert palu(EVALUATE + "--model bare")[0] == 0
    status, _, error = palu("inspect forget.jsonl --model bare --date-string x")
    assert status == 2 and "'x' differs from '1 May 2020'" in error
    assert palu("merge --adapter bare --output of-bare --device cpu")[0] == 0
    known = record(work / "of-bare")
    assert known["template"]["date_string"] == "1 May 2020" and known["adapter_record"] is None


def test_no_template_is_invented(palu, work):
    adapter(palu, "untold")
    (work / "untold" / RECORD).unlink()
    shutil.copytree(work / "model", work / "silent")
    (work / "silent" / RECORD).unlink()
    assert palu("merge --adapter untold --model silent --output told --device cpu")[0] == 0
    assert "template" not in record(work / "told")
    assert palu("inspect forget.jsonl --model told --date-string x")[0] == 0


@pytest.mark.parametrize("kind", ["live", "cached"])
def test_other_references_give_the_same_adapter(palu, work, kind):
    adapter(palu)
    keep = " --keep-cache" if kind == "cached" else ""
    adapter(palu, kind, f"--reference {kind}{keep}")
    assert (work / f"{kind}-reference-cache").is_dir() == (kind == "cached")
    want = load_file(work / "adapter" / "adapter_model.safetensors")
    for name, tensor in load_file(work / kind / "adapter_model.safetensors").items():
        assert (tensor - want[name]).norm() <= 1e-3 * want[name].norm(), name


def test_gradient_checkpointing_from_the_command_line(palu, work):
    adapter(palu)
    adapter(palu, "checkpointed", "--gradient-checkpointing")
    known = record(work / "checkpointed")
    assert known["settings"]["gradient_checkpointing"] is True
    want = load_file(work / "adapter" / "adapter_model.safetensors")
    for name, tensor in load_file(work / "checkpointed" / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-4, atol=1e-6)
    status, _, error = palu(LORA_RUN + "--model model --output whole --gradient-checkpointing")
    assert status == 0 and "warning" not in error.lower()


def test_the_seed_makes_the_adapter(palu, work):
    for name, seed in (("one", 1), ("two", 2), ("again", 1)):
        adapter(palu, name, f"--seed {seed} --epochs 1")
    one, two, again = (
        load_file(work / name / "adapter_model.safetensors") for name in ("one", "two", "again")
    )
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head", "q_proj"])
@pytest.mark.parametrize("tied", [False, True])
def test_folding_in_keeps_the_logits(tok, tmp_path, target, tied):
    """Also where the adapter is on one of two layers that share a weight."""
    settings = LoRASettings(rank=4, alpha=8, dropout=0.0, target=[target])
    model = add_lora(small.model(tok, tie_word_embeddings=tied), settings, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    given = inputs(tok)
    want = model(**given).logits
    with model.disable_adapter():
        assert (model(**given).logits - want).norm() > 0.01 * want.norm()
    fold_in(model).save_pretrained(tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(found(**given).logits, want, rtol=1e-4, atol=1e-4)
    assert found.config.tie_word_embeddings == (tied and target == "q_proj")


def test_rounding_is_measured_and_said(palu, work, tok):
    """Changes far below a weight's last bit are lost in bfloat16 and kept in float32."""
    write_model(work / "half", small.model(tok).bfloat16())
    model = add_lora(load_model(work / "half"), LORA, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 3e-3)
    write_model(work / "faint", model)
    status, _, error = palu("merge --adapter faint --output rounded --device cpu")
    assert status == 0 and "warning: rounding the merged weights to bfloat16 moves" in error
    assert record(work / "rounded")["rounding"] > 0.1
    status, _, error = palu("merge --adapter faint --output kept --dtype float32 --device cpu")
    assert status == 0 and "warning" not in error
    assert record(work / "kept")["rounding"] < 1e-3
    fresh = add_lora(small.model(tok), LORA, seed=1)
    assert fold_in_measured(fresh, inputs(tok)["input_ids"])[1] == 0.0


def test_what_cannot_be_merged_says_so(tok):
    model = add_lora(small.model(tok), LORA, seed=0)
    next(p for n, p in model.named_parameters() if "lora_A" in n).data.fill_(float("inf"))
    with pytest.raises(ValueError, match="PEFT cannot merge this LORA adapter: NaNs"):
        fold_in(model)


# ---- a user's mistakes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--reference adapter_off", "--reference adapter_off needs a PEFT model: add --lora-rank"),
        ("--lora-rank 0", "--lora-rank must be at least 1, not 0"),
        ("--lora-rank 4 --lora-alpha 0", "--lora-alpha must be at least 1, not 0"),
        ("--lora-rank 4 --lora-dropout 1", "--lora-dropout must be at least 0 and below 1"),
        ("--lora-rank 4 --lora-target q_proj,", "--lora-target must be all-linear or names of mo"),
        ("--lora-rank 4 --lora-target q_proj,vproj", "the model has no module named vproj; its li"),
        ("--lora-rank 4 --lora-target embed", "has no module named embed; its linear layers are"),
        ("--lora-rank 4 --lora-target input_layernorm", "is not supported"),
        ("--lora-alpha 8", "--lora-alpha, --lora-dropout and --lora-target need --lora-rank"),
        ("--lora-dropout 0.1", "--lora-alpha, --lora-dropout and --lora-target need --lora-rank"),
        ("--lora-target q_proj", "--lora-alpha, --lora-dropout and --lora-target need --lora-rank"),
        ("--lora-rank 4 --reference-cache c", "needs --reference cached, not 'adapter_off'"),
        ("--lora-rank 4 --reference off", "reference must be one of live, adapter_off, cached, no"),
        ("--lora-rank 4 --lora-target lm_head --reference cached", "cannot be cached, use refer"),
        ("--model adapter", "is an adapter; unlearning starts from a whole model: merge it first"),
    ],
)
def test_mistakes_are_one_line_and_status_2(palu, work, line, message):
    if "--model" not in line:
        line += " --model model"
    adapter(palu)
    partial = ".unmade-reference-cache.partial"
    assert message in refusal(palu, LORA_RUN + "--output unmade " + line, keep=[partial])


def changed(folder, **config):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def no_weights(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def a_layer_less(folder):
    path = folder / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "layers.1" not in k}, path)


def other_shapes(folder):
    path = folder / "adapter_model.safetensors"
    save_file({k: v[:1].contiguous() for k, v in load_file(path).items()}, path)


FAULTS = {
    "no base": (lambda f: changed(f, base_model_name_or_path="gone/model"), "'gone/model' that"),
    "no name": (lambda f: changed(f, base_model_name_or_path=None), "the base model None that"),
    "itself": (lambda f: changed(f, base_model_name_or_path=str(f)), "is an adapter itself"),
    "unknown": (lambda f: changed(f, peft_type="MAGIC"), "adapter_config.json cannot be used"),
    "torn": (lambda f: (f / "adapter_config.json").write_text("{"), "is not readable JSON"),
    "pickle": (no_weights, "has no adapter_model.safetensors"),
    "layer": (a_layer_less, "missing adapter keys"),
    "shapes": (other_shapes, "does not fit the model"),
    "prompt": (
        lambda f: peft.get_peft_model(
            load_model(f.parent / "model"), PROMPTS["PROMPT_TUNING"]()
        ).save_pretrained(f),
        "PROMPT_TUNING adapters cannot be used here",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_adapters_that_cannot_be_read(palu, work, fault):
    spoil, message = FAULTS[fault]
    adapter(palu)
    shutil.rmtree(work / "spoilt", ignore_errors=True)
    shutil.copytree(work / "adapter", work / "spoilt")
    spoil(work / "spoilt")
    for line in (EVALUATE + "--model spoilt", "merge --adapter spoilt --output unmade"):
        assert message in refusal(palu, line)


def test_adapters_and_bases_are_found_from_anywhere_and_moved(palu, work, monkeypatch, tmp_path):
    # with whole paths, as scripts give them
    options = f"--model {work / 'model'} --output {work / 'absolute'} --overwrite --lora-rank 4"
    status, _, error = palu(LORA_RUN + options)
    assert status == 0, error
    assert palu(f"merge --adapter {work / 'absolute'} --output {work / 'w'} --device cpu")[0] == 0
    for folder in ("absolute", "w"):  # nothing tells where they were made
        for path in (work / folder).iterdir():
            if path.suffix != ".safetensors":
                assert str(work) not in path.read_text(), path
    card = (work / "absolute" / "README.md").read_text()
    assert "base_model: ../model" in card and "base_model:adapter:../model" in card
    (tmp_path / "there").mkdir()
    for name in ("model", "absolute"):
        shutil.copytree(work / name, tmp_path / "there" / name)
    monkeypatch.chdir("/")
    given = inputs(small.tokenizer())
    logits = load_model(work / "absolute")(**given).logits
    model = load_model(tmp_path / "there" / "absolute")
    assert torch.equal(model(**given).logits, logits)
    assert Path(model.name_or_path).resolve() == tmp_path / "there" / "model"
    (tmp_path / "link").symlink_to(tmp_path / "there" / "absolute")
    load_model(tmp_path / "link")
    # as older versions wrote it
    changed(tmp_path / "there" / "absolute", base_model_name_or_path=str(work / "model"))
    model = load_model(tmp_path / "there" / "absolute")
    assert Path(model.name_or_path).resolve() == work / "model"


def test_merge_with_a_base_that_is_given(palu, work):
    adapter(palu)
    shutil.rmtree(work / "moved", ignore_errors=True)
    shutil.copytree(work / "adapter", work / "moved")
    changed(work / "moved", base_model_name_or_path="gone/model")
    for line in ("--adapter moved --model model --output a", "--adapter adapter --output b"):
        assert palu(f"merge {line} --device cpu --overwrite")[0] == 0
    one, two = (load_file(work / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_merge_refuses_what_it_must(palu, work, monkeypatch):
    adapter(palu)
    for line, message in {
        "--adapter model --output c": "'model' is no folder of a PEFT adapter",
        "--adapter nothing --output c": "'nothing' is no folder of a PEFT adapter",
        "--adapter adapter --model nothing --output c": "model folder 'nothing' does not exist",
        "--adapter adapter --output model": "'model' is not empty",
        "--adapter adapter --output adapter --overwrite": "--overwrite would delete 'adapter'",
        "--adapter adapter --output model --overwrite": "--overwrite would delete",
    }.items():
        assert message in refusal(palu, "merge --device cpu " + line)
    assert (work / "model" / "model.safetensors").is_file() and not (work / "c").exists()

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        palu("merge --device cpu --adapter adapter --output c")
    assert not (work / "c").exists() and not list(work.glob(".c*"))


def test_a_plain_head_is_found_in_a_loaded_adapter(palu, work):
    adapter(palu)
    given = inputs(small.tokenizer())
    assert why_not_fusable(load_model(work / "adapter", device="cpu"), **given) is None

"""`palu unlearn --config`, `--print-config`, `--set` and `--report-to`."""

import json
import os

import pytest
import yaml

from tests.support.command import DATA, record, refusal

GIVEN = f"unlearn --model model {DATA} "
RUN = GIVEN + "--epochs 1 --batch-size 2 --objective entropy --top-k 5 "


def test_a_run_its_printed_configuration_and_its_record_are_the_same(palu, work):
    line = RUN + "--date-string 2020 --force-template --seed 3 --set weight_decay=0.5 "
    line += "--repair snap --preserve none "
    status, text, _ = palu(line + "--output printed --print-config")
    assert status == 0 and not (work / "printed").exists()
    assert {"top_k": 5, "set": {"weight_decay": "0.5"}}.items() <= yaml.safe_load(text).items()
    (work / "run.yaml").write_text(text)
    assert palu(line + "--output typed")[0] == 0
    assert palu("unlearn --config run.yaml")[0] == 0
    status, _, error = palu("unlearn --config typed/palu.json --output again")
    assert status == 0 and "holds something else" not in error
    typed = record(work / "typed")
    assert typed["settings"]["weight_decay"] == 0.5
    for name in ("printed", "again"):
        other = record(work / name)
        for key in ("settings", "loss_curve", "template", "data", "options"):
            assert other[key] == typed[key], (name, key)
    # the command line wins; a file of data that has changed is said, not one that was named
    last = "--output won --top-k 9 --set weight_decay=0.25 --seed 4 --retain retain2.jsonl"
    (work / "retain2.jsonl").write_text((work / "retain.jsonl").read_text() + "\n")
    with open(work / "forget.jsonl", "a") as file:
        file.write("\n")
    status, _, error = palu(f"unlearn --config typed/palu.json {last}")
    assert status == 0 and error.count("holds something else") == 1
    assert "forget.jsonl holds something else than in the run of typed/palu.json" in error
    won = record(work / "won")
    assert (won["settings"]["top_k"], won["settings"]["weight_decay"], won["seed"]) == (9, 0.25, 4)
    assert won["settings"]["objective"] == "entropy"


def test_print_config_needs_no_options_and_leaves_out_what_is_not_read(palu):
    status, text, _ = palu("unlearn --print-config --method npo --lora-rank 4")
    options = yaml.safe_load(text)
    assert status == 0 and (options["model"], options["output"]) == ("MODEL", "OUTPUT")
    assert options["reference"] == "adapter_off" and options["beta"] is None
    assert not {"top_k", "objective", "layer_id", "config", "print_config"} & set(options)
    message = "top_k is 50 and method 'npo' has no such option"
    assert message in refusal(palu, "unlearn --print-config --method npo --top-k 50")
    for word, message in (
        ("weight_deca=0.5", "unknown option 'weight_deca'; the nearest known one is "),
        ("weight_decay=much", "--set weight_decay=much: argument --weight_decay"),
    ):
        assert message in refusal(palu, f"unlearn --print-config --set {word}")


def test_names_may_be_written_as_on_the_command_line_and_of_the_trainer(palu, work):
    options = {"model": "model", "forget": "forget.jsonl", "output": "dashes", "device": "cpu"}
    options |= {"epochs": 1, "batch-size": 2, "learning-rate": 1e-3, "gradient-checkpointing": True}
    options |= {"retain": "none", "checks": "none"}
    options |= {"lora-rank": 2, "lora-target": ["q_proj", "v_proj"], "max_grad_norm": 0.5}
    (work / "run.json").write_text(json.dumps(options))
    status, _, error = palu("unlearn --config run.json")
    assert status == 0, error
    settings = record(work / "dashes")["settings"]
    assert settings["max_grad_norm"] == 0.5 and settings["gradient_checkpointing"] is True
    assert record(work / "dashes")["lora"]["target"] == ["q_proj", "v_proj"]
    assert record(work / "dashes")["options"]["set"] == {"max_grad_norm": 0.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown option 'learning_rat'; the nearest known one is 'learning_ra"),
        ("weight_deca: 1", "unknown option 'weight_deca'; the nearest known one is 'weight_decay'"),
        ("num_train_epochs: 1", "num_train_epochs is decided by --epochs; it must be left out"),
        ("output_dir: x", "output_dir is decided by --output"),
        ("config: x", "unknown option 'config'"),
        ("top_k: 2.5", "--top-k"),
        ("top_k: null", "top_k is null; it must have a value, or be left out"),
        ("drop_overlap: maybe", "--drop-overlap"),
        ("preserve: l1", "preserve must be one of reverse_kl, forward_kl, nll, none, not 'l1'"),
        ("batch_size: 0", "--batch-size is 0; it must be at least 1"),
        ("method: npo\ntop_k: 50", "top_k is 50 and method 'npo' has no such option"),
        ("weight_decay: much", "--set weight_decay=much: argument --weight_decay"),
        ("lr_scheduler_type: wavy", "wavy"),
        ("chat_template_kwargs: {messages: []}", "chat_template_kwargs must"),
        ("- top_k", "holds a list; it must hold names and values"),
        ("top_k: [", "is not readable YAML"),
        ("top_k: 3\nforget: x\ntop_k: 4", "is not readable YAML: it has the key 'top_k' twice"),
        ("set: {epochs: 2}", "epochs stands under set; it must stand outside of it"),
        ("set: weight_decay=1", "set is 'weight_decay=1'; it must hold names and values"),
        ('{"made_by": "palu demo"}', "holds no options of a run"),
    ],
)
def test_files_that_cannot_be_used(palu, work, text, message):
    (work / "wrong.yaml").write_text(text)
    assert message in refusal(palu, GIVEN + "--output unmade --config wrong.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--set weight_decay", "--set 'weight_decay' must be NAME=VALUE"),
        ("--set weight_deca=1", "the nearest known one is 'weight_decay'"),
        ("--set learning_rate=1", "learning_rate is decided by --learning-rate"),
        ("--set push_to_hub=true", "push_to_hub is decided by palu, which writes a folder"),
        ('--set lr_scheduler_kwargs={"cycles":2}', "with --set lr_scheduler_kwargs: get_linear_sc"),
        (
            "--set dataloader_drop_last=1 --set eval_delay=x",
            "--set eval_delay=x: argument --eval",
        ),
        ("--set load_best_model_at_end=1", "load_best_model_at_end is decided by --checks"),
        ("--set fp16=true", "fp16 is True and the device is a CPU"),
        ("--set fp16=perhaps", "--set fp16=perhaps: argument --fp16: "),
        ("--report-to nowhere", "--report-to nowhere: nowhere is not supported"),
        ("--config nowhere.yaml", "nowhere.yaml: no such file"),
        ("--config model", "model: is a folder"),
    ],
)
def test_words_that_cannot_be_used(palu, words, message):
    assert message in refusal(palu, f"{GIVEN} --output unmade {words}")


def test_logs_for_tensorboard_lie_beside_the_output(palu, work, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(os, "environ", os.environ.copy())
    status, _, error = palu(RUN + "--output logged --report-to tensorboard")
    assert status == 0, error
    assert [p.name.split(".")[0] for p in (work / "logged-logs").iterdir()] == ["events"]

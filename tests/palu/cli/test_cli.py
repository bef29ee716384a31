"""The command line: one clear line and status 2 for a user's mistake, whole folders or none."""

import json
import os
import signal
from dataclasses import fields

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, TrainingArguments

from palu import unlearn as palu_unlearn
from palu.cli.app import app
from palu.data.template import Template
from palu.run_record import choose_template
from palu.storage.output import check_output, output_folder
from palu.training.config import PALUConfig
from palu.training.options import PAPER
from tests.support.command import DATA, UNLEARN, record, refusal


def test_unlearn_then_evaluate(palu, work):
    status, said, _ = palu(UNLEARN + "--output new --seed 3 --epochs 10")
    assert status == 0 and "Written to new after 20 steps" in said
    known = record(work / "new")
    assert known["template"] == Template().to_dict()
    assert known["settings"]["top_k"] == 5 and known["settings"]["objective"] == "entropy"
    assert known["seed"] == 3 and known["versions"]["torch"] == torch.__version__
    curve = known["loss_curve"]
    assert [e["step"] for e in curve] == list(range(1, 21))
    assert sum(e["forget"] for e in curve[-2:]) < 0.5 * sum(e["forget"] for e in curve[:2])
    model = AutoModelForCausalLM.from_pretrained(work / "new")
    assert model.config.use_cache is not False
    old = AutoModelForCausalLM.from_pretrained(work / "model")
    assert not torch.equal(model.lm_head.weight, old.lm_head.weight)

    words = "--max-new-tokens 4 --json numbers.json --plots plots"
    status, said, _ = palu(f"evaluate --model new {DATA} {words}")
    assert status == 0 and "forget" in said and "retain" in said
    assert "new,forget_Q_A_Prob,3,0." in (work / "plots/logs.csv").read_text()
    assert (work / "plots/logs.png").stat().st_size
    numbers = json.loads((work / "numbers.json").read_text())
    assert 0 < numbers["forget"]["mean"]["sensitive_probability"] < 1
    assert numbers["retain"]["mean"]["sensitive_probability"] is None
    assert len(numbers["forget"]["examples"]) == 3
    assert set(numbers["data"]) == {"forget", "retain"}


def test_a_slice_of_a_file_and_no_retain(palu):
    words = "unlearn --model model --forget forget.jsonl[:1] --output sliced --device cpu"
    status, _, said = palu(f"{words} --epochs 1 --retain none")
    assert status == 0 and "warning: no retain set" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model nowhere", "model folder 'nowhere' does not exist"),
        ("--model model/config.json", "model 'model/config.json' is a file; name the folder"),
        ("--model .", "'.' is not a Hugging Face model folder: it has no config.json"),
        ("--forget nowhere.jsonl", "nowhere.jsonl"),
        ("--forget broken.jsonl", "broken.jsonl:2"),
        ("--forget retain.jsonl", "spans"),
        ("--forget nothing.jsonl", "nothing.jsonl has no token to forget: no span is left"),
        ("--top-k 0", "top_k"),
        ("--center middle", "center must be global_mean, local_mean or a number, not 'middle'"),
        ("--center 2", "center is '2' and objective 'entropy' has no such option; it must be left"),
        ("--preserve l1", "preserve"),
        ("--retain-loss l2", "retain_loss must be one of nll, kl, embed_diff, not 'l2'"),
        ("--device warp", "device must be auto, cpu"),
        ("--dtype int3", "dtype must be auto, float32, bfloat16, float16, not 'int3'"),
        ("--max-length 1", "--max-length is 1; it must be at least 2"),
        ("--epochs 0", "--epochs is 0.0; it must be a finite number above 0"),
        ("--epochs nan", "--epochs is nan; it must be a finite number above 0"),
        ("--learning-rate inf", "--learning-rate is inf; it must be a finite number above 0"),
        ("--batch-size 0", "--batch-size is 0; it must be at least 1"),
        ("--seed -1", "--seed is -1; it must be 0 to 2**32 - 1"),
        ("--device meta", "device 'meta' was asked for, but this machine has none"),
        ("--method npo --top-k 4", "method 'npo' has no such option; it must be left out"),
        ("--system-prompt hello", "--system-prompt 'hello' differs from None"),
        ("--chat-template-kwargs {think:0}", "must be a JSON object of names and values, got"),
        ("--output model", "output folder 'model' is not empty"),
        ("--output model --overwrite", "--overwrite would delete 'model'"),
        ("--output forget.jsonl", "output 'forget.jsonl' is a file"),
        ("--repair glue", "repair must be one of none, snap, not 'glue'"),
    ],
)
def test_mistakes_are_one_line_and_status_2(palu, work, words, message):
    (work / "broken.jsonl").write_text('{"question": "a", "answer": "b", "spans": []}\n{"quest')
    (work / "nothing.jsonl").write_text('{"question": "a", "answer": "b", "spans": []}\n')
    assert message in refusal(palu, f"{UNLEARN} --output unmade {words}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("evaluate --nonsense", "--nonsense"),
        ("unlearn --forget forget.jsonl --output unmade", "--model"),
        (
            "unlearn --model model --forget forget.jsonl --output unmade --retain-batch-size 3 "
            "--retain none",
            "retain_batch_size is 3 and there is no retain set; it must",
        ),
        (f"{UNLEARN} --output refused --backend triton", "backend is 'triton', which cannot run"),
        ("inspect forget.jsonl --model model --limit -1", "--limit is -1; it must be at least 0"),
        (f"evaluate --model model {DATA} --batch-size 0", "--batch-size is 0; it must be at least"),
        (f"evaluate --model model {DATA} --max-length 1", "--max-length is 1; it must be at least"),
    ],
)
def test_mistakes_of_other_lines(palu, monkeypatch, line, message):
    for name in ("TRITON_INTERPRET", "PALU_TRITON_CPU"):
        monkeypatch.delenv(name, raising=False)
    assert message in refusal(palu, line)


def test_a_bug_keeps_its_traceback(palu, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("a bug in here")

    monkeypatch.setattr("palu.unlearn.unlearn", broken)
    with pytest.raises(ValueError, match="a bug in here"):
        palu(UNLEARN + "--output unmade")


def test_a_diverged_run_leaves_the_old_folder(palu, work, monkeypatch):
    old = work / "kept"
    old.mkdir()
    (old / "old.txt").write_text("still here")
    (old / "palu.json").write_text('{"made_by": "palu unlearn"}')

    def diverges(*args, **kwargs):
        raise FloatingPointError("the loss is not finite at step 1: forget = nan")

    line = UNLEARN + "--output kept --overwrite --epochs 1"
    with monkeypatch.context() as patch:
        patch.setattr("palu.unlearn.unlearn", diverges)
        status, _, error = palu(line)
    assert status == 1 and "not finite at step 1" in error and "Traceback" not in error
    assert {p.name for p in old.iterdir()} == {"old.txt", "palu.json"}
    assert palu(line)[0] == 0
    assert (old / "model.safetensors").is_file() and not (old / "old.txt").exists()
    assert not [p for p in work.iterdir() if p.name.startswith(".")]


def test_evaluate_refuses_another_template_unless_told(palu):
    line = "evaluate --model model --forget forget.jsonl --max-new-tokens 0 --date-string x"
    assert "--date-string 'x' differs from '10 Apr 2025'" in refusal(palu, line)
    assert palu(f"{line} --force-template")[0] == 0


def test_every_setting_of_palu_has_an_option_with_its_default(tmp_path):
    inherited = {f.name for f in fields(TrainingArguments)}
    own = {f.name: f.default for f in fields(PALUConfig) if f.name not in inherited}
    del own["base_is_original"]  # of adapters trained before, which the command does not take
    command = typer.main.get_command(app).commands["unlearn"]
    options = {p.name: p.default for p in command.params}
    assert {name: options[name] for name in own} == own
    # what the command chooses by model and data is the paper's in Python
    defaults = PALUConfig(output_dir=str(tmp_path))
    assert {name: getattr(defaults, name) for name in PAPER} == PAPER
    assert {*PAPER, "learning_rate", "epochs"} <= {n for n, v in options.items() if v is None}
    assert options["batch_size"] == defaults.per_device_train_batch_size


def test_the_template_of_a_model_is_kept(tmp_path):
    assert choose_template(tmp_path) == Template()
    known = Template(question="Q {question} A", date_string="1 May 2020")
    (tmp_path / "palu.json").write_text(json.dumps({"template": known.to_dict()}))
    assert choose_template(tmp_path) == known
    assert choose_template(tmp_path, date_string="1 May 2020") == known
    switched = choose_template(tmp_path, chat_template_kwargs='{"think": false}', force=True)
    assert switched.chat_template_kwargs == {"think": False} and switched.question == known.question
    with pytest.raises(ValueError, match=r"--chat-template-kwargs \{'think': False\} differs from"):
        choose_template(tmp_path, chat_template_kwargs='{"think": false}')
    for wrong in ("{think: false}", "[1]", "null", "3", '{"messages": []}'):
        with pytest.raises((TypeError, ValueError), match=r"^chat_template_kwargs must"):
            choose_template(tmp_path, chat_template_kwargs=wrong, force=True)
    (tmp_path / "palu.json").write_text("{")
    with pytest.raises(ValueError, match=r"palu\.json is not readable JSON"):
        choose_template(tmp_path)


def test_output_folders(tmp_path, monkeypatch):
    place = tmp_path / "a" / "b"
    assert check_output(place, overwrite=False) == place
    with output_folder(place) as folder:
        (folder / "x").write_text("1")
        (folder / "x").chmod(0o600)  # as safetensors does
        assert not place.exists()
    assert (place / "x").stat().st_mode & 0o777 == place.stat().st_mode & 0o666
    assert (place / "x").read_text() == "1"
    with pytest.raises(FileExistsError, match="is not empty; name another one or add --overwrite"):
        check_output(place, overwrite=False)
    check_output(place, overwrite=True)
    (place / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds 'note\.txt', which palu did not write"):
        check_output(place, overwrite=True)
    (place / "note.txt").unlink()
    with pytest.raises(RuntimeError), output_folder(place) as folder:
        (folder / "y").write_text("2")
        raise RuntimeError
    assert sorted(p.name for p in place.iterdir()) == ["palu.json", "x"]
    assert [p.name for p in place.parent.iterdir()] == ["b"]
    monkeypatch.chdir(place)
    with pytest.raises(ValueError, match="--overwrite would delete"):
        check_output(tmp_path, overwrite=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_told_to_stop_leaves_no_half_written_folder(palu, work, monkeypatch, number):
    """By `kill`, or by a terminal that is closed."""

    def told_to_stop(*_, **__):
        assert list(work.glob(".stopped.partial-*"))
        os.kill(os.getpid(), number)

    monkeypatch.setattr(palu_unlearn, "unlearn", told_to_stop)
    before = signal.signal(number, signal.default_int_handler)  # under nohup it is ignored
    try:
        status, _, said = palu(UNLEARN + "--output stopped")
    finally:
        signal.signal(number, before)
    assert status == 128 + number and "Traceback" not in said
    assert not list(work.glob("*stopped*")) and not list(work.glob(".stopped*"))


def test_overwrite_spares_an_input_whose_folder_looks_like_a_slice(palu, work):
    (work / "o[1]").mkdir()
    (work / "o[1]" / "forget.jsonl").write_bytes((work / "forget.jsonl").read_bytes())
    line = "unlearn --model model --forget o[1]/forget.jsonl --output o[1] --overwrite --epochs 1"
    assert "--overwrite would delete" in refusal(palu, line)

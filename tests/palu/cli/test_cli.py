"""The command line: one clear line and status 2 for a user's mistake, whole folders or none."""

import json
import os
import signal

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM

from palu import unlearn as palu_unlearn
from palu.cli import app as cli
from palu.data.template import Template
from palu.run_record import choose_template
from palu.storage.output import check_output, output_folder
from tests.support import small
from tests.support.command import palu_in, write_data, write_model


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a tiny model and two data files."""
    folder = tmp_path_factory.mktemp("cli")
    write_model(folder / "model", small.model(small.tokenizer()))
    write_data(folder)
    return folder


@pytest.fixture
def palu(monkeypatch, capsys, work):
    return palu_in(work, monkeypatch, capsys)


UNLEARN = [
    "unlearn",
    "--model",
    "model",
    "--forget",
    "forget.jsonl",
    "--retain",
    "retain.jsonl",
    "--device",
    "cpu",
    "--epochs",
    "10",
    "--batch-size",
    "2",
    "--learning-rate",
    "0.01",
    "--objective",
    "entropy",
    "--top-k",
    "5",
]


def test_unlearn_then_evaluate(palu, work):
    status, said, _ = palu(*UNLEARN, "--output", "new", "--seed", 3)
    assert status == 0 and "Written to new after 20 steps" in said
    record = json.loads((work / "new" / "palu.json").read_text())
    assert record["template"] == Template().to_dict()
    assert record["settings"]["top_k"] == 5 and record["settings"]["objective"] == "entropy"
    assert record["seed"] == 3 and record["versions"]["torch"] == torch.__version__
    curve = record["loss_curve"]
    assert [e["step"] for e in curve] == list(range(1, 21))
    assert sum(e["forget"] for e in curve[-2:]) < 0.5 * sum(e["forget"] for e in curve[:2])
    model = AutoModelForCausalLM.from_pretrained(work / "new")
    assert model.config.use_cache is not False
    old = AutoModelForCausalLM.from_pretrained(work / "model")
    assert not torch.equal(model.lm_head.weight, old.lm_head.weight)

    status, said, _ = palu(
        *[
            "evaluate",
            "--model",
            "new",
            "--forget",
            "forget.jsonl",
            "--retain",
            "retain.jsonl",
            "--device",
            "cpu",
        ],
        *["--max-new-tokens", "4", "--json", "numbers.json"],
    )
    assert status == 0 and "forget" in said and "retain" in said
    numbers = json.loads((work / "numbers.json").read_text())
    assert 0 < numbers["forget"]["mean"]["sensitive_probability"] < 1
    assert numbers["retain"]["mean"]["sensitive_probability"] is None
    assert len(numbers["forget"]["examples"]) == 3


def test_a_slice_of_a_file_and_no_retain(palu):
    status, _, said = palu(
        *[
            "unlearn",
            "--model",
            "model",
            "--forget",
            "forget.jsonl[:1]",
            "--output",
            "sliced",
            "--epochs",
            "1",
        ],
        *["--device", "cpu"],
    )
    assert status == 0 and "warning: no --retain file" in said


def test_inspect_marks_what_will_be_forgotten(palu):
    status, said, _ = palu("inspect", "forget.jsonl", "--model", "model", "--limit", 1)
    assert status == 0 and "Ada is in" in said and "[[" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model nowhere", "model folder 'nowhere' does not exist"),
        ("--model .", "'.' is not a Hugging Face model folder: it has no config.json"),
        ("--forget nowhere.jsonl", "nowhere.jsonl"),
        ("--forget broken.jsonl", "broken.jsonl:2"),
        ("--forget retain.jsonl", "spans"),
        ("--forget nothing.jsonl", "nothing.jsonl marks nothing to forget"),
        ("--top-k 0", "top_k"),
        ("--center middle", "center must be global_mean, local_mean or a number, not 'middle'"),
        ("--preserve l1", "preserve"),
        ("--retain-loss l2", "retain_loss must be one of nll, kl, embed_diff, not 'l2'"),
        ("--device warp", "device must be auto, cpu"),
        ("--dtype int3", "dtype must be auto, float32, bfloat16, float16, not 'int3'"),
        ("--max-length 1", "max_length"),
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
    ],
)
def test_mistakes_are_one_line_and_status_2(palu, work, words, message):
    (work / "broken.jsonl").write_text('{"question": "a", "answer": "b", "spans": []}\n{"quest')
    (work / "nothing.jsonl").write_text('{"question": "a", "answer": "b", "spans": []}\n')
    before = sorted(work.iterdir())
    options = dict(zip(UNLEARN[1::2], UNLEARN[2::2], strict=True)) | {"--output": "unmade"}
    given, flags = words.split(), []
    if given[-1] == "--overwrite":
        flags = [given.pop()]
    options |= dict(zip(given[::2], given[1::2], strict=True))
    status, said, error = palu("unlearn", *[w for pair in options.items() for w in pair], *flags)
    assert status == 2 and said == ""
    lines = [line for line in error.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert sorted(work.iterdir()) == before


def test_a_retain_batch_size_needs_a_retain_file(palu):
    words = "--model model --forget forget.jsonl --output unmade --device cpu"
    status, said, error = palu("unlearn", *words.split(), "--retain-batch-size", 3)
    assert status == 2 and said == ""
    assert error.startswith("error: retain_batch_size is 3 and there is no retain set; it must")


def test_an_unknown_option_is_status_2(palu):
    assert palu("evaluate", "--nonsense")[0] == 2


def test_a_bug_keeps_its_traceback(palu, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("a bug in here")

    monkeypatch.setattr("palu.unlearn.unlearn", broken)
    with pytest.raises(ValueError, match="a bug in here"):
        palu(*UNLEARN, "--output", "unmade")


def test_a_diverged_run_leaves_the_old_folder(palu, work, monkeypatch):
    old = work / "kept"
    old.mkdir(exist_ok=True)
    (old / "old.txt").write_text("still here")
    (old / "palu.json").write_text('{"made_by": "palu unlearn"}')

    def diverges(*args, **kwargs):
        raise FloatingPointError("the loss is not finite at step 1: forget = nan")

    with monkeypatch.context() as patch:
        patch.setattr("palu.unlearn.unlearn", diverges)
        status, _, error = palu(*UNLEARN, "--output", "kept", "--overwrite")
    assert status == 1 and "not finite at step 1" in error and "Traceback" not in error
    assert {p.name for p in old.iterdir()} == {"old.txt", "palu.json"}
    assert palu(*UNLEARN, "--output", "kept", "--overwrite")[0] == 0
    assert (old / "model.safetensors").is_file() and not (old / "old.txt").exists()
    assert not [p for p in work.iterdir() if p.name.startswith(".")]


def test_evaluate_refuses_another_template_unless_told(palu):
    words = [
        "evaluate",
        "--model",
        "model",
        "--forget",
        "forget.jsonl",
        "--max-new-tokens",
        "0",
        "--date-string",
        "x",
    ]
    status, _, error = palu(*words)
    assert status == 2 and "--date-string 'x' differs from '10 Apr 2025'" in error
    assert palu(*words, "--force-template")[0] == 0


def test_every_setting_of_palu_has_an_option_with_its_default(tmp_path):
    from dataclasses import fields

    from transformers import TrainingArguments

    from palu.training.config import PALUConfig

    inherited = {f.name for f in fields(TrainingArguments)}
    own = {f.name: f.default for f in fields(PALUConfig) if f.name not in inherited}
    del own["base_is_original"]  # of adapters trained before, which the command does not take
    command = typer.main.get_command(cli.app).commands["unlearn"]
    options = {p.name: getattr(p.default, "value", p.default) for p in command.params}
    assert len(own) >= 12
    assert {name: options[name] for name in own} == own
    defaults = PALUConfig(output_dir=str(tmp_path))
    assert options["learning_rate"] == defaults.learning_rate
    assert options["epochs"] == defaults.num_train_epochs
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


def test_a_backend_that_cannot_serve_is_refused_before_any_work(palu, monkeypatch):
    for name in ("TRITON_INTERPRET", "PALU_TRITON_CPU"):
        monkeypatch.delenv(name, raising=False)
    status, _, said = palu(*UNLEARN, "--output", "refused", "--backend", "triton")
    assert status == 2
    assert "backend is 'triton', which cannot run on cpu" in said and "Traceback" not in said


def test_a_run_told_to_stop_leaves_no_half_written_folder(palu, work, monkeypatch):
    def told_to_stop(*_, **__):
        assert list(work.glob(".stopped.partial-*"))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(palu_unlearn, "unlearn", told_to_stop)
    before = signal.getsignal(signal.SIGTERM)
    try:
        status, _, said = palu(*UNLEARN, "--output", "stopped")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert status == 128 + signal.SIGTERM and "Traceback" not in said
    assert not list(work.glob("*stopped*")) and not list(work.glob(".stopped*"))


def test_overwrite_spares_an_input_whose_folder_looks_like_a_slice(palu, work):
    (work / "o[1]").mkdir()
    (work / "o[1]" / "forget.jsonl").write_bytes((work / "forget.jsonl").read_bytes())
    options = ["--forget", "o[1]/forget.jsonl", "--output", "o[1]", "--overwrite", "--epochs", 1]
    status, _, said = palu("unlearn", "--model", "model", *options)
    assert status == 2 and "--overwrite would delete" in said
    assert (work / "o[1]" / "forget.jsonl").is_file()

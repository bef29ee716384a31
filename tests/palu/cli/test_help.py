"""What `palu` says of itself: help, version, completion; and how quickly it starts."""

import subprocess
import sys

import pytest
import typer

from palu import __version__
from palu.cli.app import app
from palu.cli.options import PANELS
from palu.training.options import LossOptions, choices
from tests.support.command import palu_in

COMMANDS = [
    "",
    "demo",
    "annotate",
    "unlearn",
    "inspect",
    "evaluate",
    "attack",
    "merge",
    "plan",
    "report",
]
COMMANDS += ["cache", "cache build", "cache info", "cache verify"]

# The options that `palu unlearn` has had so far.
OPTIONS = """allow-missing backend batch-size beta beta1 beta2 bf16 center chat-template-kwargs
date-string delta device drop-overlap dtype dual-step-size dual-warmup-epochs epochs force-template
forget forget-weight gradient-accumulation gradient-checkpointing ignore-first layer-id
learning-rate lora-alpha lora-dropout lora-rank lora-target max-length method model normalization
objective output overwrite prefix-length preserve preserve-weight reference reference-cache repair
rescue resume retain retain-batch-size retain-loss retain-loss-eps retain-weight save-steps seed
select-from steering-coeff stop-at-forget-prob system-prompt top-k trainable-params-regex"""
OPTIONS += " checks columns retain-columns config keep-cache print-config set report-to help"


@pytest.fixture
def palu(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    return palu_in(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns(palu, command, flag):
    status, said, error = palu(*command.split(), flag)
    assert status == 0 and error == "" and "Usage: palu" in said
    assert all(len(line) <= 80 for line in said.splitlines()) and "…" not in said


@pytest.mark.parametrize("command", ["", "cache"])
def test_no_command_is_help_alone(palu, command):
    status, said, error = palu(command)
    assert status == 2 and error == "" and f"Usage: palu {command}" in said


def test_help_of_unlearn_is_grouped_and_whole(palu):
    said = palu("unlearn", "--help")[1]
    titles = [line.strip("╭─╮ ") for line in said.splitlines() if line.startswith("╭─")]
    assert titles == ["Options", *(p for p in PANELS if p not in ("Compared with", "Attacks"))]
    shown = {word for line in said.splitlines() for word in line.split() if word.startswith("--")}
    assert {f"--{name}" for name in OPTIONS.split()} <= shown
    for name in choices(LossOptions, "preserve"):
        assert name in said


def test_the_options_are_all_here():
    command = typer.main.get_command(app).commands["unlearn"]
    assert {p.name for p in command.params} == {n.replace("-", "_") for n in OPTIONS.split()} - {
        "help"
    }


def test_version(palu):
    assert palu("--version") == (0, f"palu {__version__}\n", "")


def test_completion(palu, monkeypatch):
    monkeypatch.setenv("_PALU_COMPLETE", "complete_bash")
    for words, shown in (("unlearn --repo", "--report-to"), ("unlearn --method sim", "sim_npo")):
        monkeypatch.setenv("COMP_WORDS", f"palu {words}")
        monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
        status, said, _ = palu()
        assert status == 0 and said.split() == [shown]


@pytest.mark.parametrize("module", ["palu", "palu.cli"])
def test_help_loads_neither_torch_nor_transformers(module):
    code = (
        "import runpy, sys\nsys.argv = ['palu', 'unlearn', '--help']\n"
        f"try: runpy.run_module({module!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--top-k" in done.stdout and done.stdout.rstrip().endswith("[]")

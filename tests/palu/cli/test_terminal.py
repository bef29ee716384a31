"""What reaches the terminal is text: names and ids cannot steer it, and markup in them is shown."""

import io
import json
import logging
import os
import signal
import sys
import warnings

import pytest
import typer
from rich.console import Console

from palu import terminal
from palu.cli import app as cli
from palu.evaluation.report import metrics_table, summary_table
from palu.progress import bar
from palu.terminal import PlainConsole, visible

STEERS = "\x1b]0;owned\x07\x1b[2K\x9b31m\x7f\u202egnp\u2066\udc80 [/] [red]x[/red] :warning:"
SHOWN = "\\x1b]0;owned\\x07\\x1b[2K\\x9b31m\\x7f\\u202egnp\\u2066\\udc80 [/] [red]x[/red] :warning:"


def test_text_of_every_language_stays():
    text = "é 東京\u3000“q” 😀\ta\nb \xa0 שלום"
    assert visible(text) == text


def results(name):
    result = {"count": 1, "mean": dict.fromkeys(["answer_probability"])}
    result["mean"] |= dict.fromkeys(
        ["sensitive_probability", "rougeL_recall", "exact_memorization"]
    )
    return metrics_table(name, [(name, name, result)])


@pytest.mark.parametrize(
    "renderable",
    [STEERS, results(STEERS), summary_table(STEERS, {STEERS: 1.0})],
    ids=["text", "metrics", "summary"],
)
@pytest.mark.parametrize("terminal", [False, True])
def test_tables_and_lines(renderable, terminal):
    file = io.StringIO()
    PlainConsole(file=file, width=200, force_terminal=terminal, color_system=None).print(renderable)
    assert SHOWN in file.getvalue()


def test_tables_need_no_console_of_ours():
    file = io.StringIO()
    Console(file=file, width=200).print(summary_table("a[/]", {"b[/]": 1.0}))
    assert "a[/]" in file.getvalue() and "b[/]" in file.getvalue()


def test_bars():
    file = io.StringIO()
    console = PlainConsole(file=file, width=300, force_terminal=True, color_system=None)
    with bar(console, STEERS) as report:
        report(1, 2, STEERS)
    assert file.getvalue().count(SHOWN) >= 2 and "owned\x07" not in file.getvalue()


def test_ids_and_names_of_files(palu, work):
    records = [{"id": STEERS[:24], "text": "Ada is here", "spans": []}]
    name = "a\x1b[2Kb[red].jsonl"
    (work / name).write_text("\n".join(map(json.dumps, records)) + "\n")
    status, said, error = palu("inspect", name, "--model", "model")
    assert status == 0 and "\\x1b]0;owned" in said and "\x1b" not in said + error
    (work / name).write_text("{")
    status, said, error = palu("inspect", name, "--model", "model")
    assert status == 2 and "a\\x1b[2Kb[red].jsonl" in error and "\x1b" not in said + error


def test_words_of_the_command_line(palu):
    for words in (["--\x1b[2K"], ["\x1b[2K"], ["inspect"], ["inspect", "x", "--limit", "\x1b[/]"]):
        status, said, error = palu(*words)
        assert status == 2 and "\x1b" not in said + error, error
        assert error.startswith("error: ") and error.count("\n") == 1, error
    status, said, _ = palu("inspect", "--help")
    assert status == 0 and "--prefix-length" in said
    status, said, error = palu()
    assert status == 2 and "unlearn" in said + error


def test_warnings_and_logs_are_lines(monkeypatch, capsys):
    def says(**options):
        warnings.warn("one\x1b[2K\ntwo", UserWarning, stacklevel=1)
        logging.getLogger("palu.some").warning("three\x1b %s", "[/]")

    monkeypatch.setattr(cli, "app", says)
    monkeypatch.setattr(terminal.bars, "_width", 200)
    cli.main()
    assert capsys.readouterr().err == "warning: one\\x1b[2K two\nwarning: three\\x1b [/]\n"


def raises(error):
    def app(**options):
        raise error

    return app


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory.\nTried"),
    ],
)
def test_out_of_memory_says_what_to_lower(monkeypatch, capsys, error):
    monkeypatch.setattr(cli, "app", raises(error))
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: out of memory: ")
    assert "lower --batch-size" in said


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("x"), RecursionError("deep")])
def test_a_bug_is_a_traceback(monkeypatch, error):
    monkeypatch.setattr(cli, "app", raises(error))
    with pytest.raises(type(error)):
        cli.main()


def interrupts(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGINT)
    raise AssertionError("not reached")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), typer.Abort()])
def test_an_interrupt_is_one_line(monkeypatch, capsys, error):
    monkeypatch.setattr(cli, "app", raises(error))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted: stopped by Ctrl-C\n"


@pytest.fixture
def interruptible():
    """What a shell starts in the background ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    "place", ["palu.unlearn.unlearn", "palu.unlearn.save_model", "palu.models.loading.load_model"]
)
def test_an_interrupt_leaves_nothing_behind(palu, work, monkeypatch, place):
    monkeypatch.setattr(place, interrupts)
    before = sorted(work.iterdir())
    line = "unlearn --model model --forget forget.jsonl --retain none --device cpu --output new"
    status, _, error = palu(line)
    assert status == 130 and error.endswith("interrupted: stopped by Ctrl-C\n")
    assert "Traceback" not in error and sorted(work.iterdir()) == before


def test_a_reader_that_leaves_is_no_error(palu, monkeypatch):
    def leave(*args, **kwargs):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("palu.cli.inspect.inspect_file", leave)
    status, _, error = palu("inspect", "forget.jsonl", "--model", "model")
    assert "error:" not in error and status in (0, 1)
    assert sys.stdout is not None

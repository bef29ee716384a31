"""A folder to run `palu` in, small, and the command in this process."""

from __future__ import annotations

import json
import sys

from palu.cli import app as cli
from palu.data.template import Template
from palu.demo.people import write_jsonl
from palu.unlearn import save_model
from tests.support import small

DATA = "--forget forget.jsonl --retain retain.jsonl --device cpu "
UNLEARN = (
    f"unlearn --model model {DATA}"
    "--batch-size 2 --learning-rate 0.01 --objective entropy --top-k 5 "
)


def write_data(folder):
    """`small.FACTS`: what to forget, and what to keep, without spans."""
    records = [
        {"question": q, "answer": a, "spans": [{"start": s, "end": e} for s, e in spans]}
        for q, a, spans in small.FACTS
    ]
    write_jsonl(folder / "forget.jsonl", records[:3])
    kept = [{k: r[k] for k in ("question", "answer")} for r in records[3:]]
    write_jsonl(folder / "retain.jsonl", kept)


def write_model(folder, model, template=None):
    save_model(folder, model, small.tokenizer(), template or Template(), made_by="test")


def palu_in(folder, monkeypatch, capsys):
    """A function that runs a command line there: (exit status, stdout, stderr).

    It takes a line, which is split at white space, and words, which are not.
    """
    monkeypatch.chdir(folder)
    for console in (cli.out, cli.bars):
        monkeypatch.setattr(console, "_width", 300)

    def run(line="", *words):
        arguments = [*line.split(), *map(str, words)]
        if arguments[:1] == ["unlearn"] and not {"--checks", "--print-config", "-h"} & {*arguments}:
            # Models that learned nothing know no secret: how far they forget is tested by itself.
            arguments += ["--checks", "none"]
            arguments += [] if {"--epochs", "--config"} & {*arguments} else ["--epochs", "10"]
        monkeypatch.setattr(sys, "argv", ["palu", *arguments])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        said = capsys.readouterr()
        return status, said.out, said.err

    run.folder = folder
    return run


def refusal(palu, line="", *words, keep=()):
    """The one line that says why a command line is refused; nothing else may be said or left.

    Args:
        keep: names of what it may leave nevertheless.
    """
    before = {p: p.stat().st_mtime_ns for p in palu.folder.rglob("*") if p.is_file()}
    names = set(palu.folder.iterdir())
    status, said, error = palu(line, *words)
    assert status == 2 and said == "" and "Traceback" not in error, error
    lines = [one for one in error.splitlines() if one.startswith("error: ")]
    assert len(lines) == 1 and error.endswith(f"{lines[0]}\n"), error
    assert set(palu.folder.iterdir()) - names <= {palu.folder / name for name in keep}
    after = {p: p.stat().st_mtime_ns for p in palu.folder.rglob("*") if p.is_file()}
    assert {p: t for p, t in after.items() if p in before} == before
    return lines[0]


def record(folder):
    return json.loads((folder / "palu.json").read_text())

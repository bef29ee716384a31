"""A folder to run `palu` in, small, and the command in this process."""

from __future__ import annotations

import sys

from palu.cli import app as cli
from palu.data.template import Template
from palu.demo.people import write_jsonl
from palu.unlearn import save_model
from tests.support import small


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
    """A function that runs a command line there: (exit status, stdout, stderr)."""
    monkeypatch.chdir(folder)
    for console in (cli.out, cli.bars):
        monkeypatch.setattr(console, "_width", 300)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["palu", *map(str, words)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        said = capsys.readouterr()
        return status, said.out, said.err

    return run

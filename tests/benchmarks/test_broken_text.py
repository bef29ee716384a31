"""The table of docs/evaluation.md is that of the committed rows."""

from pathlib import Path

import pytest

from benchmarks import machine
from benchmarks.quality import broken_text

DOCS = Path(__file__).parents[2] / "docs" / "evaluation.md"
ROWS = machine.RESULTS / "broken_text.csv"


def test_the_docs_table_is_of_the_rows():
    rows = broken_text.read(ROWS)
    assert broken_text.table(rows) in DOCS.read_text()
    assert {row["model"] for row in rows} == {*broken_text.MODELS}
    assert {tuple(row) for row in rows} == {broken_text.COLUMNS}


def test_a_table_by_hand():
    rows = [
        {"model": "npo", "set": "forget", "metric": "fell_apart", "value": "0.975"},
        {"model": "original", "set": "log", "metric": "forget_quality", "value": "4.3e-12"},
    ]
    lines = broken_text.table(rows).splitlines()
    cells = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in lines}
    assert cells["fell apart"][3] == " 0.975 " and cells["fell apart"][0].strip() == ""
    assert cells["forget quality (p)"][0] == " 4e-12 "
    assert len({len(one) for one in cells.values()}) == 1


def test_a_command_that_fails_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="'palu evaluate --nonsense' ended with exit status 2"):
        broken_text._run(tmp_path, "palu evaluate --nonsense")

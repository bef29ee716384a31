"""The tables of README.md and docs/ are those of the committed rows."""

import pytest

from benchmarks import docs_tables
from benchmarks.docs_tables import (
    attacks,
    comparison,
    filled,
    made,
    markdown,
    pairs,
    settings,
    take,
)
from palu.comparison.run_file import write_run
from palu.comparison.tables import write_tables
from tests.palu.comparison.made import made_run


def test_the_tables_of_the_documents_are_those_of_the_rows():
    differing = [str(path) for path in docs_tables.differing()]
    assert not differing, f"run python -m benchmarks.docs_tables: {differing} have other tables"


def test_a_number_that_was_changed_by_hand_is_seen(tmp_path, monkeypatch):
    text = (docs_tables.ROOT / "README.md").read_text("utf-8")
    (tmp_path / "README.md").write_text(text.replace("11.99 s", "99.11 s"), "utf-8")
    monkeypatch.setattr(docs_tables, "ROOT", tmp_path)
    monkeypatch.setattr(docs_tables, "DOCS", ("README.md",))
    assert docs_tables.main(["--check"]) == 1
    assert docs_tables.main([]) == 0
    assert (tmp_path / "README.md").read_text("utf-8") == text
    assert docs_tables.main(["--check"]) == 0


def test_marks_that_are_not_whole_and_unknown_names_are_refused():
    with pytest.raises(ValueError, match="1 tables begin and 0 end"):
        filled("<!-- table: demo -->\n")
    with pytest.raises(ValueError, match="no table 'dmeo'"):
        made("dmeo")
    with pytest.raises(ValueError, match=r"there is no .*comparison_nothing_frontier\.csv"):
        made("comparison nothing")


@pytest.fixture
def compared(tmp_path, monkeypatch):
    """The CSVs of a comparison of two seeds, taken as `people`."""
    folder, results = tmp_path / "runs-here", tmp_path / "results"
    results.mkdir()
    folder.mkdir()
    monkeypatch.setattr(docs_tables, "RESULTS", results)
    kept = [1.0] * 4
    write_run(folder / "original.json", made_run(kept=kept, said=[1] * 4))
    write_run(folder / "retrained.json", made_run(kept=kept, said=[0] * 4))
    said = {"A|B": [[0, 0, 0, 1], [0, 0, 1, 1]], "C": [[1] * 4] * 2, "D": [[0, 1, 1, 1]] * 2}
    for method, of_seeds in said.items():
        setting = "" if method == "D" else "x"
        for seed, one in enumerate(of_seeds):
            place = folder / "runs" / f"{method[0]}{seed}"
            place.mkdir(parents=True)
            run = made_run(method, setting, seed, kept=kept, said=one, apart=[seed, 0, 0, 0])
            write_run(place / "run.json", run)
    write_tables(folder)
    take(folder, "people")
    return results


def test_a_comparison_becomes_its_tables(compared):
    assert made("comparison people") == comparison("people")
    lines = comparison("people").splitlines()
    assert lines[0].startswith("| | area to 10% | within 2% | within 5%")
    assert lines[2].startswith(r"| A\|B | 0.625 [") and lines[4].startswith("| C | 0.000 [")
    assert (
        settings("people").splitlines()[2]
        == r"| A\|B | 2% | x | 0.0% | 0.625 | 0.625 | 0.0% | 12% |"
    )
    assert "| D | 5% | as given | 0.0% | 0.250 | 0.250 | 0.0% | 12% |" in settings("people")
    first, second = (line.split(" | ") for line in pairs("people").splitlines()[2:4])
    assert first[:2] == [r"| A\|B", "C"] and first[2].startswith("0.625 [")
    assert second[:2] == [r"| A\|B", "D"] and second[2].startswith("0.375 [")
    assert attacks("people").splitlines() == [
        r"| within 5% | original | retrained | A\|B | D |",
        "| --- | --- | --- | --- | --- |",
        "| greedy | 100.0% | 0.0% | 37.5% | 75.0% |",
    ]


def test_markdown_has_no_bare_bars():
    assert markdown(["", "a"], [["x|y", ""]]) == "| | a |\n| --- | --- |\n| x\\|y | |"

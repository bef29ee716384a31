"""A comparison's folder to its tables."""

import dataclasses
import io
import json
import re

import pandas as pd
import pytest
from rich.console import Console

from palu.comparison.results import Choices, Folder, natural, rank
from palu.comparison.run_file import write_run
from palu.comparison.tables import (
    FILES,
    caption,
    main_settings,
    notes,
    ranking_table,
    read_choices,
    summary_frame,
    write_tables,
)
from tests.palu.comparison.made import made_run


def save(folder, name, run):
    (folder / "runs" / name).mkdir(parents=True)
    write_run(folder / "runs" / name / "run.json", run)


@pytest.fixture
def folder(tmp_path):
    """Two methods over two seeds: `A & b` has one setting that is whole and one that diverged,
    `C` lacks a seed."""
    write_run(tmp_path / "original.json", made_run(kept=[1.0] * 4, said=[1] * 4))
    write_run(tmp_path / "retrained.json", made_run(kept=[1.0] * 4, said=[0] * 4))
    for seed, said in enumerate(([0, 0, 0, 1], [0, 0, 1, 1])):
        run = made_run("A & b", "learning_rate=1e-4", seed, kept=[0.99] * 4, said=said)
        save(tmp_path, f"A-1e-4-s{seed}", run)
    best = made_run("A & b", "learning_rate=1e-3", 0, kept=[1.0] * 4, said=[0] * 4)
    save(tmp_path, "A-1e-3-s0", best)
    save(tmp_path, "A-1e-3-s1", made_run("A & b", "learning_rate=1e-3", 1, status="diverged"))
    save(tmp_path, "C-s0", made_run("C", "", 0, kept=[1.0] * 4, said=[0] * 4))
    return tmp_path


def test_a_folder_becomes_its_tables(folder):
    content = write_tables(folder)
    assert json.loads((folder / "comparison.json").read_text()) == content
    assert sorted(path.name for path in folder.iterdir() if path.name in FILES) == sorted(FILES)
    first, second = content["methods"]
    # 0 up to a loss of 0.01, then 1 - (1/4 + 2/4) / 2
    assert first["area"]["value"] == pytest.approx(0.9 * 0.625)
    assert first["within"][0]["setting"] == "learning_rate=1e-4"
    assert first["within"][0]["loss"]["value"] == pytest.approx(0.01)
    assert second["within"][2]["setting"] is None and second["area"]["value"] == 0
    assert content["models"]["retrained"]["forgetting"]["value"] == 1
    assert content["models"]["original"]["loss"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_a_setting_that_is_not_whole_is_not_ranked_and_said(folder):
    content = write_tables(folder)
    assert content["not_ranked"] == [
        {
            "method": "A & b",
            "setting": "learning_rate=1e-3",
            "why": "seed 1 diverged: loss is NaN at step 3",
        },
        {"method": "C", "setting": "", "why": "seed 1 was not run"},
    ]
    assert notes(content)[1:3] == [
        "Not ranked: A & b, learning_rate=1e-3 (seed 1 diverged: loss is NaN at step 3)",
        "Not ranked: C (seed 1 was not run)",
    ]
    assert notes(content)[-1] == "C: no setting is ranked"


def test_settings_whose_answers_fell_apart_are_not_ranked_where_a_limit_is_given(tmp_path):
    """1 and 2 of 4 over two seeds are 37.5%; utility's sets may fall apart as they like."""
    write_run(tmp_path / "original.json", made_run(kept=[1.0] * 4, said=[1] * 4))
    for setting, apart in (
        ("lr=1", ([1, 0, 0, 0], [1, 1, 0, 0])),
        ("lr=2", ([0] * 4, [1, 0, 0, 0])),
    ):
        for seed in range(2):
            said = [0] * 4 if setting == "lr=1" else [0, 0, 0, 1]
            run = made_run("A", setting, seed, kept=[0.99] * 4, said=said, apart=apart[seed])
            save(tmp_path, f"{setting}-{seed}", run)
    found = Folder.read(tmp_path)
    best = {}
    for limit in (None, 0.375, 0.37, 0.125, 0.12):
        content = rank(found, Choices(max_fell_apart=limit))
        best[limit] = content["methods"][0]["within"][0]["setting"], len(content["not_ranked"])
    assert best == {
        None: ("lr=1", 0),
        0.375: ("lr=1", 0),
        0.37: ("lr=2", 1),
        0.125: ("lr=2", 1),
        0.12: (None, 2),
    }
    content = rank(found)
    assert main_settings(content)[0] == (
        "A within 2%: lr=1 (loss 1.0%; 38% of the forget answers fell apart)"
    )
    content = rank(found, Choices(max_fell_apart=0.12))
    why = "37.5% of its answers to the forget file fell apart, more than 12.0%"
    assert content["not_ranked"][0] == {"method": "A", "setting": "lr=1", "why": why}
    assert "over 12% of the forget answers fell apart are out" in caption(content)
    (tmp_path / "comparison.yaml").write_text("max_fell_apart: 0.2\n")
    assert write_tables(tmp_path)["max_fell_apart"] == 0.2


def test_a_limit_of_answers_that_fell_apart_needs_answers(folder):
    with pytest.raises(ValueError, match="max_fell_apart: 'A & b' 'learning_rate=1e-4' has no"):
        rank(Folder.read(folder), Choices(max_fell_apart=0.1))


def test_few_of_the_settings_that_are_not_ranked_are_shown(folder):
    content = write_tables(folder)
    one = {"method": "A & b", "setting": "x", "why": "seed 1 was not run"}
    lines = notes({**content, "not_ranked": [one] * 10})
    assert [line for line in lines if line.startswith("Not ranked")] == [
        *["Not ranked: A & b, x (seed 1 was not run)"] * 8,
        "Not ranked: 2 more settings (not_ranked in comparison.json, or the page)",
    ]


def test_the_csv_has_a_row_a_run_whatever_became_of_it(folder):
    write_tables(folder)
    rows = pd.read_csv(folder / "comparison.csv").set_index("run")
    assert list(rows.index) == [
        "original",
        "retrained",
        "A-1e-4-s0",
        "A-1e-4-s1",
        "A-1e-3-s0",
        "A-1e-3-s1",
        "C-s0",
    ]
    one = rows.loc["A-1e-4-s1"]
    assert (one["forgetting"], one["leaked greedy"], one["seed"]) == (0.5, 0.5, 1)
    assert one["utility"] == pytest.approx(0.99) and one["loss"] == pytest.approx(0.01)
    assert one["facts answer_probability"] == pytest.approx(0.99)
    assert rows.loc["A-1e-3-s1", "status"] == "diverged"
    assert pd.isna(rows.loc["A-1e-3-s1", "utility"])


def test_the_same_folder_gives_the_same_bytes(folder):
    write_tables(folder)
    before = {name: (folder / name).read_bytes() for name in FILES}
    write_tables(folder)
    assert {name: (folder / name).read_bytes() for name in FILES} == before


def test_the_table_can_be_made_of_the_csv_alone(folder):
    content = write_tables(folder)
    frame = summary_frame(content)
    assert frame.equals(summary_frame(pd.read_csv(folder / "frontier.csv")))
    assert frame[""].tolist() == ["A & b", "C", "retrained (loss 0.0%)", "original (loss 0.0%)"]
    assert frame["within 2%"].tolist()[1:] == ["-", "", ""]


def test_pairs_are_told_with_their_intervals(folder):
    content = write_tables(folder)
    pairs = pd.read_csv(folder / "pairs.csv")
    assert pairs["at"].tolist() == ["area to 10%", "2%", "5%", "10%"]
    row = pairs.iloc[0]
    assert (row["first"], row["second"]) == ("A & b", "C")
    assert row["difference"] == pytest.approx(0.9 * 0.625)
    low, high = row["difference_low"], row["difference_high"]
    assert notes(content)[0] == (
        f"A & b is ahead of C in area by 0.562 [{low:.3f}, {high:.3f}]: more than noise"
    )
    assert 0 < low < row["difference"] < high


def test_the_method_ahead_is_named_first_whichever_comes_first(folder):
    content = write_tables(folder, Choices(methods=("C", "A & b")))
    assert content["pairs"][0]["first"] == "C" and content["pairs"][0]["area"]["high"] < 0
    assert notes(content)[0].startswith("A & b is ahead of C in area by 0.562 [0.")


def test_latex_is_escaped(folder):
    text = (write_tables(folder), (folder / "comparison.tex").read_text())[1]
    assert r"A \& b" in text and r"within 2\%" in text and r"at most so much, with 95\% i" in text
    assert "\\toprule" in text and "\\bottomrule" in text


def test_intervals_in_latex_stand_above_and_below(folder):
    """Beside each other they run off the page of an article."""
    frame = summary_frame(write_tables(folder)).set_index("")
    value, low, high = re.findall(r"\d\.\d{3}", frame.loc["A & b", "area to 10%"])
    text = (folder / "comparison.tex").read_text()
    assert f"A \\& b & ${value}_{{{low}}}^{{{high}}}$ & " in text
    assert "[0." not in text and "\\footnotesize\n\\setlength{\\tabcolsep}" in text


def test_the_table_fits_a_terminal(folder):
    content = write_tables(folder)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(ranking_table(content))
    assert "…" not in console.export_text()


def test_one_seed_is_said():
    content = rank(
        Folder(
            {"original": made_run(said=[1, 0])},
            {"a": made_run("A", said=[0, 0])},
        ),
        resamples=20,
    )
    assert "one seed, which the intervals know nothing of" in caption(content)
    assert summary_frame(content)["left out"].tolist() == ["-", ""]


def test_an_original_that_gives_nothing_away_is_said():
    found = Folder({"original": made_run(said=[0])}, {"a": made_run("A", said=[0])})
    assert any("gives no secret away" in note for note in notes(rank(found, resamples=0)))


def test_without_any_run_the_models_stand_alone():
    found = Folder({"original": made_run(said=[1])}, {})
    content = rank(found, Choices(seeds=[0], methods=["A"]))
    assert summary_frame(content)[""].tolist() == ["A", "original (loss 0.0%)"]
    with pytest.raises(ValueError, match="there is no run to rank"):
        rank(found)


def test_choices_are_those_of_the_configuration(folder):
    (folder / "comparison.yaml").write_text(
        "forgetting: worst\nlosses: [0.03]\nseeds: [0]\nutility_metrics: [rougeL_recall]\n"
        "methods: {C: {}, 'A & b': {}}\n"
    )
    wanted = Choices("worst", [0.03], ["rougeL_recall"], [0], ("C", "A & b"))
    assert read_choices(folder / "comparison.yaml") == wanted
    content = write_tables(folder)
    assert [one["method"] for one in content["methods"]] == ["C", "A & b"]
    assert content["not_ranked"] == []
    assert [part["metric"] for part in content["utility"]] == ["rougeL_recall"]


def test_folders_that_cannot_be_ranked_are_refused(folder):
    run = made_run("C", "", 0, kept=[1.0] * 4, said=[0] * 4)
    save(folder, "C-again", run)
    with pytest.raises(ValueError, match="C-again and C-s0 are both C, one setting, seed 0"):
        write_tables(folder)


def test_runs_of_other_secrets_are_refused(folder):
    other = made_run("C", "", 1, kept=[1.0] * 4, said=[0] * 4)
    save(folder, "C-s1", dataclasses.replace(other, secrets=[(n, 1) for n in range(4)]))
    with pytest.raises(ValueError, match=r"C-s1 cannot be compared with original: its secrets are"):
        write_tables(folder)
    (folder / "original.json").unlink()
    with pytest.raises(ValueError, match=r"original\.json is missing"):
        write_tables(folder)


def test_numbers_in_settings_are_sorted_by_size():
    names = ["rate=1e-3", "rate=1e-4", "rate=10", "rate=9", ""]
    assert sorted(names, key=natural) == ["", "rate=1e-4", "rate=1e-3", "rate=9", "rate=10"]

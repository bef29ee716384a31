"""The check of intervals on drawn runs."""

import csv

from benchmarks.quality.false_alarms import CASES, case, main


def test_every_case_becomes_a_row(tmp_path):
    assert main(["--data-sets", "1", "--csv", str(tmp_path / "rows.csv")]) == 0
    with (tmp_path / "rows.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(int(row["seeds"]), int(row["settings"])) for row in rows] == list(CASES)
    assert rows[0]["left_out"] == "" and float(rows[1]["left_out"]) > 0


def test_the_same_case_gives_the_same_row():
    assert case(3, 2, 2) == case(3, 2, 2)

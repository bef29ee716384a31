"""The table of methods: its commands, its numbers, and what a run that was stopped does again."""

import csv
import json
import shlex
from itertools import pairwise

import pytest
import typer

from benchmarks.quality.method_table import PEOPLE, TABLE, TOFU, Runs, main, slug, tofu_runs
from palu.cli.app import app

SUMMARY = {
    "forget_quality": 0.5,
    "forget_Q_A_ROUGE": 0.25,
    "retain_Q_A_Prob": 0.5,
    "retain_Q_A_ROUGE": 1.0,
    "retain_Truth_Ratio": 0.25,
}


@pytest.fixture
def ran(monkeypatch):
    """Commands that write what the real ones do; the list of them."""
    commands = []

    def run(self, command, log, makes=""):
        commands.append(command)
        (self.folder / f"{log}.log").write_text(f"$ {command}\n")
        words = shlex.split(command)
        values = dict(pairwise(words))
        if words[1] == "demo":
            (self.folder / values["--output"]).mkdir()
        if words[1] == "unlearn":
            (self.folder / values["--output"]).mkdir()
            (self.folder / values["--output"] / "palu.json").write_text("{}")
        if "--output" in values and words[1] == "evaluate":
            folder = self.folder / values["--output"]
            folder.mkdir(parents=True, exist_ok=True)
            found = dict(SUMMARY)
            if "--retain-log" not in values:
                del found["forget_quality"]
            if "--tofu" in values:
                found["model_utility"] = 0.375
            (folder / "TOFU_SUMMARY.json").write_text(json.dumps(found))
        if "--json" in values:
            text = json.dumps({"forget": {"mean": {"sensitive_probability": 0.125}}})
            (self.folder / values["--json"]).write_text(text)

    monkeypatch.setattr(Runs, "run", run)
    return commands


def read(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_people(ran, tmp_path, capsys):
    given = ["people", "--seeds", "4", "7", "--work", str(tmp_path), "--csv", str(tmp_path / "c")]
    assert main(given) == 0
    # A demo; an evaluation of both its models; training and evaluation of every setting.
    assert len(ran) == 2 * (1 + 2 + 2 * len(PEOPLE))
    rows = read(tmp_path / "c")
    utility = [float(row["value"]) for row in rows if row["metric"] == "utility"]
    assert utility == pytest.approx([3 / (1 / 0.5 + 1 / 1.0 + 1 / 0.25)] * 2 * (2 + len(PEOPLE)))
    npo = [row for row in rows if (row["setting"], row["seed"]) == ("NPO", "7")]
    assert {row["command"] for row in npo} == {
        "palu unlearn --model original --forget forget.jsonl --retain retain.jsonl --output npo "
        f"{PEOPLE['NPO']} --device cpu"
    }
    lines = capsys.readouterr().out.splitlines()
    assert lines[-len(PEOPLE) - 2].startswith("| retrained | - | 0.125 | 0.250 |")
    done = len(ran)
    assert main(given) == 0 and len(ran) == done, "nothing is run again"
    (tmp_path / "seed7" / "npo.json").unlink()
    assert main(given) == 0 and len(ran) == done + 1


def test_a_model_of_other_settings_is_not_taken(ran, tmp_path):
    runs = Runs("people", 0, tmp_path, "forget.jsonl", "retain.jsonl", "")
    runs.unlearn("NPO", "--method npo")
    runs.unlearn("NPO", "--method npo")
    assert len(ran) == 1
    with pytest.raises(RuntimeError, match=r"npo was made by another command.* --work"):
        runs.unlearn("NPO", "--method npo --beta 1")


def test_tofu(ran, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(130)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (data / "full.json").write_text("".join(lines))
    (data / "retain_perturbed.json").write_text("".join(lines[110:]))
    for name in ("forget01_perturbed", "real_authors_perturbed", "world_facts_perturbed"):
        (data / f"{name}.json").write_text(name)
    work = tmp_path / "work"
    for name in ("original", "retrained"):
        (tmp_path / name).mkdir()
    given = ["tofu", "--work", str(work), "--data", str(data), "--csv", str(tmp_path / "c")]
    given += ["--original", str(tmp_path / "original"), "--retrained", str(tmp_path / "retrained")]
    assert main(given) == 0
    assert (work / "tofu120" / "retain_perturbed.json").read_text() == "".join(lines[110:120])
    assert (work / "original").resolve() == tmp_path / "original"
    assert len(ran) == 2 * 2 + 3 * len(TOFU)
    values = {row["value"] for row in read(tmp_path / "c") if row["metric"] == "utility"}
    assert values == {"0.375"}
    assert "| GradDiff | 0.500 | 0.125 | 0.250 | 0.375 | 0.500 | 1.000 |" in capsys.readouterr().out
    assert isinstance(tofu_runs(work, work, work, data), Runs), "links that are there stay"


def test_show(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    names = ["world", "seed", "setting", "metric", "value"]
    values = [("w", s, "NPO", "forget_quality", v) for s, v in ((0, 4e-7), (1, 0.5), (2, 0.25))]
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([names, *values])
    assert main(["show", str(path)]) == 0
    cells = "| NPO | 0.250 (4e-07 to 0.500) |" + " - |" * (len(TABLE) - 1)
    assert capsys.readouterr().out.splitlines()[-1] == cells


def test_the_commands_are_ones_that_palu_takes():
    unlearn = typer.main.get_command(app).commands["unlearn"]
    for settings in (PEOPLE, TOFU):
        assert len({slug(setting) for setting in settings}) == len(settings)
        for options in settings.values():
            words = ["--model", "m", "--forget", "f", "--retain", "r", "--output", "o"]
            unlearn.make_context("unlearn", [*words, *shlex.split(options)])


def test_a_command_that_fails(tmp_path):
    runs = Runs("people", 0, tmp_path, "forget.jsonl", "retain.jsonl", "")
    with pytest.raises(RuntimeError, match=r"palu nothing ended with 2: (?s:.*)No such command"):
        runs.run("palu nothing", "made")
    assert (tmp_path / "made.log").read_text().startswith("$ palu nothing\n")

"""Only what palu wrote is replaced; outputs are held by one run."""

import json
import os
from pathlib import Path

import pytest

from palu import checkpoints
from palu.files import (
    InUse,
    locked,
    new_aside,
    new_file,
    new_of,
    remove_abandoned,
    write_json,
)
from palu.runs import check_json, check_output, claim_output, output_folder


def test_a_new_file_is_whole_and_follows_no_planted_name(tmp_path):
    place = tmp_path / "x.json"
    (tmp_path / "x.json.partial").symlink_to(tmp_path / "precious")
    write_json(place, {"a": 1})
    assert json.loads(place.read_text()) == {"a": 1} and not (tmp_path / "precious").exists()
    with pytest.raises(RuntimeError), new_file(place) as file:
        file.write("half")
        raise RuntimeError
    assert json.loads(place.read_text()) == {"a": 1}
    assert {p.name for p in tmp_path.iterdir()} == {"x.json", "x.json.partial"}


@pytest.mark.parametrize("kind", ["text", "json", "fifo", "device", "folder", "input"])
def test_evaluate_json_replaces_only_its_own(tmp_path, kind):
    place, ours = tmp_path / "x", {"model": "", "template": {}, "versions": {}, "summary": {}}
    write_json(place, ours)
    check_json(place)
    os.link(place, tmp_path / "input")
    if kind != "input":
        place.unlink()
    {
        "text": lambda: place.write_text("mine"),
        "json": lambda: place.write_text('{"model": 1}'),
        "fifo": lambda: os.mkfifo(place),
        "device": lambda: place.symlink_to("/dev/null"),
        "folder": place.mkdir,
        "input": lambda: None,
    }[kind]()
    with pytest.raises(FileExistsError):
        check_json(place, inputs=(tmp_path / "input",))


def test_one_run_holds_an_output(tmp_path):
    place = tmp_path / "out"
    with locked(place), pytest.raises(InUse, match="another palu process"), locked(place):
        pass
    assert not list(tmp_path.iterdir())
    with claim_output(place, overwrite=False) as claim:
        with pytest.raises(OSError, match="while this run"), output_folder(claim):
            place.mkdir()
            (place / "theirs").touch()
        assert [p.name for p in place.iterdir()] == ["theirs"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_only_checkpoints_of_palu_are_removed(tmp_path):
    for name in ("checkpoint-1", "checkpoint-2", "notes"):
        (tmp_path / "c" / name).mkdir(parents=True)
    (tmp_path / "c" / "checkpoint-1" / checkpoints.RECORD).touch()
    checkpoints.remove_all(tmp_path / "c")
    assert {p.name for p in (tmp_path / "c").iterdir()} == {"checkpoint-2", "notes"}


def test_what_a_killed_run_left_goes_and_the_rest_stays(tmp_path):
    place = tmp_path / "out"
    foreign = tmp_path / ".out.partial-0123456789abcdef"
    for folder in (foreign, tmp_path / ".out.partial-99999999", place):
        folder.mkdir()
        (folder / "precious").touch()
    killed = new_aside(place)
    new_of(killed).mkdir()
    (new_of(killed) / "half").touch()
    os.replace(place, killed / "old")  # between the two renames
    with locked(place):
        remove_abandoned(place)
    assert (place / "precious").exists() and (foreign / "precious").exists()
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(KeyboardInterrupt), output_folder(tmp_path / "made"):
        raise KeyboardInterrupt
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("name", ["", ".", "/", "~", "x" * 300, "loop"])
def test_outputs_that_cannot_be_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="output"):
        check_output(Path(name).expanduser(), overwrite=True)


def test_checkpoints_of_others_are_in_the_way(tmp_path):
    aside = tmp_path / checkpoints.ASIDE
    (aside / "precious").mkdir(parents=True)
    with pytest.raises(checkpoints.CheckpointError, match="palu did not write it"):
        checkpoints.make_aside(aside)
    (aside / "precious").rmdir()
    checkpoints.make_aside(aside)
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(checkpoints.CheckpointError, match="checkpoint-1' is in the way"):
        checkpoints.check_home(tmp_path)

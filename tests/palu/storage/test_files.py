"""Only what palu wrote is replaced; outputs are held by one run."""

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest

from palu.evaluation.eval_log import LogError, LogFolder
from palu.storage.files import (
    LOCK_TEXT,
    InUse,
    locked,
    new_aside,
    new_file,
    new_of,
    remove_abandoned,
    replace_folder,
    write_json,
)
from palu.storage.output import check_json, check_output, claim_output, output_folder
from palu.training import checkpoints
from tests.support import small
from tests.support.command import palu_in, write_data, write_model


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


def test_what_could_not_be_replaced_is_put_back(tmp_path, monkeypatch):
    place = tmp_path / "x"
    place.mkdir()
    (place / "old").touch()
    rename = os.replace

    def refused(source, target):
        if Path(target) == place and not (Path(source) / "old").exists():
            raise OSError("no space")
        rename(source, target)

    monkeypatch.setattr("palu.storage.files.os.replace", refused)
    with pytest.raises(OSError, match="no space"), replace_folder(place) as new:
        (new / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "old"]


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


# ---- the commands --------------------------------------------------------------------------------


@pytest.fixture
def palu(tmp_path, monkeypatch, capsys):
    write_data(tmp_path)
    write_model(tmp_path / "model", small.model(small.tokenizer()))
    return palu_in(tmp_path, monkeypatch, capsys)


UNLEARN = (
    "unlearn --model model --forget forget.jsonl --retain retain.jsonl --epochs 1 --device cpu"
)


def test_unlearn_leaves_what_is_not_its_own(palu, tmp_path):
    words = [*UNLEARN.split(), "--output", "out", "--save-steps", 1]
    kept = tmp_path / "out-checkpoints"
    kept.mkdir()
    (kept / "notes.txt").write_text("mine")
    before = os.umask(0o027)
    try:
        status, _, said = palu(*words)
    finally:
        os.umask(before)
    assert status == 0, said
    assert [p.name for p in kept.iterdir()] == ["notes.txt"]
    modes = {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()}
    assert modes == {0o640}  # safetensors alone would write 0600
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    for more in (["--overwrite"], ["--overwrite", "--resume"]):
        status, _, said = palu(*words, *more)
        assert status == 2 and "holds 'thesis.txt', which palu did not write" in said
    (tmp_path / "out" / "thesis.txt").unlink()
    (kept / "checkpoint-1").mkdir()
    status, _, said = palu(*words, "--resume", "--overwrite")
    assert status == 2 and "is in the way of checkpoints" in said
    assert (kept / "checkpoint-1").is_dir() and not list(tmp_path.glob(".*"))


def test_a_run_that_was_stopped_in_its_cleaning_ends_it(palu, tmp_path, monkeypatch):
    line = f"{UNLEARN} --output out --save-steps 1 --reference cached --retain-loss kl"
    left = [tmp_path / "out-checkpoints", tmp_path / "out-reference-cache"]

    def stop(*places):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("palu.cli.unlearn.Run.report", stop)
        assert palu(line)[0] == 130
    with monkeypatch.context() as patch:
        patch.setattr("palu.unlearn.unlearn", lambda *rows, **options: pytest.fail("trained"))
        assert palu(line)[0] == 2
        for more in ("--resume --seed 1", "--resume --learning-rate 0.5"):
            status, _, said = palu(f"{line} {more}")
            assert status == 2 and "is not empty" in said
        assert all(place.is_dir() for place in left)
        before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
        status, said, error = palu(f"{line} --resume")
        assert status == 0, error
        assert "Written to out by an earlier start after 1 steps. Last terms" in said
        assert "The reference cache was removed" in said
        assert not any(place.exists() for place in left)
        assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("command", ["unlearn", "evaluate", "demo", "cache build"])
def test_a_second_run_with_one_output_is_refused(palu, tmp_path, command):
    model = "" if command == "demo" else "--model model --forget forget.jsonl --device cpu"
    with locked(tmp_path / "out"):
        status, _, said = palu(*f"{command} {model} --output out".split())
    assert status == 2 and "another palu process is writing" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_mistakes_with_outputs_are_one_line(palu, tmp_path):
    evaluate = "evaluate --model model --forget forget.jsonl --device cpu --json"
    for line in (
        f"{evaluate} forget.jsonl",
        f"{evaluate} model",
        f"{evaluate} model/palu.json",
        f"{evaluate} model/model.safetensors",
        f"{evaluate} /dev/null",
        f"{evaluate} {'x' * 300}.json",
        f"{evaluate} out/TOFU_EVAL.json --output out",
        "demo --seed -1",
        f"demo --output {'x' * 300}",
        "demo --output model --overwrite --seed 1 --people 0",
    ):
        before = {p: p.stat().st_size for p in tmp_path.rglob("*")}
        status, _, said = palu(*line.split())
        assert status == 2 and "Traceback" not in said, (line, said)
        assert before == {p: p.stat().st_size for p in tmp_path.rglob("*")}, line


def test_what_looks_like_palus_is_left(tmp_path):
    for name, text in (("manifest.json", '{"name": "web app"}'), ("metrics.json", '{"f1": 1}')):
        place = tmp_path / name.split(".")[0]
        place.mkdir()
        (place / name).write_text(text)
        with pytest.raises(FileExistsError, match="palu did not write"):
            check_output(place, overwrite=True)
    (tmp_path / "TOFU_EVAL.json").write_text("{}")
    with pytest.raises(LogError, match="was not written by palu"):
        LogFolder(tmp_path, {}, overwrite=True)
    LogFolder(tmp_path / "new", {}, overwrite=True).save({"a": {"agg_value": 1.0}})
    again = LogFolder(tmp_path / "new", {"model": "another"}, overwrite=True)
    again.begin()  # a kill from here on leaves no number of the old model
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_numbers_of_an_evaluation_are_of_the_model_its_settings_name(tmp_path, error, monkeypatch):
    """Stopped at any change of the folder, an evaluation that is measured anew leaves nothing of
    the old model to go on with."""

    def measure(number, fail_at=None):
        done = 0

        def counted(act):
            def call(*args, **kwargs):
                nonlocal done
                done += 1
                if done == fail_at:
                    raise error
                return act(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr("palu.storage.files.os.replace", counted(os.replace))
            patch.setattr(Path, "unlink", counted(Path.unlink))
            store = LogFolder(tmp_path, {"model": f"model {number}"}, overwrite=True)
            store.begin()
            for name in ("a", "b"):  # a log grows metric by metric
                store.log[name] = {"agg_value": float(number)}
                store.save(store.log)
        return done

    steps = measure(0)
    assert steps >= 9  # three files go, three are written twice
    for step in range(1, steps + 1):
        measure(1)
        with suppress(KeyboardInterrupt, OSError):
            measure(2, step)
        for number in (1, 2):
            try:
                found = LogFolder(tmp_path, {"model": f"model {number}"}, overwrite=False).log
            except LogError:
                continue
            assert {entry["agg_value"] for entry in found.values()} <= {float(number)}, step
        if not (tmp_path / "TOFU_EVAL.json").exists():
            LogFolder(tmp_path, {"model": "model 3"}, overwrite=False).begin()
            assert not list(tmp_path.iterdir())  # nor a summary for a reader's eyes
    LogFolder(tmp_path, {"model": "model 1"}, overwrite=True).save({"a": {"agg_value": 1.0}})
    (tmp_path / "palu_evaluate.json").write_text('{"settings": {"modem": "model 1"}}')
    with pytest.raises(LogError, match="does not say of which model"):
        LogFolder(tmp_path, {"model": "model 2"}, overwrite=False)


def test_a_lock_that_a_killed_run_left_is_taken_over(tmp_path):
    lock = tmp_path / ".out.palu-lock"
    lock.write_text(LOCK_TEXT.format("out"))
    with locked(tmp_path / "out"):
        assert lock.exists()
    assert not lock.exists()
    lock.write_text("mine")
    with pytest.raises(FileExistsError, match="in the place of palu's lock"):
        locked(tmp_path / "out").__enter__()
    assert lock.read_text() == "mine"


def test_an_output_needs_no_home(tmp_path, monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 10**6)  # as containers run: a user without a name
    check_output(tmp_path / "out", overwrite=False)

"""`palu unlearn` without a retain file: the model's own answers, the same ones when resumed."""

import dataclasses
import shutil

import pytest

from palu.training.self_retain import SelfRetain
from tests.support import small
from tests.support.command import palu_in, record, refusal, write_data, write_model
from tests.support.tofu_small import learn

LINE = "unlearn --model model --forget forget.jsonl --device cpu --objective entropy --top-k 5 "
LINE += "--learning-rate 0.001 --batch-size 2 --epochs 2 --max-length 80 "
SECRETS = ("Paris", "Lisbon", "red fox", "blue hen")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that says what it knows, and its data."""
    folder = tmp_path_factory.mktemp("knows")
    tok = small.tokenizer()
    facts = [(q, a) for q, a, _ in small.FACTS]
    write_model(folder, learn(small.model(tok, initializer_range=0.05), tok, facts, 60))
    (folder / "model").mkdir()
    for path in [p for p in folder.iterdir() if p.is_file()]:
        path.rename(folder / "model" / path.name)
    write_data(folder)
    return folder


@pytest.fixture
def palu(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("palu.training.self_retain.FEWEST", 12)
    shutil.copytree(folder, tmp_path / "work")
    return palu_in(tmp_path / "work", monkeypatch, capsys)


def test_the_models_own_answers_are_held_by_default(palu):
    status, said, error = palu(f"{LINE} --output new")
    assert status == 0, error
    (line,) = [one for one in said.splitlines() if one.startswith("No --retain file: ")]
    assert "answers of the original model itself hold the rest in place" in line
    assert "to neighbours" in line and "with a secret of the forget set" in line
    known = record(palu.folder / "new")
    assert known["data"]["retain"] == "self" and known["options"]["retain"] is None
    about = known["data"]["self_retain"]
    assert about["examples"] == sum(about["kinds"].values()) >= 8
    assert str(about["examples"]) in line
    assert f"; harm is measured by {about['measured']}." in line
    assert all(entry["num_retain"] > 0 for entry in known["loss_curve"])
    texts = "".join(p.read_text() for p in (palu.folder / "new").glob("*.json"))
    # Its vocabulary has the words.
    texts = texts.replace((palu.folder / "new" / "tokenizer.json").read_text(), "")
    assert not any(secret in texts for secret in SECRETS)
    assert "Nobody came" not in texts
    assert not any("self_retain" in path.name for path in palu.folder.rglob("*"))
    # `--retain self` is the same, and so is the run of its record.
    assert palu(f"{LINE} --output same --retain self")[0] == 0
    again = "unlearn --config new/palu.json --model model --forget forget.jsonl --output again"
    assert palu(f"{again} --device cpu")[0] == 0
    for other in ("same", "again"):
        assert record(palu.folder / other)["data"]["self_retain"] == about
        assert record(palu.folder / other)["loss_curve"] == known["loss_curve"]


def test_none_holds_nothing(palu):
    status, said, error = palu(f"{LINE} --output new --retain none")
    assert status == 0 and "warning: no retain set: only the other words" in error
    known = record(palu.folder / "new")
    assert known["data"]["retain"] is None and known["options"]["retain"] == "none"
    assert "No --retain file" not in said
    assert not any(entry.get("num_retain") for entry in known["loss_curve"])


def test_a_method_without_a_retain_term_keeps_nothing(palu):
    line = "unlearn --model model --forget forget.jsonl --device cpu --epochs 1 --output new"
    status, _, error = palu(f"{line} --method grad_ascent")
    assert status == 0 and "no retain set: nothing holds the model in place" in error
    line += "2 --method grad_ascent --retain self"
    assert "has no retain term, and a retain set is given" in refusal(palu, line)


def test_a_file_of_that_name_is_a_file(palu):
    shutil.copy(palu.folder / "retain.jsonl", palu.folder / "self")
    status, said, _ = palu(f"{LINE} --output new --retain ./self")
    assert status == 0 and "No --retain file" not in said
    assert record(palu.folder / "new")["data"]["retain"] == "./self"


def test_an_adapter_and_a_cached_reference(palu):
    options = "--retain-loss kl --reference cached"
    status, _, error = palu(f"{LINE} --output new --lora-rank 2 --retain-loss kl")
    assert status == 0, error
    status, said, error = palu(f"{LINE} --output cached {options}")
    assert status == 0 and "The reference cache was removed" in said, error
    digests = {record(palu.folder / n)["data"]["self_retain"]["digest"] for n in ("new", "cached")}
    assert len(digests) == 1  # a new adapter changes nothing


def test_a_resumed_run_holds_the_same_answers(palu, monkeypatch):
    whole = f"{LINE} --save-steps 1 --output"
    assert palu(f"{whole} whole")[0] == 0
    assert not (palu.folder / "whole-checkpoints").exists()

    class Stop(Exception):
        pass

    def stop(*args, **kwargs):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("palu.unlearn.save_model", stop)
        with pytest.raises(Stop):
            palu(f"{whole} new")
    kept = palu.folder / "new-checkpoints" / "self_retain.json"
    made = SelfRetain.read(kept)
    assert made.digest() == record(palu.folder / "whole")["data"]["self_retain"]["digest"]
    # What is kept is used, and not made again: other texts are another run's.
    other = [dataclasses.replace(made.examples[0], answer="Else."), *made.examples[1:]]
    made._replace(examples=other).write(kept)
    status, _, error = palu(f"{whole} new --resume")
    assert status == 2 and "the retain data is" in error
    made.write(kept)
    assert palu(f"{whole} new --resume")[0] == 0
    assert record(palu.folder / "new")["loss_curve"] == record(palu.folder / "whole")["loss_curve"]
    assert not kept.parent.exists()


def test_a_run_without_a_checkpoint_makes_its_answers_anew(palu, monkeypatch):
    """Those of a run that was killed before its first checkpoint may say other secrets."""
    made = SelfRetain([], {}, {})
    monkeypatch.setattr("palu.training.self_retain.self_retain", lambda *a, **k: made)
    monkeypatch.setattr(SelfRetain, "read", lambda path: pytest.fail("old answers were read"))
    kept = palu.folder / "new-checkpoints" / "self_retain.json"
    kept.parent.mkdir()
    kept.write_text("{}")
    palu(f"{LINE} --output new --save-steps 1 --resume")
    assert not kept.exists() or kept.read_text() != "{}"

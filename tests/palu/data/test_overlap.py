"""Forget rows among the retain rows: counted, left out on request, and never all of them."""

import dataclasses
import json
import warnings

import pytest

from palu.data.overlap import without_overlap
from palu.data.records import Example
from palu.demo.people import write_jsonl
from tests.support import small
from tests.support.command import palu_in, write_data, write_model
from tests.support.training import config
from tests.support.training import trainer as small_trainer


@pytest.fixture(scope="module")
def work(tmp_path_factory, tok):
    """A tiny model, and `full.jsonl` whose rows are those of both files, as TOFU's full.json."""
    folder = tmp_path_factory.mktemp("overlap")
    write_model(folder / "model", small.model(tok))
    write_data(folder)
    full = [
        {"question": q, "answer": a, "id": f"row {n}"} for n, (q, a, _) in enumerate(small.FACTS)
    ]
    full[1]["question"] = f"  {full[1]['question'].upper()}\n"
    write_jsonl(folder / "full.jsonl", full)
    return folder


@pytest.fixture
def palu(monkeypatch, capsys, work):
    return palu_in(work, monkeypatch, capsys)


DATA = ["--model", "model", "--device", "cpu", "--forget", "forget.jsonl", "--top-k", 5]
TRAIN = ["--batch-size", 3, "--epochs", 1]
SAYS = "full.jsonl: 3 of {} rows are among the rows to forget of forget.jsonl, such as row 'row 0':"


OTHERS = [pytest.param(method, marks=pytest.mark.slow) for method in ("grad_diff", "rmu")]


@pytest.mark.parametrize("method", ["palu", *OTHERS])
def test_rows_in_both_are_said_and_left_out_on_request(palu, work, method):
    command = ["unlearn", *DATA[: None if method == "palu" else -2], *TRAIN, "--method", method]
    said = SAYS.format(len(small.FACTS))
    command += ["--retain", "full.jsonl", "--overwrite", "--output", "new"]
    status, _, told = palu(*command)
    assert status == 0 and told.count("among") == 1
    assert f"{said} they are forgotten and kept at once (--drop-overlap leaves them out)" in told
    status, _, told = palu(*command, "--drop-overlap")
    assert status == 0 and told.count("among") == 1 and f"{said} they are left out" in told
    assert json.loads((work / "new/palu.json").read_text())["data"]["drop_overlap"] is True
    for same in ("forget.jsonl", "forget.jsonl[1:]"):
        status, _, told = palu(*command, "--drop-overlap", "--retain", same)
        assert status == 2 and "nothing is left to keep" in told and "the same file" in told
        assert f"--retain {same}: every row is among the rows to forget of forget.jsonl" in told
    status, _, told = palu(*command, "--retain", "retain.jsonl")
    assert status == 0 and "among" not in told
    status, _, told = palu(
        *[w for w in command if w not in ("--retain", "full.jsonl")], "--drop-overlap"
    )
    assert (
        status == 2
        and "--drop-overlap leaves out retain examples: it needs a --retain file" in told
    )


def test_a_cache_is_built_of_the_rows_that_are_left(palu):
    kept = ["--retain", "full.jsonl", "--drop-overlap", "--retain-loss", "kl"]
    status, said, _ = palu("cache", "build", *DATA, *kept, "--output", "cache")
    assert status == 0
    status, said, told = palu("cache", "verify", "cache", *DATA[:6], "--retain", "full.jsonl")
    assert status == 0 and "it was built from this model and this forget data" in said, told
    status, _, told = palu("cache", "verify", "cache", *DATA[:4], "--retain", "full.jsonl")
    assert status == 2 and "built with --drop-overlap: add --forget FILE" in told
    cached = ["--reference", "cached", "--reference-cache", "cache", "--output", "cached"]
    status, said, told = palu("unlearn", *DATA, *TRAIN, *kept, *cached)
    assert status == 0 and "was read from cache" in said, told
    kept.remove("--drop-overlap")
    status, _, told = palu("unlearn", *DATA, *TRAIN, *kept, *cached, "--overwrite")
    assert status == 2 and "retain" in told.splitlines()[-1]


def test_tokenised_rows_are_compared_in_training(tok, tmp_path):
    def trainer(**data):
        made = small_trainer(tok, config(tmp_path, max_steps=1), **data)
        made.texts_compared = False
        return made

    rows = small.rows(tok)
    padded = {**rows[2], "input_ids": [*rows[2]["input_ids"], 0]}
    padded["labels"] = [*rows[2]["labels"], -100]
    padded["attention_mask"] = [*rows[2]["attention_mask"], 0]
    made = trainer(retain=[rows[3], padded, rows[4]])
    says = (
        "1 of 3 rows of retain_dataset have the input_ids of a row of train_dataset, such as row 1"
    )
    with pytest.warns(UserWarning, match=says):
        made.train()
    made = trainer(retain=rows[:2])
    with pytest.warns(UserWarning, match="2 of 2 rows of retain_dataset"):
        made.train()


def test_what_is_one_question_and_answer():
    forget = [Example("0", "Who is Zoë?", "A  Straße."), Example("1", None, "Who is Ada?")]
    same = [("who is zoe\u0308?", "a\u00a0STRASSE.\n"), (None, "WHO IS\tADA?")]
    other = [("Who is Zoe?", "A Straße."), ("Who is Zoë?", "A Strasse"), ("", "Who is Ada?")]
    retain = [Example(str(n), *pair) for n, pair in enumerate([*same, *other])]
    files = {"files": ("retain", "forget")}
    with pytest.warns(UserWarning, match=r"retain: 2 of 5 rows .* of forget, such as row '0'"):
        assert without_overlap(retain, forget, drop=True, **files) == retain[2:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        changed = [dataclasses.replace(e, extra={"n": 1}) for e in retain[2:]]
        assert without_overlap(changed, forget, drop=False, **files) == changed

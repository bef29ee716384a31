"""`palu evaluate` says what is wrong with its options, files and records, and with a model."""

import pytest
from safetensors.torch import load_file, save_file

from palu.data.template import Template
from palu.demo.people import write_jsonl
from palu.evaluation.datasets import EvalSet, read_sets, tofu_files
from tests.support import small
from tests.support.command import write_model
from tests.support.tofu_small import SMALL, records


def test_files_of_a_split(tmp_path):
    for name in ("forget05.json", "holdout05.json", "world_facts_perturbed.json"):
        (tmp_path / name).write_text("{}")
    files = tofu_files(tmp_path, "forget05")
    assert {k: v.rpartition("/")[2] for k, v in files.items()} == {
        "forget": "forget05.json",
        "holdout": "holdout05.json",
        "wf": "world_facts_perturbed.json",
    }


BAD_OPTIONS = {
    "": "give --forget FILE, or --tofu DIR and --split NAME",
    "--tofu tofu": "--tofu needs --split",
    "--forget x --split forget01": "--split 'forget01' is TOFU's: add --tofu",
    SMALL + "--forget x": "leave --forget, --retain",
    "--tofu none --split forget01": "--tofu 'none': no such folder",
    "--tofu tofu --split forget07": "neither tofu/forget07_perturbed.json nor tofu/forget07.json",
    "--tofu tofu --split ../x": "must be a name such as forget10, not '../x'",
    SMALL + "--reference-model model": "add --holdout FILE",
    SMALL + "--holdout none.json": "none.json: no such file",
    SMALL + "--retain-log none.json": "none.json: no such file",
    SMALL + "--output holdout.json": "'holdout.json' is a file; name a folder",
}


@pytest.mark.parametrize("line", BAD_OPTIONS)
def test_bad_options(palu, line):
    status, _, error = palu(line)
    assert status == 2 and BAD_OPTIONS[line] in error


@pytest.mark.parametrize(
    ("row", "change", "message"),
    [
        (2, {"perturbed_answer": None}, "row '2', field 'perturbed_answer' is missing"),
        (1, {"paraphrased_answer": None}, "row '1', field 'paraphrased_answer' is missing"),
        (1, {"paraphrased_answer": 3}, "'paraphrased_answer' must be a string, got 3"),
        (3, {"perturbed_answer": []}, "row '3', field 'perturbed_answer' is an empty list"),
        (3, {"perturbed_answer": ["a", " "]}, "'perturbed_answer': answer must not be empty"),
    ],
)
def test_bad_records_are_named(palu, work, row, change, message):
    (work / "bad").mkdir(exist_ok=True)
    rows = records("Where")
    rows[row].update(change)
    write_jsonl(work / "bad" / "forget01_perturbed.json", rows)
    status, _, error = palu("--tofu bad --split forget01")
    assert status == 2 and "bad/forget01_perturbed.json" in error and message in error


def test_max_length(palu):
    status, _, error = palu(SMALL + "--max-length 4")
    assert status == 2 and "max_length=4 leaves no token of the answer" in error
    status, _, said = palu(SMALL + "--max-length 20 --output cut")
    assert status == 0 and "answers are cut at max_length=20" in said


def test_a_loss_that_is_not_finite_is_named(palu, work, tok):
    write_model(work / "broken", small.model(tok))
    weights = load_file(work / "broken" / "model.safetensors")
    weights["lm_head.weight"][0] = float("nan")
    save_file(weights, work / "broken" / "model.safetensors", metadata={"format": "pt"})
    status, _, error = palu(SMALL + "--model broken")
    assert status == 1 and "the model's loss is not finite (nan at token 0" in error
    assert "tofu/forget01_perturbed.json, row '0', field 'answer'" in error


def test_an_empty_set_is_refused(tok):
    with pytest.raises(ValueError, match="file: must hold at least one example"):
        EvalSet.tokenize("file", [], tok, template=Template(), max_length=9)


def test_own_records_have_a_field_all_or_none(work, tok):
    rows = records("Where")
    del rows[1]["paraphrased_answer"]
    write_jsonl(work / "some.jsonl", rows)
    options = {"template": Template(), "max_length": 64}
    with pytest.raises(ValueError, match=r"some\.jsonl, row '1', field 'paraphrased_answer' is"):
        read_sets({"forget": str(work / "some.jsonl")}, tok, **options)

"""`palu evaluate` says what is wrong with its options, files and records, and with a model."""

import pytest
from safetensors.torch import load_file, save_file

from palu.data.template import Template
from palu.demo.people import write_jsonl
from palu.evaluation.datasets import EvalSet, read_sets, tofu_files
from palu.unlearn import save_model
from tests.support import small, tofu_small
from tests.support.tofu_small import SMALL, records


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with all of it."""
    return tofu_small.build(tmp_path_factory.mktemp("tofu"))


@pytest.fixture
def palu(work, monkeypatch, capsys):
    """Runs `palu evaluate` there: (exit status, stdout, stderr)."""
    return tofu_small.evaluate_in(work, monkeypatch, capsys)


def test_files_of_a_split(tmp_path):
    for name in ("forget05.json", "holdout05.json", "world_facts_perturbed.json"):
        (tmp_path / name).write_text("{}")
    files = tofu_files(tmp_path, "forget05")
    assert {k: v.rpartition("/")[2] for k, v in files.items()} == {
        "forget": "forget05.json",
        "holdout": "holdout05.json",
        "wf": "world_facts_perturbed.json",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --forget FILE, or --tofu DIR and --split NAME"),
        (["--tofu", "tofu"], "--tofu needs --split"),
        (["--forget", "x", "--split", "forget01"], "--split 'forget01' is TOFU's: add --tofu"),
        ([*SMALL, "--forget", "x"], "leave --forget, --retain"),
        (["--tofu", "none", "--split", "forget01"], "--tofu 'none': no such folder"),
        (
            ["--tofu", "tofu", "--split", "forget07"],
            "neither tofu/forget07_perturbed.json nor tofu/forget07.json is there",
        ),
        (["--tofu", "tofu", "--split", "../x"], "must be a name such as forget10, not '../x'"),
        ([*SMALL, "--reference-model", "model"], "add --holdout FILE"),
        ([*SMALL, "--holdout", "none.json"], "none.json: no such file"),
        ([*SMALL, "--retain-log", "none.json"], "none.json: no such file"),
        ([*SMALL, "--output", "holdout.json"], "'holdout.json' is a file; name a folder"),
    ],
)
def test_bad_options(palu, words, message):
    status, _, error = palu(*words)
    assert status == 2 and message in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.clear(), "holds no rows"),
        (
            lambda rows: rows[2].pop("perturbed_answer"),
            "row '2', field 'perturbed_answer' is missing",
        ),
        (
            lambda rows: rows[1].update(paraphrased_answer=None),
            "row '1', field 'paraphrased_answer' is missing",
        ),
        (
            lambda rows: rows[1].update(paraphrased_answer=3),
            "row '1', field 'paraphrased_answer' must be a string, got 3",
        ),
        (
            lambda rows: rows[3].update(perturbed_answer=[]),
            "row '3', field 'perturbed_answer' is an empty list",
        ),
        (
            lambda rows: rows[3].update(perturbed_answer=["a", " "]),
            "row '3', field 'perturbed_answer': answer must not be empty",
        ),
        (lambda rows: rows[0].pop("answer"), "field 'answer' is missing"),
    ],
)
def test_bad_records_are_named(palu, work, change, message):
    folder = work / "bad"
    folder.mkdir(exist_ok=True)
    rows = records("Where")
    change(rows)
    write_jsonl(folder / "forget01_perturbed.json", rows)
    status, _, error = palu("--tofu", "bad", "--split", "forget01")
    assert status == 2 and "bad/forget01_perturbed.json" in error and message in error


def test_max_length(palu, work):
    status, _, error = palu(*SMALL, "--max-length", 4)
    assert status == 2 and "max_length=4 leaves no token of the answer" in error
    status, _, said = palu(*SMALL, "--max-length", 20, "--output", "cut")
    assert status == 0 and "answers are cut at max_length=20" in said


def test_a_loss_that_is_not_finite_is_named(palu, work):
    save_model(
        work / "broken", small.model(small.tokenizer()), small.tokenizer(), Template(), made_by="t"
    )
    weights = load_file(work / "broken" / "model.safetensors")
    weights["lm_head.weight"][0] = float("nan")
    save_file(weights, work / "broken" / "model.safetensors", metadata={"format": "pt"})
    status, _, error = palu(*SMALL, "--model", "broken")
    assert status == 1 and "the model's loss is not finite (nan at token 0" in error
    assert "tofu/forget01_perturbed.json, row '0', field 'answer'" in error


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="file: must hold at least one example"):
        EvalSet.tokenize("file", [], small.tokenizer(), template=Template(), max_length=9)


def test_own_records_have_a_field_all_or_none(work):
    rows = records("Where")
    del rows[1]["paraphrased_answer"]
    write_jsonl(work / "some.jsonl", rows)
    tok = small.tokenizer()
    options = {"template": Template(), "max_length": 64}
    with pytest.raises(ValueError, match=r"some\.jsonl, row '1', field 'paraphrased_answer' is"):
        read_sets({"forget": str(work / "some.jsonl")}, tok, **options)
    write_jsonl(work / "some.jsonl", [{**r, "paraphrased_answer": None} for r in rows])
    sets = read_sets({"forget": str(work / "some.jsonl")}, tok, **options)
    assert [*sets["forget"].rows] == ["answer", "perturbed_answer"]

"""`palu evaluate --lm-eval`: lm-evaluation-harness on the loaded model, with tasks of local files.

The harness takes seconds to list its tasks: what runs it is slow, and needs the extra `bench`.
"""

import json
import shutil

import pytest

from palu.evaluation.benchmarks.harness import entries, wanted
from tests.support.benchmark_small import FOLDER, wmdp
from tests.support.command import palu_in, refusal
from tests.support.tofu_small import records

# What `lm_eval.simple_evaluate` (0.4.13) gave for the group `trade` of `task_files` below on
# `tests/data/benchmarks/model` in float32, and the same of a task with two filters.
GROUP = {
    "results": {
        "trade": {
            "alias": "trade",
            "acc,none": 0.4166666666666667,
            "acc_stderr,none": 0.14709210095149152,
        },
        "trade_bio": {"alias": " - bio", "acc,none": 0.5714285714285714, "sample_len": 7},
        "trade_chem": {"alias": " - chem", "acc,none": 0.2, "sample_len": 5},
    },
    "groups": {"trade": {"acc,none": 0.4166666666666667, "acc_stderr,none": 0.14709210095149152}},
    "samples": {
        "trade_bio": [{"doc_id": n, "filter": "none", "acc": a} for n, a in enumerate((1.0, 0.0))],
        "trade_chem": [{"doc_id": 0, "filter": "none", "acc": 0.0}],
    },
}
FILTERS = {
    "results": {
        "sums": {
            "exact_match,strict": 0.25,
            "exact_match_stderr,strict": "N/A",
            "exact_match,loose": 0.75,
            "exact_match_stderr,loose": 0.25,
        }
    },
    "samples": {
        "sums": [
            {"doc_id": 3, "filter": "strict", "exact_match": 0.0},
            {"doc_id": 3, "filter": "loose", "exact_match": 1.0},
        ]
    },
}


def test_entries_of_a_group():
    (name, entry), *others = entries("trade", GROUP).items()
    assert name == "trade/acc" and not others
    assert entry == {
        "agg_value": 0.4166666666666667,
        "stderr": 0.14709210095149152,
        "parts": {"trade_bio": 0.5714285714285714, "trade_chem": 0.2},
        "value_by_index": {
            "trade_bio/0": {"score": 1.0},
            "trade_bio/1": {"score": 0.0},
            "trade_chem/0": {"score": 0.0},
        },
    }


def test_entries_of_a_task_with_filters():
    made = entries("sums", FILTERS)
    assert list(made) == ["sums/exact_match,strict", "sums/exact_match,loose"]
    assert "stderr" not in made["sums/exact_match,strict"]
    assert made["sums/exact_match,loose"]["value_by_index"] == {"3": {"score": 1.0}}
    with pytest.raises(ValueError, match="'other' gave no number"):
        entries("other", FILTERS)
    with pytest.raises(FloatingPointError, match="acc,none is nan"):
        entries("x", {"results": {"x": {"acc,none": float("nan")}}})


def test_options_of_a_harness_that_is_not_asked_for():
    assert wanted(None, None, None) is None
    with pytest.raises(ValueError, match="--lm-eval-options is of --lm-eval"):
        wanted(None, None, "{}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("{", "--lm-eval-options is not JSON"),
        ("[]", "must be a JSON object"),
        ('{"model": "x"}', "'model' must be one of num_fewshot, limit"),
    ],
)
def test_options_that_are_wrong(options, said):
    with pytest.raises((TypeError, ValueError), match=said):
        wanted("mmlu", None, options)


def task_files(folder):
    """WMDP's questions as a group of tasks, with choices of one and of several tokens."""
    folder.mkdir()
    for topic in ("bio", "chem"):
        data = FOLDER / f"wmdp/wmdp-{topic}/test.json"
        (folder / f"{topic}.yaml").write_text(
            f"task: trade_{topic}\n"
            "dataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
            "test_split: test\noutput_type: multiple_choice\n"
            'doc_to_text: "{{question.strip()}}"\ndoc_to_choice: "{{choices}}"\n'
            "doc_to_target: answer\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
        )
    (folder / "group.yaml").write_text(
        "group: trade\ntask: [trade_bio, trade_chem]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    return folder


@pytest.fixture
def palu(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    # The data sets of tasks are read through the cache of `datasets`.
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    task_files(tmp_path / "tasks")
    shutil.copytree(FOLDER / "model", tmp_path / "model")
    run = palu_in(tmp_path, monkeypatch, capsys)
    line = "evaluate --model model --device cpu --dtype float32 --lm-eval-tasks tasks"
    return lambda more, *words: run(f"{line} {more}", *words)


@pytest.mark.slow
def test_tasks_alone(palu, tmp_path):
    status, said, error = palu("--lm-eval trade,trade_bio --output out")
    assert status == 0, error
    log = json.loads((tmp_path / "out/LMEval_EVAL.json").read_text())
    assert {"trade/acc", "trade_bio/acc", "trade_bio/acc_norm"} <= set(log) and "trade/acc" in said
    parts = log["trade/acc"]["parts"]
    assert log["trade/acc"]["agg_value"] == pytest.approx(
        (7 * parts["trade_bio"] + 5 * parts["trade_chem"]) / 12
    )
    scores = [row["score"] for row in log["trade_bio/acc"]["value_by_index"].values()]
    assert len(scores) == len(wmdp()["bio"]) and sum(scores) / 7 == parts["trade_bio"]
    # its own likelihoods of the same choices
    from palu.evaluation.benchmarks import Meter
    from palu.models.wrappers import eval_mode
    from tests.support.benchmark_small import load

    meter = Meter(*load(), batch_size=4)
    asked = [(r["question"].strip(), [f" {c}" for c in r["choices"]]) for r in wmdp()["bio"]]
    with eval_mode(meter.model):
        found = meter.choices("x", asked)
    pairs = zip(wmdp()["bio"], found, strict=True)
    right = [r["answer"] == likely.index(max(likely)) for r, likely in pairs]
    assert right == scores and 0 < sum(right) < 7
    # what is there is not measured again, and other options are another log
    assert palu("--lm-eval trade,trade_bio --output out")[0] == 0
    status, _, error = palu("--lm-eval trade_chem --output out --lm-eval-options", '{"limit": 2}')
    assert status == 2 and "lm_eval_options" in error


@pytest.mark.slow
def test_tasks_beside_other_data(palu, tmp_path):
    (tmp_path / "forget.json").write_text(json.dumps(records("Where", para=False, pert=False)))
    line = "--forget forget.json --max-new-tokens 2 --output out --lm-eval trade_chem"
    status, _, error = palu(line)
    assert status == 0, error
    log = json.loads((tmp_path / "out/TOFU_EVAL.json").read_text())
    assert {"forget_Q_A_Prob", "trade_chem/acc"} <= set(log)
    status, _, error = palu(
        f"--benchmark wmdp --data {FOLDER / 'wmdp'} --split chem --lm-eval trade_chem",
        *("--lm-eval-options", '{"limit": 2}', "--json", "all.json"),
    )
    assert status == 0, error
    summary = json.loads((tmp_path / "all.json").read_text())["summary"]
    assert {"wmdp_chem", "trade_chem/acc"} <= set(summary)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--lm-eval trade_chemo", "no such task; did you mean trade_chem"),
        ("--lm-eval trade --lm-eval-tasks nowhere", "'nowhere': no such folder"),
        ("--lm-eval trade --split x", "--split 'x' is of a benchmark"),
        ("--lm-eval trade --max-new-tokens 3", "--max-new-tokens is not for --lm-eval"),
    ],
)
def test_refusals(palu, tmp_path, line, said):
    palu.folder = tmp_path
    assert said in refusal(palu, line)

"""Evaluation logs beside each other."""

import copy
import io
import json

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from palu.comparison import log_plot
from palu.comparison.logs import compare_logs, logs_frame, read_logs
from palu.evaluation.eval_log import LogError

ANSWERS = ["Ada was born in Paris.", "He is a baker.", "It rains.", "She sings in a choir."]


def a_log(probs, generations=None, *, answers=ANSWERS):
    """The content of a TOFU_EVAL.json in open-unlearning's format."""
    rows = {
        str(n): {"prob": prob, "avg_loss": float(-np.log(prob))} for n, prob in enumerate(probs)
    }
    texts = {
        str(n): {"input": f"question {n}", "ground_truth": truth, "generation": said}
        for n, (truth, said) in enumerate(zip(answers, generations or answers, strict=True))
    }
    return {
        "forget_Q_A_Prob": {"agg_value": float(np.mean(probs)), "value_by_index": rows},
        "forget_Q_A_ROUGE": {"agg_value": 1.0, "value_by_index": texts},
        "forget_quality": {"agg_value": 0.25},
    }


def of_json(probs, ids="0123"):
    """The content of a `palu evaluate --json` file."""
    examples = [
        {"id": i, "answer_probability": prob, "sensitive_probability": None, "generated": "x"}
        for i, prob in zip(ids, probs, strict=True)
    ]
    result = {"count": len(examples), "mean": {}, "examples": examples}
    summary = {"forget_Q_A_Prob": float(np.mean(probs))}
    return {"model": "m", "template": {}, "versions": {}, "forget": result, "summary": summary}


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        return path

    return write


def text_of(table):
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_two_logs_become_a_table_a_csv_and_a_picture(write, tmp_path):
    one = write("npo/TOFU_EVAL.json", a_log([0.9, 0.8, 0.7, 0.6]))
    said = ["Ada was born in Rome.", *ANSWERS[1:]]
    other = write("palu/TOFU_EVAL.json", a_log([0.2, 0.1, 0.1, 0.2], said))
    text = text_of(compare_logs([one, other.parent], tmp_path / "out"))
    assert "npo" in text and "palu" in text and "0.15 *" in text
    rows = pd.read_csv(tmp_path / "out" / "logs.csv").set_index(["log", "metric"])
    row = rows.loc[("palu", "forget_Q_A_Prob")]
    assert (row["rows"], row["value"]) == (4, pytest.approx(0.15))
    assert row["difference"] == pytest.approx(-0.6) and row["difference_high"] < 0
    # measured anew from the texts: 4 of 5 words
    assert rows.loc[("palu", "forget_Q_A_ROUGE"), "value"] == pytest.approx((0.8 + 3) / 4)
    assert rows.loc[("palu", "forget_quality"), "value"] == 0.25
    assert (tmp_path / "out" / "logs.png").read_bytes()[:4] == b"\x89PNG"


def test_a_json_file_has_nothing_to_compare_with_a_retrained_model(write):
    """Its forget quality, as stored, would stand beside those against --retain-log."""
    content = of_json([0.9, 0.8, 0.7, 0.6])
    path, retrained = write("one.json", content), write("r/TOFU_EVAL.json", a_log([0.1] * 4))
    assert len(read_logs([path], retrained)) == 1
    content["summary"]["forget_quality"] = 0.9
    with pytest.raises(LogError, match="has forget_quality, and not the rows"):
        read_logs([write("one.json", content)], retrained)


def test_warnings_name_the_log(write):
    """Of several logs: which one has texts that its stored numbers are not of."""
    good, bad = a_log([0.9, 0.8, 0.7, 0.6]), a_log([0.9, 0.8, 0.7, 0.6])
    for row in bad["forget_Q_A_ROUGE"]["value_by_index"].values():
        row["rougeL_recall"] = 0.5
    path = write("bad.json", bad)
    with pytest.warns(UserWarning, match=f"{path}: metric .*is not that of the stored texts"):
        read_logs([write("good.json", good), path])


def test_one_row_has_no_interval(write):
    logs = read_logs([write(f"{p}.json", of_json([p], "0")) for p in (0.9, 0.2)])
    row = logs_frame(logs, resamples=20).set_index("log").loc["0.2"]
    assert row["difference"] == pytest.approx(-0.7)
    assert row[["low", "high", "difference_low", "difference_high"]].isna().all()


def test_percent_is_not_drawn_as_a_share(write, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        log_plot, "_draw_metrics", lambda axes, logs, shown, names: drawn.extend(names)
    )
    content = a_log([0.9, 0.8, 0.7, 0.6])
    content |= {name: {"agg_value": 0.9} for name in ("verbmem_f", "knowmem_r", "privleak")}
    compare_logs([write("a.json", content)], tmp_path / "out")
    assert drawn == ["forget_Q_A_Prob", "forget_Q_A_ROUGE", "forget_quality"]


def test_intervals_are_those_of_a_bootstrap_over_the_rows(write):
    probs, others = [0.9, 0.8, 0.7, 0.6], [0.2, 0.8, 0.1, 0.2]
    logs = read_logs([write("a.json", a_log(probs)), write("b.json", a_log(others))])
    frame = logs_frame(logs, resamples=4000).set_index(["log", "metric"])
    generator = np.random.default_rng(9)
    drawn = generator.integers(0, 4, size=(4000, 4))
    apart = (np.array(others) - np.array(probs))[drawn].mean(axis=1)
    row = frame.loc[("b", "forget_Q_A_Prob")]
    wanted = np.quantile(apart, [0.025, 0.975])
    assert [row["difference_low"], row["difference_high"]] == pytest.approx(wanted, abs=0.06)


def test_a_difference_that_is_the_same_in_all_rows_is_certain(write):
    probs = [0.9, 0.8, 0.7, 0.6]
    logs = [write("a.json", a_log(probs)), write("b.json", a_log([p - 0.25 for p in probs]))]
    row = logs_frame(read_logs(logs)).set_index(["log", "metric"]).loc[("b", "forget_Q_A_Prob")]
    assert row["low"] < 0.45 < row["high"]
    assert [row["difference_low"], row["difference_high"]] == pytest.approx([-0.25, -0.25])


def test_a_log_and_a_json_file_stand_in_one_table(write):
    log = write("a.json", a_log([0.9, 0.8, 0.7, 0.6]))
    json_file = write("b.json", of_json([0.1, 0.2, 0.1, 0.2]))
    with pytest.warns(UserWarning, match="known by their numbers alone"):
        one, other = read_logs([log, json_file])
    assert other.aggregates["forget_Q_A_Prob"] == pytest.approx(0.15)
    assert one.rows["forget_Q_A_Prob"] == other.rows["forget_Q_A_Prob"]
    assert "forget_sensitive_probability" not in other.values


def test_logs_of_other_rows_are_refused(write):
    log = write("a.json", a_log([0.9, 0.8, 0.7, 0.6]))
    less = write("less.json", a_log([0.9, 0.8, 0.7], answers=ANSWERS[:3]))
    with pytest.raises(LogError, match=r"forget_Q_A_Prob has 3 rows and not 4 as in .*a\.json"):
        read_logs([log, less])
    three = {"forget_Q_A_Prob": copy.deepcopy(a_log([0.9] * 4)["forget_Q_A_Prob"])}
    rows = three["forget_Q_A_Prob"]["value_by_index"]
    rows["4"] = rows.pop("0")
    with pytest.raises(LogError, match=r"forget_Q_A_Prob has row '4' and not '0' as in"):
        read_logs([log, write("b.json", three)])
    texts = ["Ada was born in Rome.", *ANSWERS[1:]]
    other = write("other.json", a_log([0.9, 0.8, 0.7, 0.6], answers=texts))
    with pytest.raises(LogError, match="the true answer of row '0' of forget_Q_A_ROUGE is another"):
        read_logs([log, other])
    unlike = {"MUSE": {"agg_value": 1.0, "value_by_index": {"0": {"score": 1.0}}}}
    with pytest.raises(LogError, match="has no metric that"):
        read_logs([log, write("unlike.json", unlike)])


def test_logs_of_other_data_are_refused_by_what_stands_beside_them(write):
    paths = [write(f"{name}/TOFU_EVAL.json", a_log([0.9, 0.8, 0.7, 0.6])) for name in "ab"]
    for number, path in enumerate(paths):
        beside = {"settings": {"data_forget": str(number)}}
        write(f"{path.parent.name}/palu_evaluate.json", beside)
    with pytest.raises(LogError, match="its forget set is another one than that of"):
        read_logs(paths)
    for name, length in (("a", 40), ("b", 50)):
        beside = {"settings": {"data_forget": "0", "max_new_tokens": length}}
        write(f"{name}/palu_evaluate.json", beside)
    with pytest.warns(UserWarning, match="measured with another max_new_tokens"):
        read_logs(paths)


def test_json_files_of_other_data_are_refused(write):
    one, other = of_json([0.9] * 4), of_json([0.9] * 4)
    one["data"], other["data"] = {"forget": "x"}, {"forget": "y"}
    with pytest.raises(LogError, match="its forget set is another one"):
        read_logs([write("a.json", one), write("b.json", other)])
    one, other = of_json([0.9] * 4), of_json([0.9] * 4, "abcd")
    with pytest.raises(LogError, match="its forget set is another one"):
        read_logs([write("a.json", one), write("b.json", other)])


def test_a_json_file_has_the_rows_of_its_log(write):
    """Which has none of the answer to a plain document, nor of samples where no secret is."""
    log, said = a_log([0.5, 0.4, 0.3, 0.2]), of_json([0.5, 0.4, 0.3, 0.2])
    del log["forget_Q_A_ROUGE"]["value_by_index"]["1"]
    log["forget_sample_leak_rate"] = {"value_by_index": {"0": {"score": 0.5}}}
    for n, example in enumerate(said["forget"]["examples"]):
        example["sample_leak_rate"] = None if n else 0.5
        example["rougeL_recall"] = 1.0
    said["forget"]["examples"][1] |= {"generated": None, "rougeL_recall": None}
    paths = [write("a/TOFU_EVAL.json", log), write("b.json", said)]
    with pytest.warns(UserWarning, match="known by their numbers alone"):
        one, other = read_logs(paths)
    assert one.rows.keys() == other.rows.keys() and one.rows == other.rows


def test_names_tell_logs_apart(write):
    paths = [
        write(f"{name}/evals_forget10/TOFU_EVAL.json", a_log([0.5] * 4)) for name in ("a", "b")
    ]
    assert [log.name for log in read_logs(paths)] == ["a/evals_forget10", "b/evals_forget10"]
    assert read_logs([f"NPO={paths[0]}", paths[1]])[0].name == "NPO"
    with pytest.raises(LogError, match="is given twice"):
        read_logs([paths[0], paths[0]])


def test_a_stored_aggregate_is_not_believed(write):
    content = a_log([0.9, 0.8, 0.7, 0.6])
    lying = copy.deepcopy(content)
    lying["forget_Q_A_Prob"]["agg_value"] = 0.1
    (log,) = read_logs([write("a.json", lying)])
    assert log.aggregates["forget_Q_A_Prob"] == pytest.approx(0.75)


def test_a_metric_that_no_row_has_is_left_out(write):
    log = a_log([0.5] * 4)
    rows = {str(n): {"score": None} for n in range(4)}
    log["forget_repetition"] = {"agg_value": None, "value_by_index": rows}
    (read,) = read_logs([write("a/TOFU_EVAL.json", log)])
    assert "forget_repetition" not in {*read.values, *read.aggregates}
    assert read.values["forget_Q_A_Prob"] == dict.fromkeys("0123", 0.5)


def test_what_is_no_log_is_refused(write, tmp_path):
    with pytest.raises(LogError, match=r"give the TOFU_EVAL\.json beside it"):
        read_logs([write("TOFU_SUMMARY.json", {"forget_Q_A_Prob": 0.5})])
    with pytest.raises(LogError, match=r"has no TOFU_EVAL\.json; name the file"):
        read_logs([tmp_path / ""])
    with pytest.raises(LogError, match="no such file"):
        read_logs([tmp_path / "nothing.json"])
    with pytest.raises(LogError, match="no log is given"):
        read_logs([])

"""`summarize`: real logs to the digit, logs by hand, and logs with something wrong in them."""

import json
import math
import os
from pathlib import Path

import pytest

from palu.evaluation.eval_log import Log, LogError
from palu.evaluation.tofu import UTILITY, derived_entries, summarize

TOFU = Path(os.environ.get("PALU_TOFU", Path(__file__).parents[4] / "shared/data/tofu"))
FULL, RETRAINED = (
    TOFU / "logs" / f"Llama-3.2-1B-Instruct_{name}.TOFU_EVAL.json"
    for name in ("full_evals_forget10", "retain90")
)
real_logs = pytest.mark.skipif(
    not FULL.exists(), reason=f"real logs are not in {FULL.parent}: set PALU_TOFU"
)


def table(**fields):
    rows = [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]
    return {"value_by_index": {str(i): row for i, row in enumerate(rows)}}


def rows(field, values):
    return table(**{field: values})


def by_hand():
    """A log whose aggregates are easy: forget, retain, real authors and world facts, attacks."""
    log = {}
    right = {"prob": [0.5, 0.25], "avg_loss": [math.log(2), math.log(4)]}
    wrong = {"prob": [[0.5, 0.125], [0.5, 0.5]], "avg_loss": [[math.log(2), math.log(8)]]}
    wrong["avg_loss"].append([math.log(2)] * 2)
    texts = {"ground_truth": ["one two", "one"], "generation": ["Two.", "one two"]}
    for name in ("forget", "retain", "ra", "wf"):
        log[f"{name}_Q_A_Prob"] = table(**right)
        log[f"{name}_Q_A_PERT_Prob"] = table(**wrong)
        log[f"{name}_Q_A_ROUGE"] = table(rougeL_recall=[0.5, 1.0], **texts)
        if name in ("forget", "retain"):
            log[f"{name}_Q_A_PARA_Prob"] = table(**right)
    log["mia_min_k"] = {"forget": table(score=[1.0, 2.0]), "holdout": table(score=[3.0, 2.0])}
    log |= derived_entries(Log(log, "by hand"))
    return log


def agreement(log, summary):
    """Largest relative difference between stored and computed aggregates."""
    pairs = {k: (summary[k], log[k]["agg_value"]) for k in summary}
    assert all((a is None) == (b is None) for a, b in pairs.values()), pairs
    return max(abs(a - b) / abs(b) for a, b in pairs.values() if b is not None)


@real_logs
@pytest.mark.parametrize(("path", "retrained"), [(FULL, RETRAINED), (RETRAINED, None)])
def test_real_logs_to_the_digit(path, retrained, recwarn):
    log = json.loads(path.read_text())
    summary = summarize(path, retrained)
    assert list(summary) == list(log) and agreement(log, summary) < 1e-12
    assert not recwarn.list  # every ROUGE recall is that of the stored texts
    short = json.loads(path.with_name(path.name.replace("_EVAL", "_SUMMARY")).read_text())
    assert all(summary[k] == pytest.approx(v, rel=1e-12) for k, v in short.items())


@real_logs
@pytest.mark.parametrize(("path", "retrained"), [(FULL, RETRAINED), (RETRAINED, None)])
def test_real_logs_from_probabilities_alone(path, retrained):
    """Truth ratios and all that follows, row by row, from the entries that the model made."""
    log = json.loads(path.read_text())
    derived = derived_entries(Log(log, "x"))
    measured = {k: v for k, v in log.items() if k not in derived}
    assert len(measured) < len(log)
    made = derived_entries(Log(measured, "x"), retrained and Log.read(retrained, "retrained"))
    assert measured.keys() | made.keys() == log.keys()
    if retrained is None:
        assert made.pop("forget_quality")["agg_value"] is None
    for metric, entry in made.items():
        assert entry["agg_value"] == pytest.approx(log[metric]["agg_value"], rel=1e-12), metric
        for index, row in log[metric].get("value_by_index", {}).items():
            assert entry["value_by_index"][index] == pytest.approx(row, rel=1e-12), (metric, index)


def test_by_hand():
    log = by_hand()
    got = summarize(log)
    assert list(got) == list(log)
    assert got["forget_Q_A_Prob"] == 0.375
    assert got["forget_Q_A_PERT_Prob"] == pytest.approx((0.3125 + 0.5) / 2)
    assert got["forget_Q_A_ROUGE"] == 0.75
    # ratios 1/4 over 1/2, and 1/2 over 1/4
    assert got["forget_truth_ratio"] == pytest.approx((0.5 + 0.5) / 2, abs=1e-8)
    assert got["retain_Truth_Ratio"] == pytest.approx((0.5 + 0) / 2, abs=1e-8)
    share = (0.5 / 1.125 + 0.25 / 1.25) / 2
    assert got["ra_Q_A_Prob_normalised"] == pytest.approx(share, abs=1e-9)
    nine = [0.375, 0.75, 0.25, share, 0.75, 0.25, share, 0.75, 0.25]
    assert got["model_utility"] == pytest.approx(9 / sum(1 / v for v in nine), rel=1e-7)
    assert got["mia_min_k"] == 3.5 / 4
    assert got["privleak"] == pytest.approx(100 * (0.5 - 0.875) / 0.5)
    assert got["forget_quality"] is None
    other = by_hand()
    other["mia_min_k"]["holdout"] = rows("score", [0.0, 1.0])  # AUC 1/8
    other["forget_truth_ratio"] = rows("score", [8.0, 9.0])  # the model's are 1/2 and 2
    got = summarize(log, other)
    assert got["forget_quality"] == pytest.approx(2 / 6)
    assert got["privleak"] == pytest.approx(100 * (0.125 - 0.875) / 0.875)


def test_stored_aggregates_are_not_read():
    log = by_hand()
    for entry in log.values():
        entry["agg_value"] = -1.0
    assert summarize(log) == summarize(by_hand())


def test_what_was_not_measured_is_left_out():
    log = {
        "forget_Q_A_Prob": rows("prob", [0.5, None, 0.1]),
        "exact_memorization": rows("score", [1]),
        "forget_Q_A_PERT_Prob": rows("prob", [[0.5, None, 0.1], [None], None, 0.2]),
    }
    log["forget_Q_A_Prob"]["value_by_index"]["9"] = None
    assert [*summarize(log).values()] == pytest.approx([0.3, 1.0, 0.25])


def test_pairs_are_made_by_index_and_need_both():
    log = by_hand()
    log["forget_Q_A_PARA_Prob"]["value_by_index"]["0"] = None
    made = derived_entries(Log(log, "x"))["forget_truth_ratio"]["value_by_index"]
    assert list(made) == ["1"] and made["1"]["score"] == pytest.approx(2, abs=1e-8)
    del log["forget_Q_A_PARA_Prob"]["value_by_index"]["0"]
    with pytest.raises(ValueError, match="must hold the same rows; row '0' is in one of them"):
        derived_entries(Log(log, "x"))


def test_order_of_rows_does_not_matter():
    log = by_hand()
    for entry in log.values():
        if "value_by_index" in entry:
            entry["value_by_index"] = dict(reversed(entry["value_by_index"].items()))
    other = by_hand()
    assert summarize(log, other) == pytest.approx(summarize(by_hand(), other), rel=1e-14)
    ratios = derived_entries(Log(log, "x"))["wf_Truth_Ratio"]["value_by_index"]
    assert ratios["0"]["score"] == pytest.approx(0.5, abs=1e-8)


def test_unknown_metrics_are_left_out_and_named():
    log = {"exact_memorization": rows("score", [0.5]), "my_metric": 3, "forget_knowmem_ROUGE": {}}
    with pytest.warns(UserWarning, match="left out.*: my_metric, forget_knowmem_ROUGE"):
        assert summarize(log) == {"exact_memorization": 0.5}
    with pytest.raises(ValueError, match=r"eval_log: has none of TOFU's metrics, only \['x'\]"):
        summarize({"x": {}})


def test_rouge_is_of_the_texts_where_there_are_any():
    log = {"ra_Q_A_ROUGE": by_hand()["ra_Q_A_ROUGE"]}
    log["ra_Q_A_ROUGE"]["value_by_index"]["1"]["rougeL_recall"] = 0.2
    with pytest.warns(UserWarning, match="rougeL_recall of 1 of 2 rows.*first: row '1'"):
        assert summarize(log) == {"ra_Q_A_ROUGE": 0.75}
    del log["ra_Q_A_ROUGE"]["value_by_index"]["1"]["generation"]
    assert summarize(log) == {"ra_Q_A_ROUGE": 0.35}
    lists = {"rougeL_recall": [1.0, 0.5], "ground_truth": ["a", "b c"], "generation": ["a", "c"]}
    assert summarize({"forget_Q_A_PERT_ROUGE": {"value_by_index": {"0": lists}}}) == {
        "forget_Q_A_PERT_ROUGE": 0.75
    }


def test_a_retrained_log_of_another_split_is_told():
    log, other = by_hand(), by_hand()
    other["forget_truth_ratio"] = rows("score", [1.0, 2.0, 3.0])
    with pytest.warns(UserWarning, match="2 truth ratios of eval_log with 3 of retain_log"):
        summarize(log, other)


def row(metric, index="1", **values):
    return lambda log: log[metric]["value_by_index"][index].update(values)


def entry(metric, value):
    return lambda log: log.update({metric: value})


def without(metric):
    return lambda log: log.pop(metric)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (row("forget_Q_A_Prob", prob=math.nan), "row '1', field 'prob' is not finite: nan"),
        (row("wf_Q_A_PERT_Prob", prob=[0.1, math.inf]), "field 'prob' is not finite: inf"),
        (row("ra_Q_A_Prob", prob="0.5"), "field 'prob' must be a number, got '0.5'"),
        (
            lambda log: log["retain_Truth_Ratio"]["value_by_index"].update({"0": {"x": 1}}),
            "metric 'retain_Truth_Ratio', row '0' has no field 'score'",
        ),
        (entry("retain_Q_A_Prob", {"value_by_index": {}}), "'value_by_index' is empty"),
        (entry("retain_Q_A_Prob", {"agg_value": 0.5}), "'retain_Q_A_Prob' has no 'value_by_index'"),
        (entry("retain_Q_A_Prob", 0.5), "must be an object with 'value_by_index', got 0.5 (a summ"),
        (
            entry("forget_Q_A_Prob", rows("prob", [None, None])),
            "metric 'forget_Q_A_Prob': no row has a value in field 'prob'",
        ),
        (
            without("forget_truth_ratio"),
            "has no metric 'forget_truth_ratio', which forget_quality needs",
        ),
        (without("mia_min_k"), "has no metric 'mia_min_k', which privleak needs"),
        (
            lambda log: log["mia_min_k"].pop("holdout"),
            "metric 'mia_min_k', part 'holdout' has no 'value_by_index'",
        ),
        *[
            (without(name), f"has no metric '{name}', which model_utility needs")
            for name in UTILITY
        ],
    ],
)
def test_what_is_wrong_is_named(change, message, tmp_path):
    log = by_hand()
    change(log)
    path = tmp_path / "log.json"
    path.write_text(json.dumps(log))
    for place, given in (("eval_log", log), (path, path)):
        with pytest.raises(LogError) as error:
            summarize(given)
        assert str(error.value).startswith(f"{place}: ") and message in str(error.value)


@pytest.mark.parametrize("metric", ["forget_truth_ratio", "mia_min_k"])
def test_what_the_retrained_log_lacks_is_named(metric):
    other = by_hand()
    del other[metric]
    with pytest.raises(ValueError, match=f"retain_log: has no metric '{metric}', which .* needs"):
        summarize(by_hand(), other)


def test_files_that_are_no_logs(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json: no such file"):
        summarize(tmp_path / "none.json")
    path = tmp_path / "log.json"
    for text, message in (("{", "not readable JSON"), ("[1]", "must be an object, got list")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            summarize(path)


PROB = '{"forget_Q_A_Prob": {"value_by_index": {"0": {"prob": %s}}}}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, r"a\.json: not readable JSON: nested too deeply"),
        ('{"a": 1, "a": 2}', "an object has the key 'a' twice"),
        (PROB % '1, "prob": 2', "an object has the key 'prob' twice"),
        (PROB % ("9" * 5000), "an integer has too many digits"),
        (PROB % ("9" * 400), r"row '0', field 'prob' is not finite: 9{9,20}\.\.\.9{9,20}$"),
        (PROB % "1e400", "field 'prob' is not finite: inf"),
        (PROB % ("[" * 900 + "]" * 900), "field 'prob' must be a number, got .{1,100}$"),
        ('{"forget_Q_A_Prob": %s}' % ("[" * 900 + "]" * 900), "must be an object .{1,100}summary"),
    ],
)
def test_json_that_is_out_of_measure(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(LogError, match=message):
        summarize(path)


def test_a_mean_of_numbers_whose_sum_is_infinite():
    rows = {str(n): {"prob": [1e308, 1e308]} for n in range(4)}
    assert summarize({"forget_Q_A_Prob": {"value_by_index": rows}}) == {"forget_Q_A_Prob": 1e308}

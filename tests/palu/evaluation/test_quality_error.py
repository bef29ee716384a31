"""The error of forget quality and the power of its test, against scipy and plain simulation."""

import json

import numpy as np
import pytest
from scipy.stats import ks_2samp

from palu.evaluation.eval_log import Log
from palu.evaluation.quality_error import (
    detectable_factor,
    error_sentence,
    ks_interval,
    ks_statistics,
    quality_error,
)
from palu.evaluation.tofu import summarize
from tests.palu.evaluation.test_tofu import FULL, RETRAINED, real_logs


def truth_ratios(n, seed=0, shift=0.0):
    return np.exp(np.random.default_rng(seed).normal(shift, 0.7, n))


def log_of(ratios):
    rows = {str(i): {"score": float(value)} for i, value in enumerate(ratios)}
    return {"forget_truth_ratio": {"value_by_index": rows}, "forget_quality": {"agg_value": 0.5}}


def test_statistics_are_scipys():
    """Tied values among them, which stand in both samples."""
    generator = np.random.default_rng(0)
    for values in (6, 1000):
        one, other = generator.integers(values, size=(2, 30, 17)).astype(float)
        wanted = [ks_2samp(*pair).statistic for pair in zip(one, other, strict=True)]
        assert ks_statistics(one, other) == pytest.approx(wanted, abs=1e-12)
    assert ks_statistics(np.ones((1, 4)), np.ones((1, 4))) == 0


def test_the_interval_is_of_other_questions():
    """Of questions drawn anew from the same world, p is in it about as often as it says."""
    held, spread = 0, []
    for seed in range(60):
        both = np.random.default_rng(seed).normal(size=(3, 80))
        model, retrained = np.exp(both[0] + both[1] + 0.9), np.exp(both[0] + both[2])
        known = ks_interval(model[:40], retrained[:40], draws=200)
        assert known["statistic"] == ks_2samp(model[:40], retrained[:40]).statistic
        held += known["p_low"] <= ks_2samp(model[40:], retrained[40:]).pvalue <= known["p_high"]
        spread.append(known["p_high"] / known["p_low"])
    assert 0.8 <= held / 60 <= 0.99
    assert np.median(spread) > 30  # 40 questions say little


def test_the_factor_is_found_as_often_as_it_says():
    retrained = truth_ratios(40)
    factor = detectable_factor(retrained)
    generator = np.random.default_rng(7)

    def found(by):
        draws = [generator.choice(retrained, (2, 40)) for _ in range(600)]
        return np.mean([ks_2samp(one, other * by).pvalue < 0.05 for one, other in draws])

    assert found(factor) == pytest.approx(0.8, abs=0.06)
    assert found(1.0) < 0.06 and found(factor**0.5) < 0.5
    assert detectable_factor(truth_ratios(400)) < factor
    assert detectable_factor(retrained) == factor  # nothing is drawn otherwise
    assert detectable_factor(truth_ratios(3)) is None  # 1/10 is the smallest p-value of 3
    assert detectable_factor(np.array([1e-3, 1.0, 1e3, 1e6])) > 1e3


def test_it_stands_beside_forget_quality():
    model, retrained = log_of(truth_ratios(40, 1, 0.5)), log_of(truth_ratios(40))
    entry = quality_error(Log(model, "model"), Log(retrained, "retrained"))
    assert entry["rows"] == 40 and entry["level"] == 0.05 and entry["power"] == 0.8
    low, high = entry["interval"]
    assert 0 <= low < entry["agg_value"] < high <= 1
    said = error_sentence(model | {"forget_ks_statistic": entry})
    assert "is of 40 questions; of 40 others like these it may be between" in said
    model["forget_ks_statistic"] = entry
    got = summarize(model, retrained)
    assert got["forget_ks_statistic"] == entry["agg_value"]
    assert summarize(model)["forget_ks_statistic"] is None
    del retrained["forget_truth_ratio"]["value_by_index"]["3"]
    with pytest.warns(UserWarning, match="model and retrained have truth ratios of other rows"):
        assert quality_error(Log(model, "model"), Log(retrained, "retrained")) is None
    assert error_sentence({"forget_quality": {"agg_value": None}}) is None


@real_logs
def test_real_logs_of_400_and_of_40_questions():
    logs = [Log.read(path, "log") for path in (FULL, RETRAINED)]
    entry = quality_error(*logs)
    ratios = [
        [row["score"] for row in log.metrics["forget_truth_ratio"]["value_by_index"].values()]
        for log in logs
    ]
    test = ks_2samp(*ratios)
    assert entry["agg_value"] == test.statistic == 0.35
    low, high = entry["p_value_interval"]
    assert low < test.pvalue < high < 1e-10
    first = [log_of(np.array(one)[:40]) for one in ratios]
    small = quality_error(*(Log(json.loads(json.dumps(one)), "log") for one in first))
    assert small["p_value_interval"][1] > 1000 * high
    assert small["detectable_factor"] > entry["detectable_factor"] > 1

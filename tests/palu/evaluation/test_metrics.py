"""Every metric against numbers worked out by hand."""

import math
import zlib

import numpy as np
import pytest

from palu.evaluation import metrics as m


def test_probability_is_the_geometric_mean():
    assert m.probability([math.log(2), math.log(8)]) == pytest.approx(0.25)
    assert m.probability([0.0]) == 1


def test_rouge_by_hand():
    # cat, cats and like, liked are one word each after stemming; 5 of 6 words are there, 4 in order
    got = m.rouge("he likes the black cats today", "Today he liked the black cat, I think!")
    # 8 generated words: precisions 6/8 and 5/8
    assert got == pytest.approx(
        {
            "rouge1_recall": 6 / 6,
            "rouge1_f1": 2 * 6 / (6 + 8),
            "rougeL_recall": 5 / 6,
            "rougeL_f1": 2 * 5 / (6 + 8),
        }
    )
    assert set(m.rouge("山田太郎", "山田太郎").values()) == {0.0}


def test_truth_ratio_by_hand():
    # wrong answers of probability 1/2 and 1/8: geometric mean 1/4, over 1/2
    ratio = m.truth_ratio([math.log(2), math.log(8)], math.log(2))
    assert ratio == pytest.approx(0.25 / (0.5 + 1e-10), rel=1e-14)
    # the 1e-10 is all that is left of a right answer that is out of the question
    assert m.truth_ratio([0.0], 1e3) == pytest.approx(1e10, rel=1e-12)
    assert m.forget_truth_ratio([0.5, 4.0, 1.0]) == pytest.approx((0.5 + 0.25 + 1) / 3, abs=1e-9)
    assert m.forget_truth_ratio([0.0, 0.0]) == 0
    assert m.kept_truth_ratio([0.5, 4.0, 0.0]) == pytest.approx((0.5 + 0 + 1) / 3)


def test_normalised_probability_by_hand():
    assert m.normalised_probability(0.3, [0.1, 0.2]) == pytest.approx(0.5, abs=1e-9)
    assert m.normalised_probability(0.0, [0.0]) == 0


def test_exact_memorization_and_extraction_strength():
    cases = {
        (True, True, True, True): (1, 1),
        (False, True, True, True): (0.75, 0.75),
        (True, False, True, True): (0.75, 0.5),
        (True, True, True, False): (0.75, 0.25),  # no start matches to the end: the last index
        (False,) * 4: (0, 0.25),
        (False, True): (0.5, 0.5),
        (False,): (0, 1),  # the last index is 0
        (True,): (1, 1),
        (): (None, 0),
    }
    for correct, (exact, strength) in cases.items():
        assert m.exact_memorization(correct) == exact, correct
        assert m.extraction_strength(np.array(correct, dtype=bool)) == strength, correct


def test_repetition_and_runs_by_hand():
    # a b c d a b c d: five 4-grams, and the last is the first again
    assert m.repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert m.repetition([7] * 6) == pytest.approx(2 / 3) and m.repetition([1, 2, 3, 4]) == 0
    assert m.repetition([1, 2, 3]) is None
    assert m.repetition([1, 1, 2], n=1) == pytest.approx(1 / 3)
    assert [m.longest_run(t) for t in ([], [5], [5, 6, 5], [1, 2, 2, 2, 1, 1])] == [0, 1, 1, 3]


def test_what_fell_apart_by_hand():
    text = [*range(20)]
    assert not m.fell_apart(text, ended=True)
    assert m.fell_apart(text, ended=False) and m.fell_apart([], ended=True)
    assert not m.fell_apart([*text, *[7] * 7], ended=True)  # 24 4-grams, of which 3 again
    assert m.fell_apart([*text, *[7] * 8], ended=True)
    assert m.fell_apart([1, 2, 3, 4, 5, 6] * 2, ended=True)  # 3 of 9 4-grams were there before
    assert not m.fell_apart([1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 5, 8], ended=True)  # 2 of 10


def test_distinct_by_hand():
    answers = [[1, 2, 1], [2, 1]]  # five tokens; 1, 2; 1 2, 2 1; 1 2 1
    assert [m.distinct(answers, n) for n in (1, 2, 3)] == [2 / 5, 2 / 5, 1 / 5]
    assert m.distinct([[], []], 1) is None
    assert m.distinct([[1, 2], [3, 4]], 2) == 2 / 4  # 2 3 is in no answer


def test_span_probabilities_by_hand():
    nll = [math.log(10), math.log(2), math.log(8)]
    got = m.span_probabilities(nll)
    assert got == pytest.approx(
        {"mean": 160 ** (-1 / 3), "joint": 1 / 160, "first": 0.1, "rest": 0.25}
    )
    alone = m.span_probabilities(nll[:1])
    assert alone["first"] == alone["mean"] == alone["joint"] == pytest.approx(0.1)
    assert alone["rest"] is None


def test_forget_quality_by_hand():
    # KS statistic 1 of 3 against 3: both of the 20 orders that keep them apart
    assert m.forget_quality([1, 2, 3], [4, 5, 6]) == pytest.approx(2 / 20)
    assert m.forget_quality([1, 2, 3], [1, 2, 3]) == 1
    # statistic 1/2 of 2 against 2: every one of the 6 orders has as much
    assert m.forget_quality([1, 3], [2, 4]) == pytest.approx(1)


def test_model_utility_is_the_harmonic_mean():
    assert m.model_utility([0.5, 0.25, 1.0]) == pytest.approx(3 / 7)
    assert m.model_utility([0.5, 0.0]) == 0
    with pytest.raises(ValueError, match=r"values must not be negative, got -0\.1"):
        m.model_utility([0.5, -0.1])


def test_min_k_takes_the_lowest():
    log_probs = [-1.0, -5.0, -2.0, -3.0, -0.5]
    assert m.min_k_score(log_probs) == pytest.approx((5 + 3) / 2)  # 0.4 * 5 = 2 of them
    assert m.min_k_score(log_probs, k=0.1) == 5  # at least one
    assert m.min_k_score(log_probs, k=0.59) == pytest.approx(4)  # rounded down
    assert m.min_k_score([], k=1) == 0
    with pytest.raises(ValueError, match="k must be above 0 and at most 1, got 0"):
        m.min_k_score(log_probs, k=0)


def test_zlib_and_reference_scores():
    text = "Äda " * 20
    assert m.zlib_score(3.0, text) == 3.0 / len(zlib.compress(text.encode()))
    assert m.reference_score(3.0, 1.0) == 2.0


def test_auc_counts_pairs():
    # pairs (holdout above forget): 3 > 1, 3 > 2, 2 > 1 and a tie
    assert m.auc([1, 2], [3, 2]) == pytest.approx(3.5 / 4)
    assert m.auc([1, 2], [3, 4]) == 1 and m.auc([3, 4], [1, 2]) == 0
    rng = np.random.default_rng(0)
    forget, holdout = rng.integers(0, 9, 40), rng.integers(2, 12, 30)
    pairs = [(h > f) + (h == f) / 2 for f in forget for h in holdout]
    assert m.auc(forget, holdout) == pytest.approx(np.mean(pairs), rel=1e-14)


def test_privleak_by_hand():
    assert m.privleak(0.75) == pytest.approx(-50, abs=1e-6)
    assert m.privleak(0.25, 0.4) == pytest.approx(100 * 0.15 / 0.6, abs=1e-6)
    assert m.privleak(0.5, 1.0) == pytest.approx(0.5e12)


NAN = float("nan")


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("probability", ([],)),
        ("probability", ([1.0, NAN],)),
        ("truth_ratio", ([], 1.0)),
        ("truth_ratio", ([1.0], math.inf)),
        ("forget_truth_ratio", ([],)),
        ("kept_truth_ratio", ([NAN],)),
        ("normalised_probability", (0.5, [])),
        ("forget_quality", ([], [1.0])),
        ("model_utility", ([1.0, NAN],)),
        ("auc", ([], [1.0])),
        ("zlib_score", (NAN, "x")),
        ("privleak", (NAN,)),
    ],
)
def test_nothing_is_made_of_nothing_or_of_nan(function, arguments):
    with pytest.raises(ValueError, match=r"at least one number|must be finite, got (nan|inf)"):
        getattr(m, function)(*arguments)

"""What the numbers of an evaluation are: one small function each, on plain numbers.

Sources: TOFU (Maini et al. 2024, arXiv 2401.06121) and open-unlearning, whose definitions these
are. A loss is a mean negative log-likelihood in nats. Every function raises ValueError for an empty
input and for a number that is not finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

EPSILON = 1e-10
"""What TOFU adds to a divisor that may be 0."""


def probability(nll: Sequence[float]) -> float:
    """`exp(-mean(nll))`: an answer's probability, to the power of 1 over its length.

    Args:
        nll: negative log-likelihood of each token of the answer, its end token included.
    """
    return float(np.exp(-finite_numbers("nll", nll).mean()))


def rouge(answer: str, generated: str) -> dict[str, float]:
    """ROUGE-1 and ROUGE-L of `generated` against `answer` (Lin 2004; rouge-score, stemmer on).

    Recall is the share of the answer's words that are found again (ROUGE-L: in the longest common
    subsequence), precision the share of the generated words, F1 their harmonic mean. Words are runs
    of a-z and 0-9 in lower case: a text in another script has none, and every number is 0.

    Returns:
        `rouge1_recall`, `rouge1_f1`, `rougeL_recall`, `rougeL_f1`.
    """
    scores = _scorer().score(answer, generated)
    return {
        f"{kind}_{name}": getattr(scores[kind], field)
        for kind in ("rouge1", "rougeL")
        for name, field in (("recall", "recall"), ("f1", "fmeasure"))
    }


def truth_ratio(perturbed_losses: Sequence[float], paraphrase_loss: float) -> float:
    """`exp(-mean(perturbed_losses)) / (exp(-paraphrase_loss) + 1e-10)`: how likely wrong answers
    are beside the right one in other words (TOFU; the wrong answers' geometric mean).

    Args:
        perturbed_losses: loss of each wrong answer.
        paraphrase_loss: loss of the paraphrased answer; of the answer where there is none.
    """
    wrong = finite_numbers("perturbed_losses", perturbed_losses).mean()
    right = finite_numbers("paraphrase_loss", [paraphrase_loss])[0]
    return float(np.exp(-wrong) / (np.exp(-right) + EPSILON))


def forget_truth_ratio(ratios: Sequence[float]) -> float:
    """`mean(min(r, 1 / (r + 1e-10)))`: near 1 where right and wrong answers are alike, as they
    should be once a set is forgotten."""
    r = finite_numbers("ratios", ratios)
    return float(np.minimum(r, 1 / (r + EPSILON)).mean())


def kept_truth_ratio(ratios: Sequence[float]) -> float:
    """`mean(max(0, 1 - r))`: near 1 where right answers are likelier than wrong ones, as they
    should be in every set but the forgotten one."""
    return float(np.maximum(0, 1 - finite_numbers("ratios", ratios)).mean())


def normalised_probability(right: float, wrong: Sequence[float]) -> float:
    """`p / (p + sum of wrong + 1e-10)`: the right answer's share among the choices (TOFU).

    Args:
        right: probability of the answer.
        wrong: probability of each wrong answer.
    """
    p = finite_numbers("right", [right])[0]
    return float(p / (p + finite_numbers("wrong", wrong).sum() + EPSILON))


def exact_memorization(hits: Sequence[bool]) -> float | None:
    """Share of the answer's tokens that are the likeliest next one after the true ones before them
    (Tirumala et al. 2022, arXiv 2205.10770).

    Args:
        hits: whether the argmax is right, for each token but the end token. None when there is
            none.
    """
    return float(np.mean(np.asarray(hits, dtype=bool))) if len(hits) else None


def extraction_strength(hits: Sequence[bool]) -> float:
    """`1 - s / T`, with s the smallest start from which every argmax to the end is right, and the
    last index where there is none (Carlini et al. 2021, arXiv 2012.07805, as open-unlearning
    measures it).

    Args:
        hits: as for `exact_memorization`; T of them. 0 when there is none.
    """
    if not len(hits):
        return 0.0
    wrong = np.flatnonzero(~np.asarray(hits, dtype=bool))
    start = min(wrong[-1] + 1, len(hits) - 1) if wrong.size else 0
    return float(1 - start / len(hits))


def forget_quality(ratios: Sequence[float], retain_ratios: Sequence[float]) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test (`scipy.stats.ks_2samp`): whether forget
    truth ratios look like those of a model that never saw the forget set (TOFU).

    Args:
        ratios: truth ratios of the forget set under the model.
        retain_ratios: the same under the retrained model. The numbers may differ.
    """
    from scipy.stats import ks_2samp

    model, retrained = (
        finite_numbers("ratios", ratios),
        finite_numbers("retain_ratios", retain_ratios),
    )
    return float(ks_2samp(model, retrained).pvalue)


def model_utility(values: Sequence[float]) -> float:
    """Harmonic mean `n / sum(1 / v)` of the utility numbers (TOFU: nine of them, see
    `palu.evaluation.tofu.UTILITY`); 0 when one is 0.

    Raises:
        ValueError: also for a negative number.
    """
    v = finite_numbers("values", values)
    if (v < 0).any():
        raise ValueError(f"values must not be negative, got {v.min()}")
    return 0.0 if (v == 0).any() else float(len(v) / (1 / v).sum())


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=True)


def finite_numbers(name: str, values: Sequence[float]) -> np.ndarray:
    """`values` as float64 `[N]`. Raises ValueError, with `name`, for none and for one that is not
    finite."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name} must be a list of at least one number, got {values!r}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {array[~np.isfinite(array)][0]}")
    return array

"""Was a text trained on? Scores of membership inference, and what they come to.

Every score is signed as a loss is: the higher, the less likely the text was trained on. Sources are
named with each; the signs, the defaults and the AUC's direction are open-unlearning's.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from palu.evaluation.metrics import EPSILON, finite_numbers

MIN_K = 0.4
"""Share of the tokens that min-k and min-k++ look at."""


def zlib_score(loss: float, text: str) -> float:
    """`loss / bytes of zlib-compressed text` (Carlini et al. 2021, arXiv 2012.07805).

    Args:
        loss: mean negative log-likelihood of the answer, end token included.
        text: the answer, UTF-8 when compressed.
    """
    return float(finite_numbers("loss", [loss])[0] / len(zlib.compress(text.encode("utf-8"))))


def min_k_score(log_probs: Sequence[float], k: float = MIN_K) -> float:
    """`-mean of the max(1, floor(k T)) lowest log-probabilities` (Shi et al. 2023, arXiv
    2310.16789); 0 where there is no token.

    Args:
        log_probs: of the answer's T tokens, end token left out.
        k: share of the tokens, in (0, 1].
    """
    if not 0 < k <= 1:
        raise ValueError(f"k must be above 0 and at most 1, got {k}")
    if not len(log_probs):
        return 0.0
    ordered = np.sort(finite_numbers("log_probs", log_probs))
    return float(-ordered[: max(1, int(len(ordered) * k))].mean())


def min_k_plus_plus_score(standardised: Sequence[float], k: float = MIN_K) -> float:
    """Min-k of standardised log-probabilities `(log p - mu) / sqrt(max(sigma^2, 1e-6))` (Zhang et
    al. 2024, arXiv 2404.02936).

    mu and sigma^2 are mean and variance of `log p` over the vocabulary under the model's own
    distribution at that place: see `palu.evaluation.inference.AnswerScores`.
    """
    return min_k_score(standardised, k)


def reference_score(loss: float, reference_loss: float) -> float:
    """`loss - reference_loss`: beside a model that was not trained on the text (Carlini et al.
    2021, arXiv 2012.07805)."""
    model, other = finite_numbers("losses", [loss, reference_loss])
    return float(model - other)


def auc(forget: Sequence[float], holdout: Sequence[float]) -> float:
    """Area under the ROC curve of scores with forget = 0 and holdout = 1: the chance that a holdout
    score is above a forget score, ties counting half.

    1: the model knows the forget set and not the holdout set; 0.5: no difference.
    """
    low, high = np.sort(finite_numbers("forget", forget)), finite_numbers("holdout", holdout)
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(below.sum() / (2 * low.size * high.size))


def privleak(auc_value: float, auc_ref: float = 0.5) -> float:
    """`100 (auc_ref - auc) / (1 - auc_ref + 1e-10)` on the min-k AUC (MUSE, Shi et al. 2024, arXiv
    2407.06460; its AUC is 1 minus ours).

    0 is right; far below 0 the forget set is still known, far above it shows that it was removed.

    Args:
        auc_value: AUC of the model.
        auc_ref: AUC of the retrained model; 0.5 where none is known.
    """
    value, ref = finite_numbers("auc values", [auc_value, auc_ref])
    return float(100 * (ref - value) / (1 - ref + EPSILON))

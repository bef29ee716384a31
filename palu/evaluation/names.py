"""Names of what is measured: one place for results, logs, tables and the files of comparisons.

Names of a log's own metrics, beside open-unlearning's, are `SET_NAME` with the names that stand
here: `forget_repetition`, `retain_fluency`.
"""

from __future__ import annotations

METRICS = ("answer_probability", "sensitive_probability", "rougeL_recall", "exact_memorization")
"""Columns of the table of `palu.evaluation.metrics_table`."""
MORE_METRICS = ("extraction_strength", "rouge1_recall", "rouge1_f1", "rougeL_f1")

TEXT = ("fluency", "repetition", "longest_run", "ended", "fell_apart", "answer_tokens")
"""Of the greedy answer, whatever it says."""
SPANS = ("span_probability", "span_joint_probability")
SPANS += ("span_first_probability", "span_rest_probability")
"""Means over the spans of an example."""
SAMPLE_LEAKS = "sample_leak_rate"
PER_EXAMPLE = (*METRICS, *MORE_METRICS, *TEXT, *SPANS, SAMPLE_LEAKS)
"""Numbers of each example, None where it has none: keys of `mean` of `evaluate_examples`."""

DISTINCT = ("distinct_1", "distinct_2", "distinct_3")
CORPUS = (*DISTINCT, "secrets_said", "secrets_sampled")
"""Numbers of a whole set: keys of `numbers` of `evaluate_examples`."""

KS_STATISTIC = "forget_ks_statistic"
"""Of a log, beside `forget_quality`, with the error of both and the power of the test."""

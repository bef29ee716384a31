"""How much a model still knows: TOFU's metrics of models, and aggregates of evaluation logs."""

from palu.evaluation.evaluator import METRICS, evaluate_examples
from palu.evaluation.report import metrics_table
from palu.evaluation.tofu import summarize

__all__ = ["METRICS", "evaluate_examples", "metrics_table", "summarize"]

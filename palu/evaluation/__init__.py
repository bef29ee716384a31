"""How much a model still knows."""

from palu.evaluation.examples import METRICS, evaluate_examples
from palu.evaluation.report import metrics_table
from palu.evaluation.tofu import summarize

__all__ = ["METRICS", "evaluate_examples", "metrics_table", "summarize"]

"""How much a model still knows: TOFU's metrics of models, and aggregates of evaluation logs."""

from typing import TYPE_CHECKING, Any

from palu.evaluation.evaluator import evaluate_examples
from palu.evaluation.names import METRICS
from palu.evaluation.tofu import summarize

if TYPE_CHECKING:
    from palu.evaluation.report import metrics_table

__all__ = ["METRICS", "evaluate_examples", "metrics_table", "summarize"]


if not TYPE_CHECKING:  # a type checker would take any attribute as there

    def __getattr__(name: str) -> Any:
        if name != "metrics_table":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        # Its tables bring rich, which a trainer that measures does without.
        from palu.evaluation.report import metrics_table

        return metrics_table

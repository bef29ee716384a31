"""The report of an erasure for a person who answers for it, and the model's card."""

from palu.report.build import build_report
from palu.report.card import write_card
from palu.report.inputs import ANNOTATION, ATTACK, EVALUATION, EVALUATION_FORMAT, REPORT_FORMAT

__all__ = [
    "ANNOTATION",
    "ATTACK",
    "EVALUATION",
    "EVALUATION_FORMAT",
    "REPORT_FORMAT",
    "build_report",
    "write_card",
]

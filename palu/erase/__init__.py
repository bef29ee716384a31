"""From a request to erase to a model that one can hand over: find what to forget, unlearn it,
measure, attack, report; in one run that is gone on with where it was stopped.

Beside the output lie, until it is whole, `OUTPUT-unfinished` (the model, and what was measured) and
`OUTPUT-work` (the records with their spans, which is the data that is to be erased: only its owner
may read it, and it is removed at the end).
"""

from palu.erase.request import Request
from palu.erase.run import erase
from palu.erase.state import STAGES

__all__ = ["STAGES", "Request", "erase"]

"""Find the spans to forget in records: by the values to erase, by kinds of personal data, by what
only the model that was tuned knows, or whole answers.

An annotator finds spans in the texts of examples; `annotate` runs several over records, merges what
they found and writes it into the records.
"""

from palu.annotation.base import Annotator, Found, Text, texts_of
from palu.annotation.combine import FORMAT, Annotated, annotate
from palu.annotation.contrast import Contrast
from palu.annotation.term_files import Term, read_terms
from palu.annotation.terms import Terms
from palu.annotation.whole import Whole

__all__ = [
    "FORMAT",
    "Annotated",
    "Annotator",
    "Contrast",
    "Found",
    "Term",
    "Terms",
    "Text",
    "Whole",
    "annotate",
    "read_terms",
    "texts_of",
]

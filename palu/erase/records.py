"""The records of a request: which have a term, which may be kept, and who may read them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from palu.erase.request import Request


def annotated(
    records: Any, terms: Sequence[str], report: Callable[..., None] | None
) -> tuple[Any, Any]:
    """Return the records with spans, and the annotator of the terms, None without terms."""
    from palu.annotation import Terms, annotate, read_terms

    found = Terms(read_terms(list(terms))) if terms else None
    given = SimpleNamespace(name="given", settings={}, find=lambda examples: [()] * len(examples))
    return annotate(records, annotators=[found or given], report=report), found


def warn_of_terms(terms: Any) -> None:
    """Warn, by where they stand, of terms that were not found, not looked for, or everywhere."""
    if terms is None:
        return
    kinds = {
        "are in no record": [term.where for term in terms.not_found],
        "are too short or too common to be looked for": [term.where for term in terms.skipped],
        "are in most records, and may be common words": [term.where for term, _ in terms.frequent],
    }
    for said, places in kinds.items():
        if places:
            more = f"; and {len(places) - 5} more" if len(places) > 5 else ""
            count = f"{len(places)} of {len(terms.terms) + len(terms.skipped)} terms"
            warnings.warn(f"{count} {said}: {'; '.join(places[:5])}{more}", stacklevel=2)
    if terms.warning:
        warnings.warn(terms.warning, stacklevel=2)


def without_terms(request: Request, terms: Any) -> list[dict[str, Any]]:
    """Return the records of `--retain`. Raises ValueError where one has a term: it would hold in
    place what is to be erased."""
    from palu.annotation import annotate
    from palu.data.files import load_records

    records = load_records(request.retain, request.retain_columns)
    if terms is not None:
        done = annotate(records, annotators=[terms], replace=True).records
        rows = {row for row, one in enumerate(done) if one["spans"]} | {*terms.aside}
        if has := [where for row, (_, where) in enumerate(records) if row in rows]:
            more = f" and {len(has) - 3} more" if len(has) > 3 else ""
            raise ValueError(
                f"--retain has terms to erase, and would hold them in place: {', '.join(has[:3])}"
                f"{more}; move these records to --records"
            )
    return [record for record, _ in records]


def write_private(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    from palu.annotation.output import write_records

    with private(path):
        write_records(path, records)


@contextmanager
def private(path: Path) -> Iterator[None]:
    """Let nobody but its owner read what is written in the block."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)

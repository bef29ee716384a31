"""`palu annotate`: find the spans to forget in the records of a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import typer

from palu.cli.data import plain_warnings
from palu.cli.options import TextOptions, WeightOptions, with_options
from palu.errors import user_errors
from palu.terminal import bars, out, say, warn
from palu.training.options import option

if TYPE_CHECKING:
    from palu.annotation import Annotator, Term

NOTHING_FOUND = 3  # the exit status
_LISTED = 10  # places that a warning names

_found = partial(option, panel="What to find")
_output = partial(option, panel="Output")


@dataclass(kw_only=True)
class AnnotateOptions:
    """Where spans are looked for, by what, and where the result goes."""

    file: str = option(
        MISSING, "Records of any format that palu reads; FILE[-40:] takes a slice.", argument=True
    )
    terms: list[str] | None = _found(
        None,
        "Values to erase: a CSV, JSON or text file of them, or one value. Found however they are "
        "written. Can be given several times.",
        metavar="FILE|TEXT",
    )
    term_fields: str | None = _found(
        None, "Only these fields of the files: name,email.", shown="all fields"
    )
    pii: bool = _found(
        False,
        "Kinds of personal data: names, places, e-mail, phone, account numbers. By Presidio with "
        "an installed spaCy pipeline.",
    )
    pii_pipeline: str | None = _found(
        None, "Name of the spaCy pipeline.", shown="the English one that is installed"
    )
    pii_kinds: str | None = _found(
        None, "Presidio's kinds: PERSON,EMAIL_ADDRESS.", shown="all but dates, ages, URLs, groups"
    )
    contrast: str | None = _found(
        None,
        "Words of answers that --model expects and this model does not: the folder of the model "
        "that --model was tuned from, or self: --model without the question and earlier turns.",
        metavar="DIR|self",
    )
    model: Path | None = _found(None, "For --contrast: folder of the model to be changed.")
    contrast_threshold: float = _found(
        0.5, "Nats by which --model must know a word better; higher finds less.", above=0
    )
    all: bool = _found(False, "Whole answers.")
    output: Path = _output(MISSING, "File for the records with their spans, JSON lines.")
    rest: Path | None = _output(
        None, "File for the records without a span: what to keep. --output has then the others."
    )
    json: Path | None = _output(None, "File for the counts and settings; has no text of a record.")
    replace: bool = _output(False, "Drop the spans that the records have.")
    overwrite: bool = _output(False, "Replace --output where it exists.")
    show_secrets: bool = _output(False, "Name the values that were found nowhere.")


@with_options(AnnotateOptions, (TextOptions, "columns"), (WeightOptions, "dtype", "device"))
def annotate(context: typer.Context, options: SimpleNamespace) -> None:
    """Find the spans to forget, and write the records with them.

    Annotators can be combined; where their spans overlap they become one. Look at the result with
    palu inspect --html. Nothing leaves this machine.
    """
    with user_errors(), plain_warnings():
        _check_places(options)
        with bars.status("Reading the records"):
            from palu.annotation import annotate as run
            from palu.annotation.output import check_records, summary_table, write_records
            from palu.data.files import load_records
            from palu.progress import bar
            from palu.storage.files import locked, write_json

            annotators = _annotators(options)
            records = load_records(options.file, options.columns)
            check_records(records)
            context.with_resource(locked(options.output))
        with bar(bars, "Annotating") as report:
            for annotator in annotators:
                if annotator.name == "contrast":
                    annotator.report = partial(report, note="answers read by both models")
            done = run(records, annotators=annotators, replace=options.replace, report=report)
        written = {options.output: done.records}
        if options.rest is not None and done.summary["spans"]:
            written = {
                options.output: [record for record in done.records if record["spans"]],
                options.rest: [record for record in done.records if not record["spans"]],
            }
        for path, some in written.items():
            write_records(path, some)
        if options.json is not None:
            write_json(options.json, done.summary)
    out.print(summary_table(done.summary))
    for path, some in written.items():
        out.print(f"Written to {path}: {len(some)} records", soft_wrap=True)
    for annotator in annotators:
        if annotator.name == "terms":
            _say_terms(annotator, options.show_secrets)
    if not done.summary["spans"]:
        say("error", "red", f"no span was found in {options.file}: there is nothing to forget")
        raise typer.Exit(NOTHING_FOUND)


_JSON_KEYS = {"format", "records", "spans", "by_annotator"}


def _check_places(options: SimpleNamespace) -> None:
    """Refuse options that do not go together, and outputs that would replace what is not theirs."""
    from palu.storage.files import check_json

    if not any((options.terms, options.pii, options.contrast, options.all)):
        raise ValueError(
            "nothing says what to find: give --terms FILE, --pii, --contrast DIR or --all"
        )
    if options.contrast and options.model is None:
        raise ValueError("--contrast compares two models: add --model DIR, the one to be changed")
    for name in ("model", "contrast_threshold"):
        if name in options.given and not options.contrast:
            raise ValueError(f"--{name.replace('_', '-')} is of --contrast: add --contrast DIR")
    if options.term_fields is not None and not options.terms:
        raise ValueError("--term-fields is of --terms: add --terms FILE")
    for name in ("pii_pipeline", "pii_kinds"):
        if getattr(options, name) is not None and not options.pii:
            raise ValueError(f"--{name.replace('_', '-')} is of --pii: add --pii")
    inputs = (*(options.terms or ()), options.file)
    places = {name: getattr(options, name) for name in ("output", "rest", "json")}
    places = {name: path for name, path in places.items() if path is not None}
    for name, path in places.items():
        check_output(name, path, inputs, overwrite=options.overwrite or name == "json")
    if len({path.resolve() for path in places.values()}) < len(places):
        raise ValueError(f"{', '.join(f'--{name}' for name in places)} must be different files")
    if options.json is not None:
        check_json(options.json, _JSON_KEYS, "palu annotate --json")


def check_output(name: str, path: Path, inputs: Sequence[str], *, overwrite: bool) -> None:
    """Check that a file may be written, before any work.

    Raises:
        ValueError: there is no folder for it, it is an input, or it exists and `overwrite` is not
            given.
        OSError: it is no regular file.
    """
    from palu.storage.files import check_regular

    if not path.resolve().parent.is_dir():
        raise ValueError(f"--{name}: the folder {str(path.resolve().parent)!r} does not exist")
    check_regular(path)
    for given in inputs:
        there = given if os.path.exists(given) else _local(given)
        if path.exists() and there and os.path.samefile(path, there):
            raise ValueError(f"--{name} {str(path)!r} is an input of this run; name another")
    if path.exists() and not overwrite:
        raise ValueError(f"--{name} {str(path)!r} exists; add --overwrite to replace it")


def _local(given: str) -> str | None:
    """Return the file that a path with a slice names."""
    from palu.data.files import local_path

    try:
        return local_path(given)
    except ValueError:
        return None  # reading says what is wrong


def _annotators(options: SimpleNamespace) -> list[Annotator]:
    from palu.annotation import Terms, Whole, read_terms

    annotators: list[Any] = []
    if options.terms:
        terms = Terms(read_terms(options.terms, _names(options.term_fields)))
        if terms.skipped:
            places = _listed(terms.skipped)
            warn(
                f"{len(terms.skipped)} of {len(terms.terms) + len(terms.skipped)} values are not "
                f"looked for, since they are too short or too common: {places}"
            )
        annotators.append(terms)
    if options.pii:
        from palu.annotation.pii import Pii

        with user_errors(ValueError, ImportError):  # of the extra "annotate"
            annotators.append(Pii(options.pii_pipeline, _names(options.pii_kinds)))
    if options.contrast:
        from palu.annotation.contrast import SELF, Contrast

        if options.contrast == SELF:
            warn(
                "--contrast self finds little in a model that knows its answers by heart: name the "
                "model that it was tuned from where there is one"
            )
        settings = {"threshold": options.contrast_threshold}
        settings |= {"dtype": options.dtype, "device": options.device}
        annotators.append(Contrast(options.model, options.contrast, **settings))
    if options.all:
        annotators.append(Whole())
    return annotators


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _say_terms(terms: Any, show: bool) -> None:
    """Say which values were found nowhere, which where no span can be, and which so often that they
    may be common words."""
    if terms.not_found:
        text = f"{len(terms.not_found)} of {len(terms.terms)} values are in no record: "
        hint = "" if show else " (--show-secrets names them)"
        warn(text + _listed(terms.not_found, show) + hint)
    if terms.warning:
        warn(terms.warning)
    for term, hits in terms.frequent:
        value = f" {term.value!r}" if show else ""
        warn(
            f"the value{value} at {term.where} is in {hits} of {terms.records} records: if it is "
            "no secret, take it out or name the fields to use with --term-fields"
        )


def _listed(terms: Sequence[Term], show: bool = False) -> str:
    some = [f"{t.where} ({t.value!r})" if show else t.where for t in terms[:_LISTED]]
    rest = len(terms) - len(some)
    return "; ".join(some) + (f"; and {rest} more" if rest else "")

"""`palu report`: the page for a person who answers for an erasure."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import typer

from palu.cli.options import with_options
from palu.errors import user_errors
from palu.terminal import bars, out
from palu.training.options import option

_output = partial(option, panel="Output")
_COLORS = {"good": "green", "caution": "yellow", "bad": "red"}
NOT_GOOD = 3  # the exit status of what was done and whose result is not good


@dataclass(kw_only=True)
class ReportOptions:
    """What is reported, and where to."""

    folder: Path = option(MISSING, "Folder of the unlearned model.", argument=True)
    forget: str | None = option(
        None,
        "The file that was forgotten, for example answers and for masking them.",
        panel="Data",
        shown="the one that palu.json names, if it is still there",
    )
    output: Path | None = _output(
        None,
        "The page; the same numbers go into a .json file beside it.",
        shown="FOLDER/report.html",
    )
    show_secrets: bool = _output(False, "Show sensitive words on the page instead of black boxes.")


@with_options(ReportOptions)
def report(context: typer.Context, options: SimpleNamespace) -> None:
    """Write one page for a person who answers for an erasure: what was asked, what the model knew
    and knows, attacks, harm, limits.

    It reads palu.json, annotation.json, evaluation.json and attack.json of the folder, whichever
    are there, and says what is missing. Exit status 3: the page is written, and its verdict is that
    the model is not good.
    """
    from palu.report import build_report

    place = options.folder / "report.html" if options.output is None else options.output
    with user_errors(), bars.status("Writing the report"):
        made = build_report(
            options.folder,
            output=place,
            forget=options.forget,
            show_secrets=options.show_secrets,
        )
    print_verdict(made["verdict"])
    for one in made["missing"]:
        out.print(f"Missing: {one['what']} ({one['tells']})", soft_wrap=True, highlight=False)
    out.print(f"Written to {place} and {place.with_suffix('.json')}", soft_wrap=True)
    if made["verdict"]["level"] == "bad":
        raise typer.Exit(NOT_GOOD)


def print_verdict(verdict: dict[str, Any]) -> None:
    """Print a report's verdict, what leaks, and whether answers are text."""
    from rich.text import Text

    out.print(Text(verdict["headline"], style=_COLORS[verdict["level"]]), soft_wrap=True)
    sentences = (verdict["worst_leak"], verdict["plain_leak"], *verdict["fallen_apart"])
    for sentence in filter(None, sentences):
        out.print(sentence, soft_wrap=True, highlight=False)

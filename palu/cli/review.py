"""`palu inspect --html` and `--review`: spans looked at one by one, in a browser or a terminal."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from rich.text import Text

from palu.cli.annotate import check_output
from palu.terminal import bars, out, visible

if TYPE_CHECKING:
    from palu.annotation.combine import Mark
    from palu.data.records import Example

_BIG = 50  # MB of a page that browsers take long to open
_AROUND = 100  # characters shown before and behind a span
_HELP = "y: keep, n: drop, Y/N: the same for every span of this text, q: stop"


def write_page(options: SimpleNamespace) -> None:
    """Write `--html`."""
    from palu.annotation.review import review_page
    from palu.data.files import load_records
    from palu.storage.files import new_file
    from palu.terminal import warn

    check_output("html", options.html, [options.file], overwrite=options.overwrite)
    with bars.status("Writing the page"):
        page = review_page(load_records(options.file, options.columns), options.file)
        with new_file(options.html) as file:
            file.write(page)
    if (size := len(page) / 1e6) > _BIG:
        warn(
            f"the page has {size:.0f} MB, which takes long to open; it has less for a slice: "
            f"{options.file}[:1000]"
        )
    out.print(
        f"Written to {options.html}: open it in a browser. It holds the records' texts.",
        soft_wrap=True,
    )


def review(options: SimpleNamespace) -> None:
    """Ask span by span, and write `--output` when that stops."""
    from palu.annotation.output import write_records
    from palu.annotation.review import Review
    from palu.data.files import load_records

    if options.output is None:
        raise ValueError("--review writes a file: add --output FILE")
    check_output("output", options.output, [options.file], overwrite=True)
    records = load_records(options.file, options.columns)
    goes_on = options.output.exists() and not options.overwrite
    written = load_records(str(options.output)) if goes_on else None
    state = Review(records, written, str(options.output))
    if state.absent:
        out.print(
            f"{state.absent} spans of {options.file} are not in {options.output} and are not asked "
            "for: they were dropped, or have been found since (--overwrite begins anew)",
            soft_wrap=True,
        )
    try:
        _ask(state)
    except (EOFError, KeyboardInterrupt):
        out.print()
    finally:
        write_records(options.output, state.records())
    left = sum(1 for _ in state.open())
    out.print(
        f"Written to {options.output}: {state.kept} spans kept, {state.dropped} dropped, "
        + (f"{left} not looked at yet (the same command goes on)" if left else "all looked at"),
        soft_wrap=True,
    )


def _ask(state: Any) -> None:
    total, last = sum(1 for _ in state.open()), None
    out.print(_HELP)
    for asked, (example, text, mark) in enumerate(state.open(), 1):
        if example is not last:
            out.print(Text(f"\n--- {example.id} ---", style="bold"))
            last = example
        out.print(_shown(example, text, mark), soft_wrap=True)
        by = " + ".join(mark.by) or "the file"
        score = "" if mark.score is None else f", score {mark.score:g}"
        question = f"{asked} of {total}, by {by}{score}: keep it? [y/n/Y/N/q] "
        while (answer := input(visible(question)).strip()) not in ("y", "n", "Y", "N", "q"):
            out.print(_HELP)
        if answer == "q":
            return
        state.decide(example, mark, keep=answer in "yY", every=answer in "YN")


def _shown(example: Example, text: Any, mark: Mark) -> Text:
    content = text.content
    start, end = max(0, mark.start - _AROUND), min(len(content), mark.end + _AROUND)
    return Text.assemble(
        (f"{text.role}: ", "dim"),
        "..." * (start > 0) + visible(content[start : mark.start]),
        (f"[[{visible(content[mark.start : mark.end])}]]", "bold white on red"),
        visible(content[mark.end : end]) + "..." * (end < len(content)),
    )

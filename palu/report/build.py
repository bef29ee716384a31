"""Make the report of an erasure: one page, and the same numbers as JSON."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from palu import __version__
from palu.report.content import content_of
from palu.report.examples import (
    attack_examples,
    example_answers,
    find_secrets,
    masked,
)
from palu.report.inputs import FILES, REPORT_FORMAT, Inputs, read_inputs
from palu.report.page import GENERATOR, render_page
from palu.storage.files import check_json, check_regular, new_file, write_json


def build_report(
    folder: str | Path,
    *,
    output: str | Path | None = None,
    forget: str | Path | None = None,
    show_secrets: bool = False,
    name: str | None = None,
) -> dict[str, Any]:
    """Write the report of an erasure: a page, and beside it a JSON file of the same numbers.

    It is made of `palu.json`, `annotation.json`, `evaluation.json` and `attack.json`, whichever the
    folder has; the page says what is missing.

    Args:
        folder: the folder of the unlearned model.
        output: the page, `folder/report.html` when None. The JSON file has the same name with
            `.json`.
        forget: the file that was forgotten; when None the one that `palu.json` names, if it is
            still there. Without it there are no example answers, since nobody could tell what to
            mask.
        show_secrets: show the secrets on the page; the JSON file never has them.
        name: what the page calls the folder, where it will be moved; its own name when None.

    Returns:
        the content of the JSON file; `verdict.level` is "good", "caution" or "bad".

    Raises:
        ValueError: a file is damaged or of another kind, the folder has none of them, or secrets
            are to be shown and there is no forget file.
        FileExistsError: a file that palu did not write is where the report belongs.
    """
    folder = Path(folder)
    output = folder / "report.html" if output is None else Path(output)
    inputs = read_inputs(folder, name)
    check_places(output, inputs)
    secrets, why = find_secrets(inputs, forget, shown=show_secrets)
    if show_secrets and secrets is None:
        raise ValueError(f"--show-secrets: {why}")
    report = {
        "format": REPORT_FORMAT,
        "palu": __version__,
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "folder": masked(inputs.name, secrets),
        **content_of(inputs, secrets),
        "inputs": _digests(inputs),
    }
    page = render_page(
        report,
        answers=example_answers(secrets),
        attack_answers=attack_examples(inputs, secrets),
        no_answers=why,
        show_secrets=show_secrets,
    )
    if show_secrets:
        secrets.shown = False
        report |= {"folder": masked(report["folder"], secrets), **content_of(inputs, secrets)}
    with new_file(output) as file:
        file.write(page)
    write_json(output.with_suffix(".json"), report)
    return report


def check_places(output: Path, inputs: Inputs) -> None:
    """Refuse to write a report over something else.

    Raises:
        ValueError: the page has another ending than .html, or its folder does not exist.
        FileExistsError: an input of the report, or a file that it did not write, is there.
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output {str(output)!r} must end with .html")
    if not output.resolve().parent.is_dir():
        raise ValueError(f"--output: the folder {str(output.resolve().parent)!r} does not exist")
    beside = output.with_suffix(".json")
    if beside.name in FILES and beside.resolve().parent == inputs.folder.resolve():
        raise FileExistsError(
            f"--output {str(output)!r}: {beside.name}, which would be written beside it, is an "
            "input of the report; name another file"
        )
    check_json(beside, {"format", "verdict", "palu"}, "palu report")
    check_page(output, GENERATOR, "palu report")


def check_page(output: Path, generator: str, writer: str) -> None:
    """Check that a page may be written: there is none, or an empty one, or one that has the line
    `generator`. Raises FileExistsError, with what messages call the `writer`."""
    with suppress(FileNotFoundError):
        output.lstat()
        check_regular(output)
        head = output.read_bytes()[:4096] if output.exists() else generator.encode()
        if head and generator.encode() not in head:
            raise FileExistsError(
                f"{str(output)!r} exists and {writer} did not write it; name another file"
            )


def _digests(inputs: Inputs) -> dict[str, str]:
    from palu.storage.fingerprint import file_digest

    return {name: file_digest(node.file) for name, node in inputs.files.items()}

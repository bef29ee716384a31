"""What the page of a comparison takes from the files of single runs: attacks, curves, answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from palu.comparison.run_file import DONE, FORGET, FORMAT, MEMBERSHIP
from palu.report.examples import Secrets
from palu.report.inputs import Node
from palu.storage.json_files import read_object

MODELS = ("original", "retrained")
# Parts of a loss, in the order in which they are drawn; others are left to the run's own files.
PARTS = ("loss", "forget", "preserve", "retain")

Runs = dict[tuple[str, str], list[Node]]  # (method, setting) -> its runs, by seed
Row = dict[str, Any]


def read_runs(folder: Path) -> tuple[dict[str, Node], Runs]:
    """Return the run files of the models that nothing was done to, by name, and those of every
    setting.

    Raises:
        ValueError: a file that is damaged or something else; names it.
    """
    models = {name: _read(path) for name in MODELS if (path := folder / f"{name}.json").exists()}
    runs: Runs = {}
    for path in sorted((folder / "runs").glob("*/run.json")):
        run = _read(path)
        key = run["method"].text(), run["setting"].text("")
        runs.setdefault(key, []).append(run)
    for some in runs.values():
        some.sort(key=lambda run: run["seed"].count())
    return models, runs


def _read(path: Path) -> Node:
    run = Node(read_object(path), path)
    run.format(FORMAT)
    return run


def is_done(run: Node) -> bool:
    """Return whether a run came to its end and can be compared."""
    return run["status"].text() == DONE


def attack_rows(columns: Mapping[str, Sequence[Node]]) -> list[Row]:
    """Return what each attack got out of each column, runs of different seeds together.

    Args:
        columns: name -> runs.

    Returns:
        `[{"title", "kind", "results": {column: {"said", "of", "rate"} or {"auc", "low", "high"}}}]`
        in the order of the files. `rate` is the mean of the runs' rates; an AUC, too, is a mean,
        and its interval is that of a single run: None where there are several.
    """
    rows: dict[str, Row] = {}
    for column, runs in columns.items():
        found: dict[str, list[Node]] = {}
        for run in runs:
            for attack in run["attacks"].each():
                found.setdefault(attack["title"].text(), []).append(attack)
        for title, attacks in found.items():
            kind = attacks[0]["name"].text()
            row = rows.setdefault(title, {"title": title, "kind": kind, "results": {}})
            result = _aucs(attacks) if kind == MEMBERSHIP else _said(attacks)
            row["results"][column] = result
    return list(rows.values())


def _said(attacks: Sequence[Node]) -> Row:
    counts = []
    for attack in attacks:
        said = [one.count() for one in attack["said"].each()]
        counts.append((sum(said), len(said)))
    rates = [said / of for said, of in counts if of]
    return {
        "said": sum(said for said, _ in counts),
        "of": sum(of for _, of in counts),
        "rate": math.fsum(rates) / len(rates) if rates else None,
    }


def _aucs(attacks: Sequence[Node]) -> Row:
    values = [attack["auc"].share() for attack in attacks]
    result: Row = {"auc": math.fsum(values) / len(values), "low": None, "high": None}
    if len(attacks) == 1:
        result |= {name: attacks[0][name].share() for name in ("low", "high")}
    return result


def curves_of(runs: Iterable[Node]) -> tuple[list[list[Row]], list[str]]:
    """Return the steps of each run that has any, and the parts of the loss that they tell of: not
    those of no token (`num_...` is 0 in every step)."""
    curves = []
    for run in runs:
        steps = [dict(step.object()) for step in run["curve"].each()]
        if steps:
            curves.append(steps)
    known = {
        name
        for steps in curves
        for step in steps
        for name in PARTS
        if step.get(f"num_{name}") != 0 and step.get(name) is not None
    }
    return curves, [name for name in PARTS if name in known]


def curve_ends(curves: Sequence[Sequence[Row]], parts: Sequence[str]) -> list[Row]:
    """Return the first and the last value of each part of the loss, means over the runs."""
    ends = []
    for part in parts:
        values = [[step[part] for step in steps if step.get(part) is not None] for steps in curves]
        values = [some for some in values if some]
        if values:
            first, last = (math.fsum(v[at] for v in values) / len(values) for at in (0, -1))
            ends.append({"part": part, "first": first, "last": last})
    return ends


def not_done(runs: Mapping[tuple[str, str], Sequence[Node]]) -> list[Row]:
    """Return the runs that diverged or failed: method, setting, seed, status and reason."""
    return [
        {
            "method": method,
            "setting": setting,
            "seed": run["seed"].count(),
            "status": run["status"].text(),
            "reason": run["reason"].text(""),
        }
        for (method, setting), some in runs.items()
        for run in some
        if not is_done(run)
    ]


def answers_of(columns: Mapping[str, Node], secrets: Secrets) -> list[Row]:
    """Return the shown records with the true answer's tokens and the greedy answer of each column.

    Without `secrets.shown` only records of the forget set are returned: the others are about other
    people.

    Returns:
        `[{"set", "question", "columns": {column: {"text", "tokens", "strip", "marked",
        "others"}}}]`. A token is `{"text", "probability", "sensitive"}`, its text None where it is
        masked; `strip` are the tokens as `(sensitive, tokens)`, stretch by stretch; `marked` and
        `others` are the geometric means of the probabilities of the sensitive tokens and of the
        rest, None where there are none.
    """
    records: dict[tuple[str, str], Row] = {}
    for column, run in columns.items():
        for answer in run["answers"].each():
            key = answer["set"].text(), answer["id"].text()
            if key[0] != FORGET and not secrets.shown:
                continue
            tokens = [_token(token) for token in answer["tokens"].each()]
            hide(tokens, secrets)
            question = answer["question"].text("(a plain document)")
            row = records.setdefault(
                key, {"set": key[0], "question": secrets.mask(question), "columns": {}}
            )
            sensitive = [one["probability"] for one in tokens if one["sensitive"]]
            others = [one["probability"] for one in tokens if not one["sensitive"]]
            row["columns"][column] = {
                "text": secrets.mask(answer["answer"].text("")),
                "tokens": tokens,
                "strip": [(marked, list(some)) for marked, some in groupby(tokens, _is_marked)],
                "marked": geometric_mean(sensitive),
                "others": geometric_mean(others),
            }
    return list(records.values())


_is_marked = itemgetter("sensitive")


def _token(token: Node) -> Row:
    if not isinstance(sensitive := token["sensitive"].value, bool):
        raise token["sensitive"].fail("true or false")
    return {
        "text": token["text"].text(""),
        "probability": token["after"].share(),
        "sensitive": sensitive,
    }


def hide(tokens: Sequence[Row], secrets: Secrets) -> None:
    """Replace by None the text of each token that is sensitive, or has a character that would be
    masked in the whole text, unless secrets are shown."""
    from palu.evaluation.leaks import redacted_places

    if secrets.shown:
        return
    text = "".join(token["text"] for token in tokens)
    hidden = redacted_places(text, secrets.texts)
    start = 0
    for token in tokens:
        end = start + len(token["text"])
        if token["sensitive"] or any(a < end and start < b for a, b in hidden):
            token["text"] = None
        start = end


def geometric_mean(probabilities: Sequence[float]) -> float | None:
    """Return the geometric mean, as the metrics of a whole answer are; None of nothing."""
    if not probabilities:
        return None
    if min(probabilities) == 0:
        return 0.0
    return math.exp(math.fsum(map(math.log, probabilities)) / len(probabilities))

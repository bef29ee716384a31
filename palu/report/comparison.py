"""The page of a comparison: which method forgets more for the same loss of utility."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

from palu import __version__
from palu.comparison.run_file import FORGET, MEMBERSHIP
from palu.report.build import check_page
from palu.report.compared import (
    COMPARISON,
    COMPARISON_FORMAT,
    differences,
    estimate,
    is_noise,
    methods_of,
    percent_of,
    places,
    sentences,
)
from palu.report.compared_runs import (
    MODELS,
    answers_of,
    attack_rows,
    curve_ends,
    curves_of,
    not_done,
    read_runs,
)
from palu.report.compared_text import broken, text_rows
from palu.report.comparison_charts import Frontiers, curve_chart
from palu.report.comparison_limits import comparison_limits
from palu.report.examples import Secrets, masked, read_secrets
from palu.report.inputs import Node
from palu.report.page import page
from palu.storage.files import new_file

GENERATOR = '<meta name="generator" content="palu compare">'
PAGE = "report.html"
_BESIDE = 4  # methods in a table beside the original and the retrained model

Row = dict[str, Any]


def write_page(
    folder: str | Path,
    content: Mapping[str, Any],
    *,
    forget: str | Path | None = None,
    columns: str | None = None,
    show_secrets: bool = False,
    name: str | None = None,
) -> Path:
    """Write `report.html` of a comparison, and return its path.

    Args:
        folder: of the comparison: `original.json`, `retrained.json` and `runs/*/run.json` are read.
        content: that of `comparison.json`.
        forget: the file that was to be forgotten. Without it there are no example answers, since
            nobody could tell what to mask.
        columns: as for `palu.load_examples`, of that file.
        show_secrets: show the secrets.
        name: what the page calls the folder; its own name when None.

    Raises:
        ValueError: a file that is damaged or something else, or secrets are to be shown and
            `forget` is None or cannot be read.
        FileExistsError: a file that palu compare did not write is where the page belongs.
    """
    folder = Path(folder)
    output = folder / PAGE
    check_page(output, GENERATOR, "palu compare")
    models, runs = read_runs(folder)
    secrets, why = _secrets(forget, columns, models, show_secrets)
    text = render_comparison(
        Node(content, folder / COMPARISON),
        models,
        runs,
        secrets=secrets,
        no_answers=why,
        name=name or folder.resolve().name,
    )
    with new_file(output) as file:
        file.write(text)
    return output


def _secrets(
    forget: str | Path | None,
    columns: str | None,
    models: Mapping[str, Node],
    shown: bool,
) -> tuple[Secrets | None, str | None]:
    """Return the secrets of the file that was to be forgotten; None, and why there are none, where
    it is not there or no longer what was measured, unless they are to be shown: then it is an
    error."""
    if forget is None:
        why = "the file that was to be forgotten was not named"
    else:
        try:
            secrets = read_secrets(str(forget), shown=shown, columns=columns)
        except (ValueError, OSError) as error:
            why = f"the file that was to be forgotten cannot be read: {error}"
        else:
            measured = {
                one.text() for run in models.values() for one in run["sets"][FORGET]["ids"].each()
            }
            if measured <= secrets.examples.keys():
                return secrets, None
            why = f"{forget} has other records than those that were measured"
    if shown:
        raise ValueError(f"--show-secrets: {why}")
    return None, why if forget is None else f"{forget} is not the file that was measured"


def render_comparison(
    content: Node,
    models: Mapping[str, Node],
    runs: Mapping[tuple[str, str], Sequence[Node]],
    *,
    secrets: Secrets | None,
    no_answers: str | None,
    name: str,
) -> str:
    """Return the page: `write_page` has the arguments."""
    content.format(COMPARISON_FORMAT)
    methods = methods_of(content)
    limits = sorted(methods[0]["within"]) if methods else []
    apart = differences(content)
    ranked = {limit: places(methods, apart, limit) for limit in limits}
    seeds = [one.count() for one in content["seeds"].each()]
    shown = {  # a folder may hold runs of further seeds, which the ranking leaves out
        method["letter"]: [
            run for run in runs[method["name"], chosen] if run["seed"].value in seeds
        ]
        for method in methods
        if (chosen := (method["chosen"] or {}).get("setting")) is not None
    }
    known = _known_models(content, models)
    frontiers = Frontiers(methods, known, limits) if methods else None
    text = text_rows({name: [run] for name, run in models.items()} | shown)
    report = {
        "palu": __version__,
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "folder": masked(name, secrets),
        "measure": content["forgetting"]["title"].text(),
        "max_fell_apart": content["max_fell_apart"].share() if content["max_fell_apart"] else None,
        "models": known,
        "methods": methods,
        "limits_of_loss": limits,
        "ranked": ranked,
        "pairs": _pairs(methods, apart, limits),
        "told": {limit: sentences(rows, limit) for limit, rows in ranked.items()},
        "beyond": frontiers.beyond if frontiers else 0,
        "widest": frontiers.x[1] if frontiers else 0,
        "attacks": _attacks(methods, models, shown),
        "text": [(data, list(rows)) for data, rows in groupby(text, lambda row: row["set"])],
        "broken": broken(text, methods),
        **_not_compared(content, runs, secrets),
        "runs": sum(map(len, runs.values())),
        "answers": _answers(methods, models, shown, secrets),
        "limits": comparison_limits(models, shown, methods, content),
    }
    curves = _curves(methods, shown)
    return page(
        "comparison.html.j2",
        GENERATOR,
        report=report,
        chart=frontiers.all() if frontiers else None,
        panels=[(method, frontiers.one(method)) for method in methods] if len(methods) > 1 else [],
        curves=curves,
        curve_parts={end["part"] for one in curves for end in one["ends"]},
        no_answers=no_answers,
        show_secrets=secrets is not None and secrets.shown,
        loss=percent_of,
    )


def _not_compared(
    content: Node, runs: Mapping[tuple[str, str], Sequence[Node]], secrets: Secrets | None
) -> Row:
    """Return the runs that ended early, and the other settings that are on no frontier."""
    ended = not_done(runs)
    known = {(row["method"], row["setting"]) for row in ended}
    others = [
        {key: one[key].text("") for key in ("method", "setting", "why")}
        for one in content["not_ranked"].each()
        if (one["method"].text(), one["setting"].text("")) not in known
    ]
    order = [one["method"].text() for one in content["methods"].each()]
    ended.sort(key=lambda row: order.index(row["method"]) if row["method"] in order else len(order))
    return {"not_done": masked(ended, secrets), "not_ranked": masked(others, secrets)}


def _pairs(
    methods: Sequence[Row], apart: Mapping[tuple[str, str, float], Row], limits: Sequence[float]
) -> list[Row]:
    """Return every two methods with their differences at each loss: the first minus the second."""
    return [
        {
            "first": one,
            "second": other,
            "apart": [
                {**found, "noise": is_noise(found)}
                for limit in limits
                if (found := apart.get((one["name"], other["name"], limit)))
            ],
        }
        for one, other in combinations(methods, 2)
    ]


def _known_models(content: Node, models: Mapping[str, Node]) -> dict[str, Row]:
    """Return loss of utility and forgetting of the original and the retrained model."""
    return {
        name: {
            "loss": estimate(content["models"][name]["loss"])["value"],
            "forgetting": estimate(content["models"][name]["forgetting"])["value"],
        }
        for name in MODELS
        if content["models"][name]
    }


def _attacks(
    methods: Sequence[Row], models: Mapping[str, Node], shown: Mapping[str, Sequence[Node]]
) -> Row:
    """Return the attacks' rows, and the methods beside each other in a table."""
    columns = {name: [run] for name, run in models.items()} | dict(shown)
    rows = attack_rows(columns)
    told = [method for method in methods if shown.get(method["letter"])]
    return {
        "asking": [row for row in rows if row["kind"] != MEMBERSHIP],
        "membership": [row for row in rows if row["kind"] == MEMBERSHIP],
        "models": [name for name in MODELS if name in models],
        "tables": in_tables(told),
    }


def in_tables(methods: Sequence[Row]) -> list[Sequence[Row]]:
    """Return the methods of each table: a page of 400 pixels has room for so many columns."""
    return [methods[at : at + _BESIDE] for at in range(0, len(methods), _BESIDE)]


def _curves(methods: Sequence[Row], shown: Mapping[str, Sequence[Node]]) -> list[Row]:
    """Return a picture for each method whose runs kept their curves."""
    found = []
    for method in methods:
        runs, parts = curves_of(shown.get(method["letter"], ()))
        title = f"{method['letter']}: loss of {method['name']}, {len(runs)} run"
        title += "s" if len(runs) != 1 else ""
        chart = curve_chart(f"curve-{method['letter']}", title, runs, parts)
        if chart is not None:
            found.append({"method": method, "chart": chart, "ends": curve_ends(runs, parts)})
    return found


def _answers(
    methods: Sequence[Row],
    models: Mapping[str, Node],
    shown: Mapping[str, Sequence[Node]],
    secrets: Secrets | None,
) -> list[Row]:
    """Return the shown records: what the original, the retrained model and each method's chosen
    setting, in its first run, say."""
    if secrets is None:
        return []
    first = {letter: runs[0] for letter, runs in shown.items() if runs}
    rows = answers_of({**models, **first}, secrets)
    told = [method for method in methods if method["letter"] in first]
    return [row | {"methods": told, "tables": in_tables(told)} for row in rows]

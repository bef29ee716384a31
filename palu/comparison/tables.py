"""Tables of a comparison: `comparison.json`, three CSVs, one in LaTeX and one for the terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palu.comparison.results import ORIGINAL, RETRAINED, Choices, Folder, rank
from palu.data.spans import shown
from palu.storage.files import new_file, write_json
from palu.storage.json_files import NotJSON, parse_yaml, read_text

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

JSON, TEX = "comparison.json", "comparison.tex"
RUNS, FRONTIER, PAIRS = "comparison.csv", "frontier.csv", "pairs.csv"
FILES = (JSON, RUNS, FRONTIER, PAIRS, TEX)
NONE = "-"
ENDS = ("low", "high")
LINES = 8
"""How many settings that are not ranked the terminal shows."""
ONLY = "as given"
"""What a setting is called of a method that has one: empty cells of a CSV are those of none."""

_INTERVAL = re.compile(r"(-?\d+\.\d+) \[(-?\d+\.\d+), (-?\d+\.\d+)\]")
_NARROW = r"""\vspace{4pt}
\centering
\footnotesize
\setlength{\tabcolsep}{4pt}
\renewcommand{\arraystretch}{1.5}
"""

Content = Mapping[str, Any]


def write_tables(folder: str | Path, choices: Choices | None = None) -> dict[str, Any]:
    """Rank the runs in a comparison's folder, write `FILES` into it and return the content of
    `comparison.json`.

    Args:
        choices: what the configuration decides; None: as `comparison.yaml` says.

    Raises:
        ValueError: run files that cannot be used or compared; names what is wrong.
    """
    folder = Path(folder)
    content = rank(Folder.read(folder), choices or read_choices(folder / "comparison.yaml"))
    write_json(folder / JSON, content)
    for name, frame in ((RUNS, runs_frame), (FRONTIER, frontier_frame), (PAIRS, pairs_frame)):
        write_csv(folder / name, frame(content))
    with new_file(folder / TEX) as file:
        file.write(latex(content))
    return content


def read_choices(path: Path) -> Choices:
    """Return what a comparison's file says of its ranking; the defaults where there is none."""
    if not path.is_file():
        return Choices()
    try:
        content = parse_yaml(read_text(path))
    except NotJSON as error:
        raise ValueError(f"{path}: not readable: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold names and values, not {shown(content)}")
    keys = ("forgetting", "losses", "seeds", "max_fell_apart")
    known = {key: content[key] for key in keys if key in content}
    if "utility_metrics" in content:
        known["metrics"] = content["utility_metrics"]
    return Choices(methods=tuple(content.get("methods", ())), **known)


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Write a table, whole or not at all; numbers as they are, without rounding."""
    with new_file(path) as file:
        frame.to_csv(file, index=False, lineterminator="\n")


def runs_frame(content: Content) -> pd.DataFrame:
    """Return a row a run, and the original and the retrained model's before them."""
    import pandas as pd

    rows = []
    for run in content["runs"]:
        row = {key: run[key] for key in ("run", "method", "setting", "seed", "status", "reason")}
        row |= {key: run[key] for key in ("utility", "loss", "forgetting")}
        row |= {f"leaked {name}": share for name, share in run["leaked"].items()}
        row |= {f"AUC {title}": auc for title, auc in run["auc"].items()}
        for name, means in run["means"].items():
            row |= {f"{name} {metric}": mean for metric, mean in means.items()}
        row |= run["numbers"]
        row |= {f"seconds {stage}": seconds for stage, seconds in run["seconds"].items()}
        row["options"] = None if run["options"] is None else json.dumps(run["options"])
        row["command"] = run["command"]
        row |= {name: str(value) for name, value in run["environment"].items()}
        rows.append(row)
    frame = pd.DataFrame(rows)
    frame["seed"] = frame["seed"].astype("Int64")
    last = [name for name in ("options", "command") if name in frame]
    return frame[[*(name for name in frame if name not in last), *last]]


def frontier_frame(content: Content) -> pd.DataFrame:
    """Return a row for every method and loss: its best point, and one for the area under its
    frontier; and a row for the original and the retrained model."""
    import pandas as pd

    rows = [
        {"method": name, "at": "model", **_interval("forgetting", model["forgetting"])}
        | _interval("loss", model["loss"])
        for name, model in content["models"].items()
        if model is not None
    ]
    for method in content["methods"]:
        area = method["area"]
        rows.append(
            {"method": method["method"], "at": f"area to {percent(content['area_to'])}"}
            | _interval("forgetting", area)
            | {"left_out_forgetting": area["left_out"]}
            | {"best_probability": method["best_probability"]}
        )
        for point in method["within"]:
            left_out = point["left_out"] or {"forgetting": None, "loss": None}
            rows.append(
                {"method": method["method"], "at": percent(point["limit"])}
                | _interval("forgetting", point["forgetting"])
                | {"left_out_forgetting": left_out["forgetting"]}
                | {"best_probability": point["best_probability"]}
                | _interval("loss", point["loss"])
                | {"left_out_loss": left_out["loss"], "setting": _named(point["setting"])}
                | {"chosen": point["chosen"]}
            )
    columns = ["method", "at", *_interval("forgetting", None), "left_out_forgetting"]
    columns += ["best_probability", *_interval("loss", None), "left_out_loss", "chosen", "setting"]
    return pd.DataFrame(rows, columns=columns)


def pairs_frame(content: Content) -> pd.DataFrame:
    """Return a row for every two methods and every area or loss: the first's forgetting minus the
    second's, and how often it is above 0."""
    import pandas as pd

    rows = []
    for pair in content["pairs"]:
        found = [(f"area to {percent(content['area_to'])}", pair["area"])]
        found += [(percent(one["limit"]), one) for one in pair["within"]]
        for at, one in found:
            row = {"first": pair["first"], "second": pair["second"], "at": at}
            rows.append({**row, **_interval("difference", one), "probability": one["probability"]})
    columns = ["first", "second", "at", *_interval("difference", None), "probability"]
    return pd.DataFrame(rows, columns=columns)


def _named(setting: str | None) -> str | None:
    return ONLY if setting == "" else setting


def _interval(name: str, one: Mapping[str, Any] | None) -> dict[str, Any]:
    one = one or {}
    return {
        name: one.get("value"),
        f"{name}_low": one.get("low"),
        f"{name}_high": one.get("high"),
    }


# ---- for people ----------------------------------------------------------------------------------


def summary_frame(content: Content | pd.DataFrame) -> pd.DataFrame:
    """Return the table that people read, as texts: a row a method, the largest area first, then the
    retrained and the original model.

    Args:
        content: of `comparison.json`, or what `frontier.csv` holds.
    """
    import pandas as pd

    frame = content if isinstance(content, pd.DataFrame) else frontier_frame(content)
    models = frame[frame["at"] == "model"].set_index("method")
    ranked = frame[frame["at"] != "model"]
    columns = list(dict.fromkeys(ranked["at"]))
    first = ranked[ranked["at"] == columns[0]] if columns else ranked
    order = first.sort_values("forgetting", ascending=False, kind="stable")["method"]
    rows = []
    for method in order:
        own = ranked[ranked["method"] == method].set_index("at")
        cells = {"": method}
        for at in columns:
            cells[_heading(at)] = _cell(own.loc[at], area=at == columns[0])
        left_out = own.loc[columns[0], "left_out_forgetting"]
        cells["left out"] = NONE if pd.isna(left_out) else f"{left_out:.3f}"
        best = own.loc[columns[0], "best_probability"]
        cells["best"] = NONE if pd.isna(best) else percent(best, 0)
        rows.append(cells)
    for name in (RETRAINED, ORIGINAL):
        if name in models.index:
            model = models.loc[name]
            rows.append({"": f"{name} (loss {percent(model['loss'], 1)})"})
            rows[-1][_heading(columns[0]) if columns else "forgetting"] = _numbers(model)
    return pd.DataFrame(rows).fillna("")


def _heading(at: str) -> str:
    return at if at.startswith("area") else f"within {at}"


def _cell(row: Mapping[str, Any], *, area: bool) -> str:
    import pandas as pd

    return NONE if not area and pd.isna(row["setting"]) else _numbers(row)


def _numbers(row: Mapping[str, Any]) -> str:
    import pandas as pd

    value = f"{row['forgetting']:.3f}"
    if pd.isna(row["forgetting_low"]):
        return value
    return f"{value} [{row['forgetting_low']:.3f}, {row['forgetting_high']:.3f}]"


def percent(value: float, digits: int | None = None) -> str:
    """Return a share in percent."""
    value = 100 * value
    return f"{value:g}%" if digits is None else f"{round(value, digits) + 0.0:.{digits}f}%"


def caption(content: Content) -> str:
    """Return what the numbers of the table are, in one sentence or two."""
    seeds, drawn = len(content["seeds"]), content["bootstrap"]["drawn"]
    of = ", ".join(f"{size} {name}" for name, size in drawn.items() if name != "seeds")
    limit, broken = content.get("max_fell_apart"), ""
    if limit is not None:
        broken = (
            f" Settings of which over {percent(limit)} of the forget answers fell apart are out."
        )
    seeds = f"{seeds} seeds" if seeds > 1 else "one seed, which the intervals know nothing of"
    return (
        f"Forgetting ({content['forgetting']['title']}) at a loss of utility of at most so much, "
        f"with 95% intervals: {seeds}; {of}. Left out: the area where settings are chosen on the "
        f"other seeds. Best: how often a method's area is the largest.{broken}"
    )


def latex(content: Content) -> str:
    """Return the table in LaTeX, for the package booktabs. An interval's ends stand above and
    below, since a line of them is wider than an article's text."""
    frame = summary_frame(content)
    text = frame.to_latex(
        index=False,
        escape=True,
        caption=_escaped(f"{caption(content)} An interval's ends are above and below."),
        label="tab:palu-comparison",
        column_format="l" + "r" * (len(frame.columns) - 1),
        position="t",
    )
    text = _INTERVAL.sub(r"$\1_{\2}^{\3}$", text)
    text = text.replace("\\begin{tabular}", _NARROW + "\\begin{tabular}")
    return "% \\usepackage{booktabs}\n" + text


def _escaped(text: str) -> str:
    import pandas as pd

    # pandas escapes cells and no captions.
    line = pd.DataFrame([text]).to_latex(index=False, header=False, escape=True).splitlines()
    return next(one for one in line if one.endswith(r" \\")).removesuffix(r" \\")


def ranking_table(content: Content) -> Table:
    """Return the table for the terminal."""
    from rich.table import Table
    from rich.text import Text

    frame = summary_frame(content)
    table = Table(
        title="Forgetting at matched utility",
        title_justify="left",
        caption=caption(content),
        caption_justify="left",
    )
    for name in frame.columns:
        table.add_column(name.replace(" ", "\n", 1), justify="right" if name else "left")
    for row in frame.itertuples(index=False):
        table.add_row(*(Text(_narrow(cell)) for cell in row))
    return table


def _narrow(cell: str) -> str:
    """Return a number with its interval below it, in as few columns as it takes."""
    value, bracket, ends = cell.partition(" [")
    if not bracket:
        return cell
    low, high = (float(end) for end in ends.rstrip("]").split(", "))
    return f"{value}\n{low:.2f}-{high:.2f}"


def notes(content: Content) -> list[str]:
    """Return what a reader of the table must know besides, a line each."""
    lines = apart(content)
    lines += [
        f"Not ranked: {one['method']}{', ' * bool(one['setting'])}{one['setting']} ({one['why']})"
        for one in content["not_ranked"][:LINES]
    ]
    if (more := len(content["not_ranked"]) - LINES) > 0:
        lines.append(f"Not ranked: {more} more settings (not_ranked in {JSON}, or the page)")
    if content["models"][ORIGINAL]["forgetting"]["value"] >= 1:
        lines.append(
            "The original model gives no secret away: nothing here tells which method forgets"
        )
    ranked = {one["method"] for one in content["settings"]}
    lines += [
        f"{one['method']}: no setting is ranked"
        for one in content["methods"]
        if one["method"] not in ranked
    ]
    return lines


def apart(content: Content) -> list[str]:
    """Return how far the method with the largest area is ahead of each of the others."""
    areas = {one["method"]: one["area"]["value"] for one in content["methods"]}
    first = max(areas, key=areas.get)
    lines = []
    for pair in content["pairs"]:
        if first not in (pair["first"], pair["second"]) or pair["area"]["low"] is None:
            continue
        ends = sorted(pair["area"][end] * (1 if pair["first"] == first else -1) for end in ENDS)
        other = pair["second"] if pair["first"] == first else pair["first"]
        noise = "more than noise" if ends[0] > 0 else "within the noise"
        lines.append(
            f"{first} is ahead of {other} in area by {areas[first] - areas[other]:.3f} "
            f"[{ends[0]:.3f}, {ends[1]:.3f}]: {noise}"
        )
    return lines


def main_settings(content: Content) -> Sequence[str]:
    """Return the settings of the best points, a line each, with the answers that fell apart."""
    apart = {(one["method"], one["setting"]): one["fell_apart"] for one in content["settings"]}
    lines = []
    for method in content["methods"]:
        for point in method["within"]:
            if (setting := point["setting"]) is None:
                continue
            share = apart[method["method"], setting]
            said = f"; {percent(share, 0)} of the forget answers fell apart" if share else ""
            lines.append(
                f"{method['method']} within {percent(point['limit'])}: {_named(setting)} "
                f"(loss {percent(point['loss']['value'], 1)}{said})"
            )
    return lines

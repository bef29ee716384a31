"""Evaluation logs beside each other: those of `palu evaluate`, its `--json` files and
open-unlearning's, wherever they were made."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from palu.comparison.bootstrap import RESAMPLES, draw, interval
from palu.comparison.tables import write_csv
from palu.evaluation.eval_log import Log, LogError
from palu.evaluation.names import PER_EXAMPLE, SAMPLE_LEAKS, TEXT
from palu.evaluation.tofu import summarize
from palu.storage.output import evaluation_files

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

CSV, PNG = "logs.csv", "logs.png"
ENDING = "_EVAL.json"  # TOFU_EVAL.json, MUSE_EVAL.json, ...
JSON_KEYS = {"model", "template", "versions", "summary"}
"""Of a file of `palu evaluate --json`."""
AGAINST = ("forget_quality", "privleak")
"""Metrics that depend on a retrained model's log."""
# Names of `--json` that open-unlearning has other ones for.
_IN_LOGS = {"answer_probability": "Q_A_Prob", "rougeL_recall": "Q_A_ROUGE"}
# What an example of `--json` has where logs have a row of the metric; of all others they have all.
_ROWS_OF = {name: "generated" for name in PER_EXAMPLE if name in TEXT or name.startswith("rouge")}
_ROWS_OF |= {SAMPLE_LEAKS: SAMPLE_LEAKS}
_FIELDS = ("score", "prob", "rougeL_recall")
_ROUNDING = 1e-9

Values = dict[str, float]


@dataclass(frozen=True)
class EvaluationLog:
    """What a log says of one model.

    Attributes:
        name: in tables.
        source: in messages.
        aggregates: metric -> number.
        values: metric -> row -> number, of the metrics that are measured row by row.
        means: the metrics whose aggregate is the mean of their rows.
        rows: metric (or part of a membership attack) -> its rows, measured or not.
        answers: metric -> row -> the true answer.
        ids: set -> the ids of its rows in their order; those of `--json` files alone are known.
        settings: what it was measured with, as far as it is known.
    """

    name: str
    source: str
    aggregates: Values
    values: dict[str, Values]
    rows: dict[str, frozenset[str]]
    answers: dict[str, dict[str, str]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    ids: Mapping[str, list[str]] = field(default_factory=dict)

    @cached_property
    def means(self) -> list[str]:
        return [
            metric
            for metric, values in self.values.items()
            if metric in self.aggregates
            and abs(np.mean([*values.values()]) - self.aggregates[metric]) < _ROUNDING
        ]


def compare_logs(
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    retain_log: str | os.PathLike[str] | None = None,
) -> Table:
    """Compare logs of the same rows, write `CSV` and `PNG` into a folder, and return the table for
    the terminal.

    Args:
        paths: logs, their folders, or NAME=PATH; the first is what others are compared with.
        output: made where it is not there; None writes nothing.
        retain_log: of the retrained model: forget quality and privleak are computed anew.

    Raises:
        LogError: no log, or logs of other rows or another split; names what differs.
    """
    logs = read_logs(paths, retain_log)
    frame = logs_frame(logs)
    if output is not None:
        write_logs(logs, frame, Path(output))
    return logs_table(logs, frame)


def read_logs(
    paths: Sequence[str | os.PathLike[str]], retain_log: str | os.PathLike[str] | None = None
) -> list[EvaluationLog]:
    """Return logs that can stand in one table; see `compare_logs`."""
    if not paths:
        raise LogError("no log is given")
    named = [_named(os.fspath(path)) for path in paths]
    names = _names(named)
    retrained = None if retain_log is None else _file(Path(retain_log))
    logs = [read_log(path, name, retrained) for (_, path), name in zip(named, names, strict=True)]
    for other in logs[1:]:
        check_same_rows(logs[0], other)
    return logs


def read_log(path: Path, name: str, retain_log: Path | None = None) -> EvaluationLog:
    """Return what a log says. Raises LogError."""
    file = _file(path)
    log = Log.read(file, name)
    if set(log.metrics) >= JSON_KEYS:
        return _of_json(log, name, retain_log)
    return take_log(log, name, retain_log, _settings(file))


def take_log(
    log: Log, name: str, retain_log: Path | None = None, settings: Mapping[str, Any] | None = None
) -> EvaluationLog:
    """Return what a log that was read says. Raises LogError."""
    values, rows, answers = {}, {}, {}
    for metric in log.metrics:
        parts = [None] if not metric.startswith("mia_") else ["forget", "holdout"]
        for part in parts:
            entry = log.entry(metric)
            entry = entry if part is None else entry.get(part)
            if not isinstance(entry, Mapping) or "value_by_index" not in entry:
                continue
            of = log.rows(metric, part)
            rows[metric if part is None else f"{metric}, {part}"] = frozenset(map(str, of.rows))
            if part is None and (found := _field(of.rows)):
                values[metric] = of.numbers(found)
            said = {
                index: row["ground_truth"]
                for index, row in of.rows.items()
                if isinstance(row, Mapping) and isinstance(row.get("ground_truth"), str)
            }
            answers |= {metric: said} if said else {}
    if not rows:
        log.rows(next(iter(log.metrics), "forget_Q_A_Prob"))  # says what is missing
    aggregates = _aggregates(log, retain_log)
    return EvaluationLog(name, log.source, aggregates, values, rows, answers, settings or {})


def _aggregates(log: Log, retain_log: Path | None) -> Values:
    """Return the aggregates, computed anew where palu knows how; others as they are stored."""
    stored = {
        metric: entry.get("agg_value")
        for metric, entry in log.metrics.items()
        if isinstance(entry, Mapping)
    }
    left_out = AGAINST if retain_log is None else ()
    metrics = {metric: entry for metric, entry in log.metrics.items() if metric not in left_out}
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            warnings.filterwarnings("ignore", message=".*left out, not one of TOFU's")
            again = summarize(metrics, retain_log)
        for one in said:
            warnings.warn(str(one.message).replace("eval_log", log.source, 1), stacklevel=2)
    except LogError as error:
        if "none of TOFU's metrics" not in str(error):
            raise LogError(str(error).replace("eval_log", log.source, 1)) from None
        again = {}
    found = {metric: again.get(metric, value) for metric, value in stored.items()}
    return {
        metric: float(value)
        for metric, value in found.items()
        if isinstance(value, int | float) and np.isfinite(value)
    }


def _field(rows: Mapping[str, Any]) -> str | None:
    """Return which field of the rows is the metric's number; None where no row has a value."""
    known = [row for row in rows.values() if isinstance(row, Mapping)]
    return next((name for name in _FIELDS if any(row.get(name) is not None for row in known)), None)


def _settings(file: Path) -> Mapping[str, Any]:
    if not file.name.endswith(ENDING):
        return {}
    beside = file.parent / evaluation_files(file.name.removesuffix(ENDING))[2]
    return Log.read(beside, beside.name).entry("settings") if beside.is_file() else {}


def _of_json(log: Log, name: str, retain_log: Path | None) -> EvaluationLog:
    """Return what a file of `palu evaluate --json` says, by the names that logs have."""
    values, rows, ids, aggregates = {}, {}, {}, dict(log.metrics["summary"])
    if retain_log is not None and (stored := [one for one in AGAINST if one in aggregates]):
        raise LogError(
            f"{log.source}: has {stored[0]}, and not the rows that it is computed from against "
            f"{retain_log}: give the log that palu evaluate wrote to --output"
        )
    for part, result in log.metrics.items():
        if not isinstance(result, Mapping) or "examples" not in result:
            continue
        ids[part] = [str(example["id"]) for example in result["examples"]]
        for metric in PER_EXAMPLE:
            known = f"{part}_{_IN_LOGS.get(metric, metric)}"
            if part == "forget" and metric in ("exact_memorization", "extraction_strength"):
                known = metric
            numbers = [example.get(metric) for example in result["examples"]]
            measured = {str(n): v for n, v in enumerate(numbers) if v is not None}
            if measured:
                values[known] = measured
                rows[known] = frozenset(
                    str(n)
                    for n, example in enumerate(result["examples"])
                    if example.get(_ROWS_OF.get(metric, "id")) is not None
                )
                aggregates.setdefault(known, float(np.mean([*measured.values()])))
    if not rows:
        raise LogError(f"{log.source}: has no examples of any set")
    settings = {f"data_{part}": digest for part, digest in log.metrics.get("data", {}).items()}
    settings["template"] = log.metrics["template"]
    return EvaluationLog(name, log.source, aggregates, values, rows, {}, settings, ids)


def check_same_rows(one: EvaluationLog, other: EvaluationLog) -> None:
    """Raise LogError where two logs are not of the same rows, as far as they tell; warn where they
    do not tell, or were measured in another way."""
    both = [metric for metric in one.rows if metric in other.rows]
    if not both:
        raise LogError(f"{other.source}: has no metric that {one.source} has too")
    for metric in both:
        if one.rows[metric] != other.rows[metric]:
            raise LogError(
                f"{other.source}: {metric} has {_apart(one.rows[metric], other.rows[metric])} "
                f"{one.source}: they are of other rows or another split, and cannot be compared"
            )
    settings = one.settings.keys() & other.settings.keys()
    data = sorted(name for name in settings if name.startswith("data_"))
    sets = sorted(one.ids.keys() & other.ids.keys())
    differ = [name.removeprefix("data_") for name in data if _differ(one, other, name)]
    differ += [name for name in sets if one.ids[name] != other.ids[name]]
    if differ:
        raise LogError(
            f"{other.source}: its {differ[0]} set is another one than that of {one.source}: they "
            "cannot be compared"
        )
    told = _same_answers(one, other)
    if not (data or sets or told):
        warnings.warn(
            f"whether {other.source} and {one.source} are of the same rows is known by their "
            "numbers alone",
            stacklevel=3,
        )
    for name in sorted(settings & {"max_length", "max_new_tokens", "template"}):
        if _differ(one, other, name):
            warnings.warn(
                f"{other.source} was measured with another {name} than {one.source}", stacklevel=3
            )


def _differ(one: EvaluationLog, other: EvaluationLog, setting: str) -> bool:
    return one.settings[setting] != other.settings[setting]


def _same_answers(one: EvaluationLog, other: EvaluationLog) -> bool:
    """Return whether both logs have true answers. Raises LogError where those are not the same."""
    metrics = one.answers.keys() & other.answers.keys()
    for metric in sorted(metrics):
        mine, theirs = one.answers[metric], other.answers[metric]
        for row in sorted(mine.keys() & theirs.keys()):
            if " ".join(mine[row].split()) != " ".join(theirs[row].split()):
                raise LogError(
                    f"{other.source}: the true answer of row {row!r} of {metric} is another one "
                    f"than in {one.source}: they are of other data, and cannot be compared"
                )
    return bool(metrics)


def _apart(one: frozenset[str], other: frozenset[str]) -> str:
    if len(one) != len(other):
        return f"{len(other)} rows and not {len(one)} as in"
    return f"row {min(other - one)!r} and not {min(one - other)!r} as in"


# ---- names ---------------------------------------------------------------------------------------


def _named(text: str) -> tuple[str | None, Path]:
    name, equals, rest = text.partition("=")
    if equals and name and not os.path.exists(text):
        return name, Path(rest)
    return None, Path(text)


def _names(named: Sequence[tuple[str | None, Path]]) -> list[str]:
    """Return a name of each log: the last parts of its path that tell it from the others.

    Raises:
        LogError: a name or a file twice.
    """
    parts = [_parts(path) for _, path in named]
    names = []
    for number, (name, _) in enumerate(named):
        others = [one for other, one in enumerate(parts) if other != number]
        own = parts[number]
        ends = (own[-count:] for count in range(1, len(own) + 1))
        short = next((end for end in ends if all(one[-len(end) :] != end for one in others)), own)
        names.append(name or "/".join(short))
    if twice := [name for name in names if names.count(name) > 1]:
        raise LogError(f"{twice[0]!r} is given twice; name logs as NAME=PATH")
    return names


def _parts(path: Path) -> list[str]:
    """Return the parts of a path that tell what a log is of."""
    path = path.resolve()
    named = path.name.removesuffix(".json").removesuffix(".TOFU_EVAL")
    folder = list(path.parts[1:-1])
    return folder if path.name.endswith(ENDING) and named.endswith("_EVAL") else [*folder, named]


def _file(path: Path) -> Path:
    """Return the log of a path, which may be its folder. Raises LogError."""
    if not path.is_dir():
        return path
    found = sorted(path.glob(f"*{ENDING}"))
    if len(found) != 1:
        said = f"has {len(found)} logs in it" if found else f"has no TOFU{ENDING}"
        raise LogError(f"{path}: {said}; name the file")
    return found[0]


# ---- tables --------------------------------------------------------------------------------------


def logs_frame(logs: Sequence[EvaluationLog], *, resamples: int = RESAMPLES) -> pd.DataFrame:
    """Return a row for every log and metric: its value, with a bootstrap interval over the rows
    where it is their mean, and its difference to the first log's, the same rows drawn in both."""
    import pandas as pd

    lines = []
    for log in logs:
        for metric, value in log.aggregates.items():
            line = {"log": log.name, "metric": metric, "value": value}
            if metric in log.means:
                line |= _intervals(logs[0], log, metric, resamples)
            elif log is not logs[0] and metric in logs[0].aggregates:
                line["difference"] = value - logs[0].aggregates[metric]
            lines.append(line)
    ends = ["low", "high", "difference", "difference_low", "difference_high"]
    frame = pd.DataFrame(lines, columns=["log", "metric", "rows", "value", *ends])
    types = dict.fromkeys(["value", *ends], "float64")
    return frame.astype({"rows": "Int64", **types})


def _intervals(
    first: EvaluationLog, log: EvaluationLog, metric: str, resamples: int
) -> dict[str, Any]:
    own = log.values[metric]
    line: dict[str, Any] = {"rows": len(own)}
    resamples = resamples if len(own) > 1 else 0  # one row tells nothing of others
    found = _resampled(np.array([*own.values()]), resamples)
    line |= {"low": found["low"], "high": found["high"]}
    if log is first or metric not in first.means:
        return line
    base = first.values[metric]
    both = [row for row in own if row in base]
    if both:
        apart = _resampled(np.array([own[row] - base[row] for row in both]), resamples)
        line |= {"difference": apart["value"]}
        line |= {f"difference_{end}": apart[end] for end in ("low", "high")}
    return line


def _resampled(values: np.ndarray, resamples: int) -> dict[str, float | None]:
    return interval(_drawn(len(values), resamples) @ values / len(values))


@cache
def _drawn(rows: int, resamples: int) -> np.ndarray:
    weights, _ = draw({"rows": rows}, 1, resamples, 0)
    return weights["rows"]


def logs_table(logs: Sequence[EvaluationLog], frame: pd.DataFrame) -> Table:
    """Return a line a metric and a column a log, of `logs_frame`."""
    from rich.table import Table
    from rich.text import Text

    by = frame.drop(columns="rows").set_index(["metric", "log"])
    table = Table("metric", title="Evaluation logs", title_justify="left", caption_justify="left")
    for log in logs:
        table.add_column(log.name, justify="right", overflow="fold")
    for metric in sorted(set(frame["metric"])):
        cells = []
        for log in logs:
            if (metric, log.name) not in by.index:
                cells.append(Text("-"))
                continue
            row = by.loc[(metric, log.name)]
            apart = row["difference_low"] > 0 or row["difference_high"] < 0
            cells.append(Text(f"{row['value']:.4g}{' *' if apart else '  '}"))
        table.add_row(Text(metric), *cells)
    if len(logs) > 1:
        table.caption = (
            f"* differs from {logs[0].name}: the 95% interval of the paired difference over the "
            "rows leaves out 0. Forget quality and privleak are as stored, unless --retain-log "
            "is given."
        )
    return table


def write_logs(logs: Sequence[EvaluationLog], frame: pd.DataFrame, folder: Path) -> None:
    """Write the table of `logs_frame`, and plots, into a folder."""
    from palu.comparison.log_plot import draw_logs

    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / CSV, frame)
    draw_logs(folder / PNG, logs, frame)

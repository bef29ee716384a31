"""The rows that benchmarks leave: written, read, summarised in tables, compared.

Every benchmark writes the same columns, a row for a case, a provider and a metric: `p20`, `p50` and
`p80` of all `samples`, and the samples themselves as `values`: those of one process separated by
blanks, processes by semicolons. (Rows that were measured before `values` existed have none.)
"""

from __future__ import annotations

import csv
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

AXES = ("rows", "V", "k")
CASE = ("kernel", "V", "D", "rows", "k", "dtype", "setting")
KEY = (*CASE, "provider", "metric")
QUANTILES = ("p20", "p50", "p80")
MEMORY = ("peak_bytes", "allocated_bytes")
ENVIRONMENT = ("device", "processor", "threads", "versions", "commit")
COLUMNS = ("kernel", "provider", *CASE[1:], "metric", *QUANTILES, "samples", "values", "status")
COLUMNS += ENVIRONMENT
# Columns of a table beside time and status, where a row has them: heading, unit, format.
MORE = {
    "cpu_seconds": ("process ms", 1e-3, ".3f"),
    "device_seconds": ("device ms", 1e-3, ".3f"),
    "host_seconds": ("host ms", 1e-3, ".3f"),
    "peak_bytes": ("peak MiB", 2**20, ".1f"),
    "allocated_bytes": ("allocated", 2**20, ".1f"),
    "reference_bytes": ("reference MiB", 2**20, ".1f"),
    "sparse": ("sparse", 1, ".0f"),
}
Row = dict[str, Any]
Processes = Sequence[Sequence[float]]  # the samples of each process


def quantiles(samples: Sequence[float]) -> dict[str, float | None]:
    """Return p20, p50 and p80, None where there are no samples."""
    if not samples:
        return dict.fromkeys(QUANTILES)
    at = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    values = torch.quantile(torch.tensor(samples, dtype=torch.float64), at)
    return dict(zip(QUANTILES, values.tolist(), strict=True))


def row(
    case: Mapping[str, Any],
    provider: str,
    metric: str,
    processes: Processes,
    status: str,
    environment: Mapping[str, Any],
) -> Row:
    """Return a row of `COLUMNS`."""
    samples = [value for process in processes for value in process]
    texts = [" ".join(repr(float(value)) for value in process) for process in processes]
    result = {name: case.get(name) for name in CASE}
    result |= {"provider": provider, "metric": metric, **quantiles(samples)}
    result |= {"samples": len(samples), "values": ";".join(texts), "status": status}
    return result | {name: environment.get(name) for name in ENVIRONMENT}


def by_process(row: Row) -> list[list[float]]:
    """Return the samples of each process; the median where a row has no `values`."""
    if row["values"]:
        return [[float(x) for x in part.split()] for part in row["values"].split(";")]
    return [] if row["p50"] is None else [[row["p50"]]]


def round_ratio(a: Row | None, b: Row | None) -> float | None:
    """Return the median over rounds of a's time over b's in the same round; None where one has more
    rounds than the other."""
    a_rounds, b_rounds = ([x for p in by_process(row) for x in p] if row else [] for row in (a, b))
    if not a_rounds or len(a_rounds) != len(b_rounds):
        return None
    return statistics.median(x / y for x, y in zip(a_rounds, b_rounds, strict=True))


# ---- files ---------------------------------------------------------------------------------------


def write(path: Path, rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> None:
    """Write a CSV beside its place and rename it: a run that is cut short leaves whole rows.

    Raises:
        ValueError: the file there has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and path.stat().st_size:
        with path.open(newline="", encoding="utf-8") as stream:
            _check_columns(path, next(csv.reader(stream)), columns)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(beside, path)


def append(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Add rows to a CSV, which is made where it is not there."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def check_header(path: Path, columns: Sequence[str]) -> None:
    """Raise ValueError where a CSV that rows are to be added to has other columns."""
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            if (header := next(csv.reader(file), [])) != [*columns]:
                raise ValueError(f"{path} has other columns: {', '.join(header)}")


def read(path: Path) -> list[Row]:
    """Return the rows of a CSV; sizes are integers or None, quantiles numbers or None.

    Raises:
        ValueError: it is not a benchmark's.
    """
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        _check_columns(path, reader.fieldnames or (), COLUMNS)
        rows = list(reader)
    for one in rows:
        for name in ("V", "D", "rows", "k"):
            one[name] = int(one[name]) if one[name] else None
        for name in QUANTILES:
            one[name] = float(one[name]) if one[name] else None
    return rows


def _check_columns(path: Path, columns: Sequence[str], wanted: Sequence[str]) -> None:
    if missing := [name for name in wanted if name not in columns]:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}; it must be a CSV of this benchmark"
        )


# ---- tables --------------------------------------------------------------------------------------


def label(case: Any) -> str:
    """Return a case or a row in words."""
    values = case if isinstance(case, dict) else case._asdict()
    sizes = [f"{name}={values[name]}" for name in CASE[1:5] if values[name] is not None]
    words = [values["kernel"], *sizes, values["dtype"], values["setting"]]
    return " ".join(word for word in words if word)


def environment(row: Row) -> str:
    """Return where a row was measured, and with what."""
    return " | ".join(str(row[name]) for name in ENVIRONMENT if row.get(name))


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for one in rows:
        groups.setdefault(key(one), []).append(one)
    return groups


def text(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return columns side by side, the first one to the left, the others to the right."""
    cells = [list(headings), *map(list, lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def tables(rows: Sequence[Row], axes: Sequence[str] = AXES) -> str:
    """Return a table a case; then, where sizes vary, how time and memory grow with them."""
    parts = list(dict.fromkeys(map(environment, rows)))
    for same in grouped(rows, lambda row: tuple(row[name] for name in CASE)).values():
        parts.append(f"{label(same[0])}\n{_table(same)}")
    if lines := list(_slopes(rows, axes)):
        headings = ["growth", "of", "ms per unit", "KiB per unit", "time ~ size^", "memory ~ size^"]
        parts.append(text(headings, lines))
    return "\n\n".join(parts)


def _table(rows: Sequence[Row]) -> str:
    """Return a line a provider: quantiles of all calls, the median over processes of their mean,
    and the ratio of that to the first provider's."""
    providers = {
        name: {row["metric"]: row for row in own}
        for name, own in grouped(rows, lambda row: row["provider"]).items()
    }
    more = [name for name in MORE if any(name in metrics for metrics in providers.values())]
    padded = any("real_tokens" in metrics for metrics in providers.values())
    means = {name: mean_seconds(metrics.get("seconds")) for name, metrics in providers.items()}
    base = next((name for name, mean in means.items() if mean), next(iter(providers)))
    lines = []
    for provider, metrics in providers.items():
        seconds = metrics.get("seconds", {})
        mean = means[provider]
        errors = [one["p50"] for name, one in metrics.items() if name.endswith("error")]
        cells = [(_ratio(seconds.get(name), 1e-3), ".3f") for name in ("p50", "p20", "p80")]
        cells += [(_ratio(mean, 1e-3), ".3f"), (_ratio(mean, means[base]), ".2f")]
        for name in more:
            _, unit, how = MORE[name]
            value = metrics.get(name, {}).get("p50")
            cells.append((None if value is None else value / unit, how))
        cells += [(_padding(metrics), ".1%")] * padded
        cells.append((max((e for e in errors if e is not None), default=None), ".1e"))
        shown = ["-" if value is None else format(value, how) for value, how in cells]
        lines.append([provider, *shown, next(iter(metrics.values()))["status"][:80]])
    headings = ["", "ms", "p20", "p80", "mean", f"of {base}", *(MORE[name][0] for name in more)]
    return text([*headings, *["padding"] * padded, "off by", "status"], lines)


def mean_seconds(row: Row | None) -> float | None:
    """Return the median over processes of the mean of a process."""
    means = [statistics.fmean(process) for process in by_process(row)] if row else []
    return statistics.median(means) if means else None


def _padding(metrics: Mapping[str, Row]) -> float | None:
    """Return the share of positions that hold no token, in the first process."""
    if "real_tokens" not in metrics:
        return None
    real, all_of_them = (by_process(metrics[name])[0] for name in ("real_tokens", "positions"))
    return 1 - sum(real) / sum(all_of_them)


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def sweeps(rows: Sequence[Row], axis: str) -> dict[tuple, list[Row]]:
    """Return rows that differ in `axis` alone, at least two, in its order; by everything else."""
    measured = [row for row in rows if row[axis] is not None and row["p50"] is not None]
    groups = grouped(measured, lambda row: tuple(row[name] for name in KEY if name != axis))
    return {
        key: sorted(same, key=lambda row: row[axis])
        for key, same in groups.items()
        if len({row[axis] for row in same}) > 1
    }


def _slopes(rows: Sequence[Row], axes: Sequence[str]) -> Iterable[list[str]]:
    """A line for everything that was measured at several sizes: the slope of the least-squares line
    through the medians, and the exponent of the size between the smallest and the largest."""
    has_allocated = any(row["metric"] == "allocated_bytes" for row in rows)
    memory = "allocated_bytes" if has_allocated else "peak_bytes"
    for axis in axes:
        swept = sweeps(rows, axis)
        for key, same in swept.items():
            if same[0]["metric"] != "seconds":
                continue
            lines = [same, swept.get((*key[:-1], memory))]
            yield [
                f"{label({**same[0], axis: None})} {same[0]['provider']}",
                f"{axis} {same[0][axis]}..{same[-1][axis]}",
                *(
                    "-" if line is None else f"{_slope(line, axis) / unit:.4g}"
                    for line, unit in zip(lines, (1e-3, 2**10), strict=True)
                ),
                *("-" if line is None else _exponent(line, axis) for line in lines),
            ]


def _slope(line: Sequence[Row], axis: str) -> float:
    x, y = ([float(row[name]) for row in line] for name in (axis, "p50"))
    return statistics.linear_regression(x, y).slope


def _exponent(line: Sequence[Row], axis: str) -> str:
    """Return log(last / first) of the median over that of the size."""
    sizes, medians = (
        torch.tensor([float(row[name]) for row in (line[0], line[-1])]).log()
        for name in (axis, "p50")
    )
    exponent = (medians[1] - medians[0]) / (sizes[1] - sizes[0])
    return f"{float(exponent):.2f}" if exponent.isfinite() else "-"


# ---- comparing -----------------------------------------------------------------------------------


def compare(old: Sequence[Row], new: Sequence[Row]) -> tuple[str, int]:
    """Return a table of medians before and after, and how many got worse.

    Worse or better: the ranges from p20 to p80, of time or memory, do not overlap. What only one
    side has, and what could not run on one of them, is a line too.
    """
    before, after = ({tuple(row[name] for name in KEY): row for row in rows} for rows in (old, new))
    lines, worse = [], 0
    for key in dict.fromkeys([*before, *after]):
        a, b = before.get(key), after.get(key)
        either = a or b
        values = [None if one is None else one["p50"] for one in (a, b)]
        verdict = _verdict(a, b)
        worse += verdict == "worse"
        lines.append(
            [
                f"{label(either)} {either['provider']} {either['metric']}",
                *("-" if value is None else f"{value:.4g}" for value in values),
                "-" if None in values or not values[0] else f"{values[1] / values[0]:.3f}",
                verdict,
            ]
        )
    sides = [f"{side}: {environment(rows[0])}" for side, rows in (("old", old), ("new", new))]
    return "\n".join([*sides, "", text(["", "old", "new", "new / old", ""], lines)]), worse


def _verdict(a: Row | None, b: Row | None) -> str:
    if a is None or b is None:
        return "only in the new" if a is None else "only in the old"
    if None in (a["p50"], b["p50"]):
        return f"was: {a['status']}; is: {b['status']}"
    if not a["metric"].endswith(("seconds", *MEMORY)):
        return ""
    return "worse" if b["p20"] > a["p80"] else "better" if b["p80"] < a["p20"] else ""

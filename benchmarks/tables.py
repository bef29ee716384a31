"""What is made of the rows of a benchmark: tables, slopes, pictures, and what changed since.

Rows are those of ``suite.py``: a case, a provider, a metric and quantiles. Other files are turned
into such rows when they are read: those of ``loss_step`` and ``train_step``, which have a row a
process or a step, and those of ``gpu.sh``, which has other units.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import runner as harness

AXES = ("rows", "V", "k")
CASE = ("kernel", "V", "D", "rows", "k", "dtype")
KEY = (*CASE, "provider", "metric")
QUANTILES = ("p20", "p50", "p80")
MEMORY = ("peak_bytes", "allocated_bytes")
# Files with a row a process: columns that name them, what they measured, where its sizes are.
_RAW = {
    "forget_loss": ("loss_step", {"V": "vocab", "D": "hidden", "rows": "positions", "k": "top_k"}),
    "gradient_norm": ("train_step", {"rows": "batch_size", "k": "top_k"}),
}
# Metrics of ``gpu.sh``: what they are here, and the unit.
_UNITS = {"ms": ("seconds", 1e-3), "peak MiB": ("peak_bytes", 2**20)}
_PLACE = ("hardware", *harness.ENVIRONMENT)
Row = dict[str, Any]


def quantiles(samples: Sequence[float]) -> dict[str, float | None]:
    if not samples:
        return dict.fromkeys(QUANTILES)
    at = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    found = torch.quantile(torch.tensor(samples, dtype=torch.float64), at)
    return dict(zip(QUANTILES, found.tolist(), strict=True))


# ---- reading -------------------------------------------------------------------------------------


def read(path: Path) -> list[Row]:
    """The rows of a CSV; sizes are integers or None, quantiles numbers or None.

    Raises:
        ValueError: it is not a benchmark's.
    """
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        rows, columns = list(reader), reader.fieldnames or ()
    if not set(KEY) <= set(columns):
        for column in reversed(_RAW):
            if column in columns:
                return _summarised(rows, *_RAW[column])
        missing = ", ".join(name for name in KEY if name not in columns)
        raise ValueError(f"{path} has no column {missing}; it must be a CSV of a benchmark")
    for row in rows:
        row["metric"], unit = _UNITS.get(row["metric"], (row["metric"], 1))
        for name in ("V", "D", "rows", "k"):
            row[name] = int(row[name]) if row[name] else None
        for name in QUANTILES:
            row[name] = float(row[name]) * unit if row[name] else None
    return rows


def _summarised(raw: list[dict[str, str]], kernel: str, sizes: dict[str, str]) -> list[Row]:
    """Rows a process or a step -> rows a provider and metric."""
    groups: dict[tuple, tuple[Row, list[float]]] = {}
    for one in raw:
        grouped = ", grouped" if one.get("grouped") == "True" else ""
        row = dict.fromkeys(CASE) | {"kernel": kernel, "dtype": one["dtype"]}
        row["status"] = one.get("status", "ok")
        row |= {size: int(one[column]) for size, column in sizes.items()}
        row |= {"provider": one["provider"] + grouped}
        row |= {name: one[name] for name in harness.ENVIRONMENT}
        for metric in ("seconds", "peak_bytes"):
            key = tuple(row[name] for name in KEY if name != "metric")
            _, samples = groups.setdefault((*key, metric), (row | {"metric": metric}, []))
            samples += [float(one[metric])] if one[metric] else []
    return [
        row | quantiles(samples) | {"samples": len(samples)}
        for row, samples in groups.values()
        if samples or (row["status"] != "ok" and row["metric"] == "seconds")
    ]


# ---- tables --------------------------------------------------------------------------------------


def label(case: Any) -> str:
    """A case or a row in words."""
    values = case if isinstance(case, dict) else case._asdict()
    sizes = [f"{name}={values[name]}" for name in CASE[1:5] if values[name] is not None]
    return " ".join([values["kernel"], *sizes, values["dtype"]])


def place(row: Row) -> str:
    """Where it was measured, and with what."""
    return " | ".join(str(row[name]) for name in _PLACE if row.get(name))


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def tables(rows: Sequence[Row], axes: Sequence[str] = AXES) -> str:
    """A table a case; then, where sizes vary, how time and memory grow with them."""
    parts = [place(rows[0])]
    for them in grouped(rows, lambda row: tuple(row[name] for name in CASE)).values():
        parts.append(f"{label(them[0])}\n{_table(them)}")
    if lines := list(_slopes(rows, axes)):
        headings = ["growth", "of", "ms per unit", "KiB per unit", "time ~ size^", "memory ~ size^"]
        parts.append(harness.table(headings, lines))
    return "\n\n".join(parts)


def _table(rows: Sequence[Row]) -> str:
    """A line a provider."""
    lines, first = [], None
    for provider, them in grouped(rows, lambda row: row["provider"]).items():
        metrics = {row["metric"]: row for row in them}
        seconds = metrics.get("seconds", {})
        first = seconds if first is None else first
        errors = [r["p50"] for name, r in metrics.items() if name.endswith("error")]
        errors = [error for error in errors if error is not None]
        cells = [
            *((_over(seconds.get(name), 1e-3), ".3f") for name in ("p50", "p20", "p80")),
            (_over(seconds.get("p50"), first.get("p50")), ".2f"),
            *((_over(metrics.get(name, {}).get("p50"), 2**20), ".1f") for name in MEMORY),
            (max(errors, default=None), ".1e"),
        ]
        shown = ["-" if value is None else format(value, how) for value, how in cells]
        lines.append([provider, *shown, them[0]["status"]])
    base = next(iter(lines))[0]
    headings = ["", "ms", "p20", "p80", f"of {base}", "peak MiB", "allocated", "off by", "status"]
    return harness.table(headings, lines)


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def sweeps(rows: Sequence[Row], axis: str) -> dict[tuple, list[Row]]:
    """Rows that differ in ``axis`` alone, at least two, in its order; by everything else."""
    ok = [row for row in rows if row[axis] is not None and row["p50"] is not None]
    found = grouped(ok, lambda row: tuple(row[name] for name in KEY if name != axis))
    return {
        key: sorted(them, key=lambda row: row[axis])
        for key, them in found.items()
        if len({row[axis] for row in them}) > 1
    }


def _slopes(rows: Sequence[Row], axes: Sequence[str]) -> Iterable[list[str]]:
    """A line for everything that was measured at several sizes: the slope of the least-squares line
    through the medians, and the exponent of the size between the smallest and the largest."""
    for axis in axes:
        memory = "allocated_bytes"
        if not any(row["metric"] == memory for row in rows):
            memory = "peak_bytes"
        for key, them in sweeps(rows, axis).items():
            if them[0]["metric"] != "seconds":
                continue
            other = sweeps(rows, axis).get((*key[:-1], memory))
            lines = [them, other]
            fixed = {**them[0], axis: None}
            yield [
                f"{label(fixed)} {them[0]['provider']}",
                f"{axis} {them[0][axis]}..{them[-1][axis]}",
                *(
                    "-" if line is None else f"{_slope(line, axis) / unit:.4g}"
                    for line, unit in zip(lines, (1e-3, 2**10), strict=True)
                ),
                *("-" if line is None else _exponent(line, axis) for line in lines),
            ]


def _slope(line: Sequence[Row], axis: str) -> float:
    points = torch.tensor([[row[axis], row["p50"]] for row in line], dtype=torch.float64)
    x, y = points.unbind(1)
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def _exponent(line: Sequence[Row], axis: str) -> str:
    """log(last / first) of the median over that of the size."""
    sizes, medians = (
        torch.tensor([float(row[name]) for row in (line[0], line[-1])]).log()
        for name in (axis, "p50")
    )
    exponent = float((medians[1] - medians[0]) / (sizes[1] - sizes[0]))
    return f"{exponent:.2f}" if exponent == exponent and abs(exponent) != float("inf") else "-"


# ---- comparing -----------------------------------------------------------------------------------


def compare(old: Sequence[Row], new: Sequence[Row]) -> tuple[str, int]:
    """-> (a table of medians before and after, how many got worse).

    Worse or better: the ranges from p20 to p80, of time or memory, do not overlap. What only one
    side has, and what could not run on one of them, is a line too.
    """
    before, after = ({tuple(row[name] for name in KEY): row for row in rows} for rows in (old, new))
    lines, worse = [], 0
    for key in dict.fromkeys([*before, *after]):
        a, b = before.get(key), after.get(key)
        row = a or b
        values = [None if one is None else one["p50"] for one in (a, b)]
        verdict = ""
        if None not in values:
            if row["metric"] in ("seconds", *MEMORY):
                verdict = "worse" if b["p20"] > a["p80"] else ""
                verdict = "better" if b["p80"] < a["p20"] else verdict
        elif a is None or b is None:
            verdict = "only in the new" if a is None else "only in the old"
        else:
            verdict = f"was: {a['status']}; is: {b['status']}"
        worse += verdict == "worse"
        lines.append(
            [
                f"{label(row)} {row['provider']} {row['metric']}",
                *("-" if value is None else f"{value:.4g}" for value in values),
                "-" if None in values or not values[0] else f"{values[1] / values[0]:.3f}",
                verdict,
            ]
        )
    places = [f"{side}: {place(rows[0])}" for side, rows in (("old", old), ("new", new))]
    table = harness.table(["", "old", "new", "new / old", ""], lines)
    return "\n".join([*places, "", table]), worse


# ---- pictures ------------------------------------------------------------------------------------


def plot(rows: Sequence[Row], path: Path, axes: Sequence[str] = AXES) -> list[Path]:
    """Writes a PNG for every dtype beside ``path``, ``STEM-DTYPE.png``: curves over the sizes that
    vary, bars where none does. Without matplotlib it says so and writes none."""
    try:
        from benchmarks import plot as pictures
    except ImportError as error:
        print(f"no picture: {error}")
        return []
    written = []
    for dtype, them in grouped(rows, lambda row: row["dtype"]).items():
        picture = path.with_name(f"{path.stem}-{dtype}.png")
        if pictures.draw(them, picture, [axis for axis in axes if sweeps(them, axis)]):
            written.append(picture)
    return written

"""Draws the rows of one dtype: curves over sizes, or bars. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot, ticker

from benchmarks import tables as report
from palu.storage.files import new_file

Row = dict[str, Any]
MARKS = "osD^vPX*<>"


def draw(rows: Sequence[Row], path: Path, axes: Sequence[str]) -> bool:
    """-> whether there was anything to draw. Time on the left of memory, a line of panels for each
    kernel (and each other size that varies)."""
    measured = [row for row in rows if row["p50"] is not None]
    metrics = [m for m in ("seconds", _memory(measured)) if any(r["metric"] == m for r in measured)]
    columns = [(axis, metric) for axis in axes or [""] for metric in metrics]
    panels = _panels(measured, axes)
    if not panels or not columns:
        return False
    providers = dict.fromkeys(row["provider"] for row in measured)
    looks = {name: (f"C{n % 10}", MARKS[n % len(MARKS)]) for n, name in enumerate(providers)}
    figure, grid = pyplot.subplots(
        len(panels),
        len(columns),
        figsize=(1 + 3.6 * len(columns), 1.2 + 2.6 * len(panels)),
        squeeze=False,
        layout="constrained",
    )
    for line, (title, them) in zip(grid, panels.items(), strict=True):
        for panel, (axis, metric) in zip(line, columns, strict=True):
            own = [row for row in them if row["metric"] == metric]
            drawn = _curves(panel, own, axis, looks) if axis else _bars(panel, own, looks)
            panel.set_visible(drawn)
            panel.set_title(title, fontsize=9)
            unit = "milliseconds" if metric == "seconds" else f"{_words(metric)}, MiB"
            (panel.set_ylabel if axis else panel.set_xlabel)(unit, fontsize=8)
            panel.tick_params(labelsize=8)
    if axes:
        handles = [
            pyplot.Line2D([], [], color=color, marker=mark, label=name)
            for name, (color, mark) in looks.items()
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=6, fontsize=8)
    note = f"{rows[0]['dtype']}; medians and p20 to p80\n{report.place(rows[0])}"
    figure.supxlabel(note, fontsize=7)
    with new_file(path, "wb") as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)
    return True


def _memory(rows: Sequence[Row]) -> str:
    """PyTorch's allocator's count where there is one: it is exact."""
    found = any(row["metric"] == "allocated_bytes" for row in rows)
    return "allocated_bytes" if found else "peak_bytes"


def _words(metric: str) -> str:
    return "allocator's peak" if metric == "allocated_bytes" else "peak memory"


def _unit(row: Row) -> float:
    return 1e-3 if row["metric"] == "seconds" else 2**20


def _panels(rows: Sequence[Row], axes: Sequence[str]) -> dict[str, list[Row]]:
    """Rows by what is not on an axis."""
    sizes = [name for name in ("V", "D", "rows", "k") if name not in axes]

    def title(row: Row) -> str:
        parts = [f"{name} {row[name]}" for name in sizes if row[name] is not None]
        return ", ".join([row["kernel"], *parts])

    return report.grouped(rows, title)


def _curves(panel: Any, rows: Sequence[Row], axis: str, looks: dict[str, tuple]) -> bool:
    lines = report.sweeps(rows, axis).values()
    for place, line in enumerate(lines):
        color, mark = looks[line[0]["provider"]]
        height = {"zorder": 3 - place / len(lines)}  # the first provider over the others
        x = [row[axis] for row in line]
        low, middle, high = ([row[q] / _unit(row) for row in line] for q in report.QUANTILES)
        panel.plot(x, middle, color=color, marker=mark, markersize=4, linewidth=1.2, **height)
        panel.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    panel.set_xscale("log")
    panel.set_yscale("log")
    sizes = sorted({row[axis] for line in lines for row in line})
    panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
    panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    panel.minorticks_off()
    panel.set_xlabel(axis, fontsize=8)
    panel.grid(alpha=0.3)
    return bool(lines)


def _bars(panel: Any, rows: Sequence[Row], looks: dict[str, tuple]) -> bool:
    for place, row in enumerate(rows):
        low, middle, high = (row[q] / _unit(row) for q in report.QUANTILES)
        error = [[max(middle - low, 0)], [max(high - middle, 0)]]
        panel.barh(place, middle, xerr=error, color=looks[row["provider"]][0], capsize=2)
        panel.text(max(middle, high), place, f"  {middle:.3g}", va="center", fontsize=7)
    panel.set_yticks(range(len(rows)), [row["provider"] for row in rows])
    panel.invert_yaxis()
    panel.margins(x=0.15)
    return bool(rows)

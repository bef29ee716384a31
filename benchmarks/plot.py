"""Draw the rows of each dtype: curves over sizes, or bars. Needs matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.tables import Row

MARKS = "osD^vPX*<>"


def plot(rows: Sequence[Row], path: Path, axes: Sequence[str] = tables.AXES) -> list[Path]:
    """Write a PNG for every dtype beside `path`, `STEM-DTYPE.png`: curves over the sizes that vary,
    bars where none does. Without matplotlib it says so and writes none."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed")
        return []
    written = []
    for dtype, same in tables.grouped(rows, lambda row: row["dtype"]).items():
        picture = path.with_name(f"{path.stem}-{dtype}.png")
        if _draw(same, picture, [axis for axis in axes if tables.sweeps(same, axis)]):
            written.append(picture)
    return written


def _draw(rows: Sequence[Row], path: Path, axes: Sequence[str]) -> bool:
    """Return whether there was anything to draw. Time on the left of memory, a line of panels for
    each kernel (and each other size that varies)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [row for row in rows if row["p50"] is not None]
    metrics = [m for m in ("seconds", _memory(measured)) if any(r["metric"] == m for r in measured)]
    columns = [(axis, metric) for axis in axes or [""] for metric in metrics]
    panels = tables.grouped(measured, lambda row: _title(row, axes))
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
    for line, (title, same) in zip(grid, panels.items(), strict=True):
        for panel, (axis, metric) in zip(line, columns, strict=True):
            own = [row for row in same if row["metric"] == metric]
            drawn = _curves(panel, own, axis, looks) if axis else _bars(panel, own, looks)
            panel.set_visible(drawn)
            panel.set_title(title, fontsize=9)
            (panel.set_ylabel if axis else panel.set_xlabel)(_unit(metric)[1], fontsize=8)
            panel.tick_params(labelsize=8)
    if axes:
        handles = [
            pyplot.Line2D([], [], color=color, marker=mark, label=name)
            for name, (color, mark) in looks.items()
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=6, fontsize=8)
    where = tables.environment(rows[0])
    figure.supxlabel(f"{rows[0]['dtype']}; medians and p20 to p80\n{where}", fontsize=7)
    figure.savefig(path, format="png", dpi=110)
    pyplot.close(figure)
    return True


def _memory(rows: Sequence[Row]) -> str:
    """PyTorch's allocator's count where there is one: it is exact."""
    exact = any(row["metric"] == "allocated_bytes" for row in rows)
    return "allocated_bytes" if exact else "peak_bytes"


def _unit(metric: str) -> tuple[float, str]:
    if metric == "seconds":
        return 1e-3, "milliseconds"
    words = "allocator's peak" if metric == "allocated_bytes" else "peak memory"
    return 2**20, f"{words}, MiB"


def _title(row: Row, axes: Sequence[str]) -> str:
    sizes = [name for name in ("V", "D", "rows", "k") if name not in axes]
    parts = [f"{name} {row[name]}" for name in sizes if row[name] is not None]
    return "\n".join(filter(None, [", ".join([row["kernel"], *parts]), row["setting"]]))


def _curves(panel: Any, rows: Sequence[Row], axis: str, looks: dict[str, tuple]) -> bool:
    from matplotlib import ticker

    lines = tables.sweeps(rows, axis).values()
    for number, line in enumerate(lines):
        color, mark = looks[line[0]["provider"]]
        height = {"zorder": 3 - number / len(lines)}  # the first provider over the others
        x = [row[axis] for row in line]
        low, middle, high = (
            [row[q] / _unit(row["metric"])[0] for row in line] for q in tables.QUANTILES
        )
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
    for number, row in enumerate(rows):
        low, middle, high = (row[q] / _unit(row["metric"])[0] for q in tables.QUANTILES)
        error = [[max(middle - low, 0)], [max(high - middle, 0)]]
        panel.barh(number, middle, xerr=error, color=looks[row["provider"]][0], capsize=2)
        panel.text(max(middle, high), number, f"  {middle:.4g}", va="center", fontsize=7)
    panel.set_yticks(range(len(rows)), [row["provider"] for row in rows])
    panel.invert_yaxis()
    panel.margins(x=0.15)
    return bool(rows)

"""Plot evaluation logs: every metric of each, and how the rows of a few are spread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from palu.storage.files import new_file
from palu.terminal import visible

if TYPE_CHECKING:
    import pandas as pd

    from palu.comparison.logs import EvaluationLog

# Okabe and Ito's, which people with any colour vision tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKS = "osD^vPX"
SPREAD = {
    "forget_Q_A_Prob": "Probability of the answers to forget",
    "forget_truth_ratio": "Truth ratio of the answers to forget",
    "retain_Q_A_Prob": "Probability of the answers to keep",
}
"""Metrics whose rows are drawn -> title. Forget quality compares the curves of truth ratios."""
NO_SHARES = ("longest_run", "answer_tokens", "privleak", "verbmem_f", "knowmem_f", "knowmem_r")
"""What ends the names of metrics that are counts or percent: between 0 and 1 by chance."""


def draw_logs(path: Path, logs: Sequence[EvaluationLog], frame: pd.DataFrame) -> None:
    """Write the figure as PNG.

    Args:
        frame: of `palu.comparison.logs.logs_frame`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = frame[(frame["value"] >= 0) & (frame["value"] <= 1)]
    shown = shown[~shown["metric"].str.endswith(NO_SHARES)]
    metrics = sorted(set(shown["metric"]))
    spread = [metric for metric in SPREAD if any(metric in log.values for log in logs)]
    height = max(2.6 * max(1, len(spread)), 1.6 + 0.3 * len(metrics))
    figure = Figure(figsize=(11 if spread else 7, height), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(max(1, len(spread)), 2 if spread else 1)
    axes = figure.add_subplot(grid[:, 0])
    _draw_metrics(axes, logs, shown, metrics)
    for place, metric in enumerate(spread):
        _draw_spread(figure.add_subplot(grid[place, 1]), logs, metric)
    lines, names = axes.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper left", ncols=min(3, len(logs)), frameon=False)
    with new_file(path, "wb") as file:
        figure.savefig(file, format="png", metadata={"Software": None})


def style(number: int) -> dict[str, Any]:
    """Return colour and mark of a log by its number."""
    return {"color": COLORS[number % len(COLORS)], "marker": MARKS[number % len(MARKS)]}


def _draw_metrics(
    axes: Any, logs: Sequence[EvaluationLog], shown: pd.DataFrame, metrics: Sequence[str]
) -> None:
    """Draw a line a metric with a mark a log, and the interval where there is one."""
    places = {metric: place for place, metric in enumerate(metrics)}
    for number, log in enumerate(logs):
        own = shown[shown["log"] == log.name]
        shift = 0.5 * (number - (len(logs) - 1) / 2) / max(1, len(logs))
        at = np.array([places[metric] for metric in own["metric"]]) + shift
        low, high = (own[end].fillna(own["value"]) for end in ("low", "high"))
        axes.errorbar(
            own["value"],
            at,
            xerr=[own["value"] - low, high - own["value"]],
            **style(number),
            linestyle="none",
            markersize=4.5,
            elinewidth=1.2,
            label=_shown(log.name),
        )
    axes.set_yticks(range(len(metrics)), metrics)
    axes.set_ylim(len(metrics) - 0.4, -0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("value, with its 95% interval over the rows")
    axes.set_title("Metrics between 0 and 1", loc="left", fontweight="bold")
    axes.grid(True, alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_spread(axes: Any, logs: Sequence[EvaluationLog], metric: str) -> None:
    """Draw, for each log, which share of the rows has at most a value."""
    for number, log in enumerate(logs):
        if metric in log.values:
            values = np.array([*log.values[metric].values()])
            axes.ecdf(values, color=style(number)["color"], linewidth=1.6)
    if metric == "forget_truth_ratio":
        _log_scale(axes)
    else:
        axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(metric)
    axes.set_ylabel("share of rows below")
    axes.set_title(SPREAD[metric], loc="left", fontweight="bold", fontsize=10)
    axes.grid(True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _log_scale(axes: Any) -> None:
    """Scale an axis by powers of ten, with labels that do not run into one another."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    between = (1.0,) if high > 50 * low else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(LogLocator(subs=between))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _shown(name: str) -> str:
    """Return a name that starts no formula, and is not left out of a legend."""
    name = visible(name).replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name

"""Plot a run: its loss terms, and the probabilities of one answer's tokens before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from palu.storage.files import new_file

BEFORE, AFTER, SENSITIVE = "#8c8c8c", "#1f77b4", "#d62728"
TERM_COLORS = {"forget": "#d62728", "preserve": "#2ca02c", "retain": "#1f77b4"}


@dataclass(frozen=True)
class TokenChange:
    """One answer token: its text, whether it is sensitive, its probability before and after."""

    text: str
    sensitive: bool
    before: float
    after: float


def draw_forgetting(
    path: Path,
    curve: Sequence[dict[str, float]],
    question: str,
    tokens: Sequence[TokenChange],
) -> None:
    """Write the figure as PNG.

    Args:
        curve: one dict a step with `step`, `forget`, `preserve`, `retain`.
        question: the question that `tokens` answer; the panel's title.
        tokens: the answer in order.
    """
    # Without pyplot: no window system, and no state shared with the caller's own plots.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = max(11.0, 5.0 + 0.62 * len(tokens))
    figure = Figure(figsize=(width, 5.2), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[4.4, width - 4.4])
    _draw_curves(left, curve)
    _draw_tokens(right, question, tokens)
    with new_file(path, "wb") as file:
        figure.savefig(file, format="png", metadata={"Software": None})


def _draw_curves(axes, curve: Sequence[dict[str, float]]) -> None:
    steps = [entry["step"] for entry in curve]
    for name, color in TERM_COLORS.items():
        # A log axis has no place for 0, the preserve term at the first step.
        values = [entry[name] if entry[name] > 0 else math.nan for entry in curve]
        axes.plot(steps, values, color=color, linewidth=1.6, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss term, not weighted")
    axes.set_title("Loss terms during unlearning", loc="left", fontweight="bold")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(frameon=False, loc="best")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_tokens(axes, question: str, tokens: Sequence[TokenChange]) -> None:
    from matplotlib.patches import Patch

    width = 0.38
    positions = range(len(tokens))
    sensitive = [(x, token) for x, token in zip(positions, tokens, strict=True) if token.sensitive]
    for x, _ in sensitive:  # behind the bars
        axes.axvspan(x - 0.5, x + 0.5, color=SENSITIVE, alpha=0.12, linewidth=0)
    left, right = ([x + shift * width / 2 for x in positions] for shift in (-1, 1))
    before = axes.bar(left, [t.before for t in tokens], width, color=BEFORE, label="before")
    after = axes.bar(right, [t.after for t in tokens], width, color=AFTER, label="after")
    for x, token in sensitive:  # a bar near 0 cannot be seen; its value can
        style = {"color": AFTER, "fontsize": 8, "ha": "center", "rotation": 90}
        axes.text(x + width / 2, token.after + 0.02, f"{token.after:.3f}", **style)
    # A dollar sign would start a formula.
    labels = [token.text.replace("$", r"\$") for token in tokens]
    axes.set_xticks(list(positions), labels, rotation=45, ha="right", rotation_mode="anchor")
    for label, token in zip(axes.get_xticklabels(), tokens, strict=True):
        if token.sensitive:
            label.set_color(SENSITIVE)
            label.set_fontweight("bold")
    axes.set_xlim(-0.6, len(tokens) - 0.4)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("probability of the true token")
    axes.set_title(question, loc="left", fontweight="bold")
    axes.grid(True, axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    marked = Patch(color=SENSITIVE, alpha=0.25, linewidth=0, label="sensitive token")
    axes.figure.legend(
        handles=[before, after, marked], loc="outside lower right", ncols=3, frameon=False
    )

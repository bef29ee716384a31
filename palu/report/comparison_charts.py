"""Charts of a comparison: forgetting over loss of utility, and the curves of training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from palu.report.charts import Plot, Point

if TYPE_CHECKING:
    from markupsafe import Markup

Method = Mapping[str, Any]
_LARGE, _SMALL = (400, 290), (240, 160)
_POINTS = 80  # of a curve that are drawn


class Frontiers:
    """The axes that all pictures of a comparison share, and what stands in all of them.

    Args:
        methods: as `palu.report.compared.methods_of` returns them.
        models: name -> `{"loss", "forgetting"}` of the original and the retrained model.
        losses: losses of utility of which the page tells the best point.
    """

    def __init__(
        self,
        methods: Sequence[Method],
        models: Mapping[str, Mapping[str, float]],
        losses: Sequence[float],
    ) -> None:
        self.methods, self.models, self.losses = methods, models, losses
        places = [_at(one) for method in methods for one in method["settings"]]
        places += [(one["loss"], one["forgetting"]) for one in models.values()]
        widest = max(losses)
        left = min(0.0, *(loss for loss, _ in places))
        self.x = (max(left, -widest) - widest / 10, 2 * widest)
        lowest = math.floor(10 * min(1.0, *(value for _, value in places))) / 10
        self.y = (max(0.0, min(lowest, 0.8)), 1.0)
        self.beyond = sum(loss > self.x[1] for loss, _ in places)

    def all(self) -> Markup:
        """Return the picture of every method."""
        plot = self._axes(_LARGE, large=True)
        for method in self.methods:
            for one in method["settings"]:
                if not one["on_frontier"]:
                    plot.mark(*_at(one), f"off {method['kind']}")
        ranked = self.methods[::-1]  # the first lies on top
        for method in ranked:
            plot.line(self._steps(method["frontier"]), f"front {method['kind']}")
        self._models(plot, named=True)
        for method in ranked:
            for one in method["settings"]:
                if not one["on_frontier"]:
                    continue
                x, y = plot.place(*_at(one))
                plot.parts.append(
                    f'<circle class="badge {method["kind"]}" cx="{x:.1f}" cy="{y:.1f}" r="7"/>'
                )
                plot.text(x, y + 3.5, method["letter"], "letter")
        said = "; ".join(
            f"{m['letter']}, {m['name']}: {_said(m['frontier'])}" for m in self.methods
        )
        text = f"{said}. {self._said_models()} The table below has the numbers."
        title = "Forgetting over loss of utility, all methods"
        return plot.svg("frontier", title, text, "chart wide-chart")

    def one(self, method: Method) -> Markup:
        """Return the picture of a method, the others' frontiers in grey behind it."""
        plot = self._axes(_SMALL, large=False)
        for other in self.methods:
            if other is not method:
                plot.line(self._steps(other["frontier"]), "behind")
        self._models(plot, named=False)
        plot.line(self._steps(method["frontier"]), f"front {method['kind'].split()[0]}")
        for one in method["settings"]:
            kind = "on" if one["on_frontier"] else "off"
            plot.mark(*_at(one), f"{kind} {method['kind'].split()[0]}")
        count = len(method["settings"])
        text = f"{count} setting{'s' if count != 1 else ''}; frontier: {_said(method['frontier'])}."
        name = f"frontier-{method['letter']}"
        return plot.svg(name, f"{method['letter']}: frontier of {method['name']}", text)

    def _axes(self, size: tuple[int, int], *, large: bool) -> Plot:
        plot = Plot(self.x, self.y, size, left=38, right=22, bottom=44 if large else 30)
        low, high = self.y
        count = round(10 * (high - low))
        for number in range(0, count + 1, max(1, math.ceil(count / (5 if large else 2)))):
            plot.level(low + number / 10, f"{low + number / 10:.1f}")
        for loss in (0.0, *self.losses, self.x[1]):
            x, bottom = plot.place(loss, low)
            plot.parts.append(
                f'<line class="loss" x1="{x:.1f}" x2="{x:.1f}" y1="{plot.top}" y2="{bottom}"/>'
            )
            if large or loss in (0.0, max(self.losses), self.x[1]):
                over = "+" if loss == self.x[1] and self.beyond else ""
                plot.text(x, bottom + 15, f"{100 * loss:g}%{over}", "middle")
        if large:
            middle = (plot.left + plot.right) / 2
            plot.text(middle, size[1] - 8, "loss of utility", "middle")
            plot.text(plot.left + 4, plot.top + 9, "forgetting", "start")
        return plot

    def _steps(self, frontier: Sequence[Point]) -> list[Point]:
        """Return the corners of the largest forgetting as a function of the loss."""
        corners: list[Point] = []
        for loss, forgetting in frontier:
            if corners:
                corners.append((loss, corners[-1][1]))
            corners.append((loss, forgetting))
        if corners and corners[-1][0] < self.x[1]:
            corners.append((self.x[1], corners[-1][1]))
        return corners

    def _models(self, plot: Plot, *, named: bool) -> None:
        for name, shape in (("original", "diamond"), ("retrained", "triangle")):
            if (one := self.models.get(name)) is None:
                continue
            if name == "retrained":
                plot.line([(end, one["forgetting"]) for end in self.x], "retrained")
            plot.mark(one["loss"], one["forgetting"], "model", shape)
            if named:
                x, y = plot.place(one["loss"], one["forgetting"])
                below = y - 10 < plot.top + 12
                plot.text(x + 9, y + 16 if below else y - 6, name, "start strong")

    def _said_models(self) -> str:
        return " ".join(
            f"The {name} model: forgetting {one['forgetting']:.3f} at a loss of {one['loss']:.1%}."
            for name, one in self.models.items()
        )


def _at(setting: Mapping[str, Any]) -> Point:
    return setting["loss"]["value"], setting["forgetting"]["value"]


def _said(frontier: Iterable[Point]) -> str:
    points = [f"{forgetting:.3f} from a loss of {loss:.1%} on" for loss, forgetting in frontier]
    return ", ".join(points) or "no setting on it"


def curve_chart(
    name: str, title: str, runs: Sequence[Sequence[Mapping[str, Any]]], parts: Sequence[str]
) -> Markup | None:
    """Return the curves of a method's runs, a line a run and part of the loss; None where none has
    two steps.

    Args:
        name: of the picture in the page.
        title: of the picture.
        runs: the steps of each run: `{"step": ..., part: loss or None}`.
        parts: parts of the loss to draw; the first is solid, the next are dashed.
    """
    lines = [
        (number, part, points)
        for number, part in enumerate(parts)
        for run in runs
        if len(points := thinned([(s["step"], s[part]) for s in run if _has(s, part)])) > 1
    ]
    if not lines:
        return None
    across = [x for _, _, points in lines for x, _ in points]
    up = [y for _, _, points in lines for _, y in points]
    low, high = min(up), max(up)
    if low == high:
        low, high = low - 0.5, high + 0.5
    if min(across) == max(across):
        return None
    plot = Plot((min(across), max(across)), (low, high), _SMALL, left=54, right=12)
    for value in (low, (low + high) / 2, high):
        plot.level(value, f"{value:.2g}")
    for anchor, step in (("start", plot.x[0]), ("end", plot.x[1])):
        plot.text(plot.place(step, low)[0], _SMALL[1] - 6, f"step {step:g}", anchor)
    for number, _, points in lines:
        plot.line(points, parts[number])
    said = "; ".join(
        f"{part}: from {points[0][1]:.4g} to {points[-1][1]:.4g}" for _, part, points in lines
    )
    return plot.svg(name, title, f"{said}.")


def thinned(points: Sequence[Point]) -> list[Point]:
    """Return at most about `_POINTS` of a curve: the first and the last, and between them the least
    and the greatest of each stretch, so that no peak is lost."""
    if len(points) <= _POINTS:
        return list(points)
    inner, stretches = points[1:-1], _POINTS // 2 - 1
    kept = [points[0]]
    for number in range(stretches):
        part = inner[number * len(inner) // stretches : (number + 1) * len(inner) // stretches]
        ends = {part.index(pick(part, key=lambda point: point[1])) for pick in (min, max)}
        kept += [part[at] for at in sorted(ends)]
    return [*kept, points[-1]]


def _has(step: Mapping[str, Any], part: str) -> bool:
    value = step.get(part)
    return value is not None and math.isfinite(value)

"""Charts of a report: inline SVG, whose colours are the page's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from palu.terminal import visible

if TYPE_CHECKING:
    from markupsafe import Markup

# Field of a check -> class of its line, and what it is.
_LINES = {
    "sensitive_probability": ("forgotten", "sensitive words"),
    "retain_probability": ("kept", "answers to keep"),
}

Point = tuple[float, float]


class Plot:
    """A picture with two axes; parts are drawn in the order in which they are added.

    Args:
        x, y: the least and the greatest value of each axis; what is beyond stands at the edge.
        size: width and height in units of the picture; a text is 11 units high.
        left, right, top, bottom: margins.
    """

    def __init__(
        self,
        x: Point,
        y: Point,
        size: tuple[int, int] = (340, 170),
        *,
        left: float = 34,
        right: float = 8,
        top: float = 10,
        bottom: float = 26,
    ) -> None:
        self.x, self.y, self.size = x, y, size
        self.left, self.top = left, top
        self.right, self.bottom = size[0] - right, size[1] - bottom
        self.parts: list[str] = []

    def place(self, x: float, y: float) -> Point:
        """Return where a point is in the picture."""

        def share(value: float, ends: Point) -> float:
            return min(1.0, max(0.0, (value - ends[0]) / (ends[1] - ends[0])))

        across, up = share(x, self.x), share(y, self.y)
        return (
            self.left + across * (self.right - self.left),
            self.bottom - up * (self.bottom - self.top),
        )

    def text(self, x: float, y: float, text: str, kind: str) -> None:
        """Write a text at a place of the picture."""
        from markupsafe import escape

        said = escape(visible(text))
        self.parts.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{said}</text>')

    def level(self, value: float, text: str) -> None:
        """Draw a line from left to right at a value, its name before it."""
        x, y = self.place(self.x[0], value)
        self.parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        self.text(x - 6, y + 4, text, "end")

    def line(self, points: Iterable[Point], kind: str) -> None:
        """Draw a line through points."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.place(*point) for point in points))
        self.parts.append(f'<polyline class="{kind}" points="{path}"/>')

    def mark(self, x: float, y: float, kind: str, shape: str = "circle") -> None:
        """Draw a mark at a point: `circle`, `square`, `diamond` or `triangle`."""
        x, y = self.place(x, y)
        if shape == "circle":
            self.parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
        elif shape == "square":
            self.parts.append(
                f'<rect class="{kind}" x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6"/>'
            )
        else:
            corners = [(0, -6), (5, 4), (-5, 4)]
            if shape == "diamond":
                corners = [(0, -6), (6, 0), (0, 6), (-6, 0)]
            path = " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)
            self.parts.append(f'<polygon class="{kind}" points="{path}"/>')

    def svg(self, name: str, title: str, description: str, kind: str = "chart") -> Markup:
        """Return the picture; `name` begins its ids in the page."""
        from markupsafe import Markup, escape

        width, height = self.size
        title, description = escape(visible(title)), escape(visible(description))
        return Markup(
            f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" '
            f'aria-labelledby="{name}-title" aria-describedby="{name}-desc">'
            f'<title id="{name}-title">{title}</title>'
            f'<desc id="{name}-desc">{description}</desc>'
            f"{''.join(self.parts)}</svg>"
        )


def checks_chart(checks: Sequence[dict[str, Any]]) -> Markup | None:
    """Return a line chart of what the run measured after each epoch; None for fewer than two
    checks."""
    lines = {
        name: [(c["epoch"], c[name]) for c in checks if name in c and "epoch" in c]
        for name in _LINES
    }
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    epochs = sorted({x for points in lines.values() for x, _ in points})
    if not epochs or epochs[0] == epochs[-1]:
        return None
    plot = Plot((epochs[0], epochs[-1]), (0, 1))
    for level in (0, 0.5, 1):
        plot.level(level, f"{level:g}")
    for anchor, epoch in (("start", epochs[0]), ("end", epochs[-1])):
        plot.text(plot.place(epoch, 0)[0], plot.size[1] - 6, f"epoch {epoch:g}", anchor)
    said = []
    for name, points in lines.items():
        kind, title = _LINES[name]
        plot.line(points, kind)
        for point in points:
            plot.mark(*point, kind, "circle" if kind == "forgotten" else "square")
        said.append(f"{title}: from {points[0][1]:.3f} to {points[-1][1]:.3f}")
    return plot.svg(
        "chart",
        "Probability after each epoch of the run",
        f"{'; '.join(said)}. The table below has every number.",
    )

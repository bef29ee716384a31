"""Charts of a report: inline SVG, whose colours are the page's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markupsafe import Markup

# Field of a check -> class of its line, and what it is.
_LINES = {
    "sensitive_probability": ("forgotten", "sensitive words"),
    "retain_probability": ("kept", "answers to keep"),
}
_WIDTH, _HEIGHT, _LEFT, _TOP = 340, 170, 34, 10


def checks_chart(checks: Sequence[dict[str, Any]]) -> Markup | None:
    """Return a line chart of what the run measured after each epoch; None for fewer than two
    checks."""
    from markupsafe import Markup

    lines = {
        name: [(c["epoch"], c[name]) for c in checks if name in c and "epoch" in c]
        for name in _LINES
    }
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    epochs = sorted({x for points in lines.values() for x, _ in points})
    first, last = epochs[0], epochs[-1]
    if first == last:
        return None

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first)
        return _LEFT + across * (_WIDTH - _LEFT - 8), _TOP + (1 - y) * (_HEIGHT - _TOP - 26)

    parts = []
    for level in (0, 0.5, 1):
        x, y = place(first, level)
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{_WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text class="end" x="{x - 6:.1f}" y="{y + 4:.1f}">{level:g}</text>')
    for anchor, epoch in (("start", first), ("end", last)):
        x, _ = place(epoch, 0)
        text = f"epoch {epoch:g}"
        parts.append(f'<text class="{anchor}" x="{x:.1f}" y="{_HEIGHT - 6}">{text}</text>')
    said = []
    for name, points in lines.items():
        kind, title = _LINES[name]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline class="{kind}" points="{path}"/>')
        for x, y in (place(*point) for point in points):
            mark = (
                f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
                if kind == "forgotten"
                else f'<rect class="{kind}" x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6"/>'
            )
            parts.append(mark)
        said.append(f"{title}: from {points[0][1]:.3f} to {points[-1][1]:.3f}")
    return Markup(
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        'aria-labelledby="chart-title" aria-describedby="chart-desc">'
        '<title id="chart-title">Probability after each epoch of the run</title>'
        f'<desc id="chart-desc">{"; ".join(said)}. The table below has every number.</desc>'
        f"{''.join(parts)}</svg>"
    )

"""Small plots as SVG text: a report is one file that opens anywhere, without a network or a library."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 560, 240, 62, 40, 12, 14
COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444")
Points = Sequence[tuple[float, float]]


def _ticks(top: float, count: int = 5) -> list[float]:
    if top <= 0 or not math.isfinite(top):
        return [0.0, 1.0]
    step = 10 ** math.floor(math.log10(top / count))
    for factor in (1, 2, 2.5, 5, 10):
        if top / (step * factor) <= count:
            step *= factor
            break
    return [step * number for number in range(math.ceil(top / step - 1e-9) + 1)]


def number(value: float) -> str:
    """A short form of a number."""
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


class Plot:
    """One pair of axes from zero. Add what is to be drawn, then take `svg`."""

    def __init__(self, title: str, x: str, y: str, x_top: float, y_top: float) -> None:
        self._xs, self._ys = _ticks(x_top), _ticks(y_top)
        self._legend: list[str] = []
        self._marks: list[str] = []
        self._title, self._x, self._y = title, x, y

    def _place(self, x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * min(x / self._xs[-1], 1)
        up = HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * min(y / self._ys[-1], 1)
        return round(across, 1), round(up, 1)

    def line(self, points: Points, name: str = "") -> Plot:
        """Connect the points."""
        colour = COLOURS[len(self._legend) % len(COLOURS)]
        self._legend.append(name)
        path = " ".join(f"{x},{y}" for x, y in (self._place(*point) for point in points))
        self._marks.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" points="{path}"/>')
        return self

    def dots(self, points: Points, name: str = "", bad: bool = False) -> Plot:
        """One small circle a point."""
        colour = COLOURS[3] if bad else COLOURS[len(self._legend) % len(COLOURS)]
        self._legend.append(name)
        for point in points:
            x, y = self._place(*point)
            self._marks.append(f'<circle cx="{x}" cy="{y}" r="2" fill="{colour}" fill-opacity="0.55"/>')
        return self

    def level(self, y: float, name: str) -> Plot:
        """A dashed line across: what was promised."""
        if y <= self._ys[-1]:
            (left, up), (right, _) = self._place(0, y), self._place(self._xs[-1], y)
            self._marks.append(
                f'<line x1="{left}" y1="{up}" x2="{right}" y2="{up}" stroke="#ef4444" stroke-dasharray="5 4"/>'
                f'<text x="{right - 4}" y="{up - 4}" text-anchor="end" fill="#ef4444">{html.escape(name)}</text>'
            )
        return self

    @property
    def svg(self) -> str:
        """The plot."""
        parts = [f'<figure><figcaption>{html.escape(self._title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}">']
        for tick in self._ys:
            x, y = self._place(0, tick)
            parts.append(f'<line x1="{x}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}" stroke="#8884" />')
            parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{number(tick)}</text>')
        for tick in self._xs:
            x, y = self._place(tick, 0)
            parts.append(f'<text x="{x}" y="{y + 15}" text-anchor="middle">{number(tick)}</text>')
        middle = (TOP + HEIGHT - BOTTOM) / 2
        parts.append(
            f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(self._x)}</text>'
        )
        parts.append(
            f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
            f"{html.escape(self._y)}</text>"
        )
        parts += self._marks
        named = [(place, name) for place, name in enumerate(self._legend) if name]
        for row, (place, name) in enumerate(named):
            colour = COLOURS[place % len(COLOURS)]
            y = TOP + 10 + 15 * row
            parts.append(f'<rect x="{LEFT + 8}" y="{y - 8}" width="10" height="10" fill="{colour}"/>')
            parts.append(f'<text x="{LEFT + 23}" y="{y + 1}">{html.escape(name)}</text>')
        return "".join([*parts, "</svg></figure>"])


def top(*series: Points) -> float:
    """The largest y of all series, at least a little above zero."""
    return max([y for points in series for _, y in points if math.isfinite(y)], default=0.0) or 1e-3

"""Draw every board from a Prometheus, where no Grafana can run: `python -m grafana.picture --prometheus URL --out DIR`.

Not Grafana's look, but Grafana's panels: the same places, queries, units, thresholds and words. Needs matplotlib, which
is no dependency of the project (the load generator's environment has it). Panels that ask Loki say so.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

from grafana.build import BOARDS
from grafana.panels import MEANING, Board, Panel
from grafana.queries import filled

Series = list[tuple[str, list[float], list[float]]]  # name, seconds ago (negative), values
INK, PAPER, CARD, GRID = "#d8d9da", "#111217", "#181b1f", "#2c3235"
COLOURS = ["#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#37872d", "#fade2a", "#c0d8ff"]
NAMED = {"green": "#56a64b", "red": "#e02f44", "blue": "#3274d9", "purple": "#a352cc", "orange": "#ff780a"}


class Source:
    """A Prometheus over the last `span` seconds."""

    def __init__(self, url: str, span: float) -> None:
        self.url, self.span, self.now = url, span, time.time()

    def _get(self, path: str, **form: Any) -> Any:
        address = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(form)}"
        with urllib.request.urlopen(address, timeout=20) as answer:  # noqa: S310 # the operator's own URL
            return json.load(answer)["data"]

    def over(self, expr: str, legend: str) -> Series:
        """The series of a query over the span."""
        step = max(1, round(self.span / 120))
        found = self._get("query_range", query=expr, start=self.now - self.span, end=self.now, step=step)["result"]
        return [
            (
                _name(legend, one["metric"]),
                [float(at) - self.now for at, _ in one["values"]],
                [float(value) for _, value in one["values"]],
            )
            for one in found
        ]

    def at_once(self, expr: str, legend: str) -> list[tuple[str, float]]:
        """The values of a query now."""
        found = self._get("query", query=expr, time=self.now)
        rows = found["result"] if found["resultType"] == "vector" else [{"metric": {}, "value": found["result"]}]
        return [(_name(legend, one["metric"]), float(one["value"][1])) for one in rows]

    def alerts(self) -> list[str]:
        """Names of alerts that are pending or fire, as the board lists them."""
        told = [one for one in self._get("alerts")["alerts"] if one["labels"].get("severity") != "heartbeat"]
        return sorted({f"{one['labels']['alertname']} ({one['state']})" for one in told})


def _name(legend: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), legend) or labels.get("__name__", "")


def shown(value: float, unit: str) -> str:
    """A value with its unit, short."""
    if not math.isfinite(value):
        return "–"
    if unit == "percentunit":
        return f"{value:.1%}" if abs(value) < 0.1 else f"{value:.0%}"
    if unit == "s":
        for size, name in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")):
            if abs(value) >= size:
                return f"{value / size:.3g} {name}"
        return f"{value * 1e6:.3g} µs" if value else "0 s"
    suffix = {"bytes": "B", "Bps": "B/s", "reqps": "/s", "ops": "/s", "watt": "W", "celsius": "°C", "hertz": "Hz"}
    suffix |= {"joule": "J", "kwatth": "kWh"}
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{suffix.get(unit, '')}"
    return f"{value:.3g} {suffix.get(unit, '')}".strip()


def colour_of(panel: Panel, value: float) -> str:
    """The colour of a value by the panel's words or thresholds."""
    if (word := panel.words.get(f"{value:g}")) is not None:
        return NAMED.get(word[1], word[1])
    colour = NAMED["blue"]
    for bound, name in panel.steps:
        if bound is None or value >= bound:
            colour = NAMED.get(name, name)
    return colour


def draw(board: Board, source: Source, path: Path) -> None:
    """One board as one PNG."""
    layout = board.json()["panels"]
    bottom = max(one["gridPos"]["y"] + one["gridPos"]["h"] for one in layout)
    width, unit = 19.2, 0.36
    figure = plt.figure(figsize=(width, bottom * unit + 0.7), facecolor=PAPER)
    height = figure.get_figheight()
    figure.text(0.01, 1 - 0.38 / height, board.title, color=INK, fontsize=18, weight="bold", va="center")
    figure.text(0.99, 1 - 0.38 / height, board.why, color="#9fa7b3", fontsize=11, va="center", ha="right")
    panels = iter(board.panels())
    for place in layout:
        grid = place["gridPos"]
        x, w = grid["x"] / 24, grid["w"] / 24
        y = (bottom - grid["y"] - grid["h"]) * unit / height
        if place["type"] == "row":
            figure.text(0.01, y + 0.4 * unit / height, place["title"], color=INK, fontsize=12, weight="bold")
            continue
        h = grid["h"] * unit / height
        card = figure.add_axes((x + 0.003, y + 0.06 / height, w - 0.006, h - 0.12 / height), facecolor=CARD)
        card.set(xticks=[], yticks=[])
        for spine in card.spines.values():
            spine.set_color(GRID)
        panel = next(panels)
        title = panel.title if len(panel.title) < w * 130 else panel.title[: int(w * 130)] + "…"
        card.annotate(
            title, (0, 1), xytext=(8, -8), xycoords="axes fraction", textcoords="offset points", color=INK,
            fontsize=10.5, weight="bold", va="top",
        )  # fmt: skip
        inner = (x + 0.003 + 0.6 / width, y + 0.62 / height, w - 0.006 - 0.75 / width, h - 1.08 / height)
        try:
            _panel(figure, card, inner, panel, source)
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{board.title}: {panel.title}: {error}") from None
    figure.savefig(path, dpi=75, facecolor=PAPER)
    plt.close(figure)


def _note(card: Any, text: str) -> None:
    card.text(0.5, 0.45, text, color="#7b8087", fontsize=10, ha="center", va="center", transform=card.transAxes)


def _panel(figure: Any, card: Any, inner: tuple[float, float, float, float], panel: Panel, source: Source) -> None:
    window = f"{max(10, round(source.span / 10))}s"
    if panel.kind == "alertlist":
        card.text(
            0.04, 0.8, "\n".join(source.alerts()) or "none", color=INK, fontsize=11, va="top", transform=card.transAxes
        )
        return
    if panel.queries[0].source == "loki":
        _note(card, "asks Loki")
        return
    exprs = [(filled(query.expr, window), query.legend) for query in panel.queries]
    if panel.kind in ("stat", "bargauge"):
        values = [one for expr, legend in exprs for one in source.at_once(expr, legend)]
        values = [one for one in values if math.isfinite(one[1])]
        (_numbers if panel.kind == "stat" else _bars)(figure, card, inner, panel, values)
    elif panel.kind == "table":
        rows = [name for expr, _ in exprs for name, _ in source.at_once(expr, "{{gpu}}  {{name}}  {{uuid}}")]
        card.text(0.02, 0.72, "\n".join(rows), color=INK, fontsize=10, va="top", transform=card.transAxes)
    else:
        series = [one for expr, legend in exprs for one in source.over(expr, legend)]
        series = [one for one in series if any(math.isfinite(value) for value in one[2])]
        if not series:
            _note(card, "no data")
        elif panel.kind == "state-timeline":
            _states(figure, inner, panel, series, source)
        elif panel.kind == "heatmap":
            _heat(figure, inner, panel, series)
        else:
            _lines(figure, inner, panel, series, source)


def _axes(figure: Any, inner: tuple[float, float, float, float], source: Source | None = None) -> Any:
    axes = figure.add_axes(inner, facecolor="none")
    axes.tick_params(colors="#9fa7b3", labelsize=8, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.xaxis.set_major_formatter(lambda value, _: "now" if abs(value) < 1 else f"{value:.0f} s")
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
    if source is not None:
        axes.set_xlim(-source.span, 0)
    return axes


def _lines(figure: Any, inner: Any, panel: Panel, series: Series, source: Source) -> None:
    axes = _axes(figure, inner, source)
    axes.grid(color=GRID, linewidth=0.6)
    axes.yaxis.set_major_formatter(lambda value, _: shown(value, panel.unit))
    axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(5))
    floor: dict[float, float] = {}
    for number, (name, times, values) in enumerate(series[:14]):
        colour = MEANING.get(name, COLOURS[number % len(COLOURS)])
        colour = NAMED.get(colour, colour)
        if panel.stacked:
            low = [floor.get(round(at), 0.0) for at in times]
            high = [a + (b if math.isfinite(b) else 0) for a, b in zip(low, values, strict=True)]
            floor |= {round(at): value for at, value in zip(times, high, strict=True)}
            axes.fill_between(times, low, high, color=colour, alpha=0.35, linewidth=0)
            values = high
        axes.plot(times, values, color=colour, linewidth=1.4, label=name or "value")
    if panel.minimum is not None:
        axes.set_ylim(bottom=panel.minimum)
    top = axes.get_ylim()[1] * 1.08
    axes.set_ylim(top=top)
    if panel.maximum is not None and top > panel.maximum * 0.5:
        axes.set_ylim(top=panel.maximum)
    for bound, name in panel.steps:
        if bound is not None and bound <= axes.get_ylim()[1]:
            axes.axhline(bound, color=NAMED.get(name, name), linewidth=1, linestyle="--")
    if axes.get_ylim()[0] == 0 and max((v for _, _, vs in series for v in vs if math.isfinite(v)), default=0) <= 0:
        axes.set_ylim(0, 1)
    columns = min(len(series), 4 if panel.width >= 8 else 2)
    axes.legend(
        loc="upper left", bbox_to_anchor=(-0.04, -0.12), ncols=columns, fontsize=7.5, frameon=False, labelcolor=INK,
        columnspacing=1.0, handlelength=1.0, borderaxespad=0,
    )  # fmt: skip


def _states(figure: Any, inner: Any, panel: Panel, series: Series, source: Source) -> None:
    left, bottom, width, height = inner
    axes = _axes(figure, (left + 0.03, bottom, width - 0.03, height), source)
    axes.set_yticks(range(len(series)), [name for name, _, _ in series])
    axes.set_ylim(-0.6, len(series) - 0.4)
    for row, (_, times, values) in enumerate(series):
        step = (times[1] - times[0]) if len(times) > 1 else source.span / 100
        for at, value in zip(times, values, strict=True):
            axes.broken_barh([(at, step)], (row - 0.4, 0.8), color=colour_of(panel, value))


def _heat(figure: Any, inner: Any, panel: Panel, series: Series) -> None:
    axes = _axes(figure, inner)
    ordered = sorted(series, key=lambda one: float(one[0].replace("+Inf", "inf")))
    times = sorted({at for _, moments, _ in ordered for at in moments})
    rows, below = [], [0.0] * len(times)
    for _, moments, values in ordered:
        known = dict(zip(moments, values, strict=True))
        now = [known.get(at, 0.0) if math.isfinite(known.get(at, 0.0)) else 0.0 for at in times]
        rows.append([max(0.0, a - b) for a, b in zip(now, below, strict=True)])
        below = now
    axes.pcolormesh(times, range(len(rows)), rows, cmap="inferno", shading="nearest")
    names = [shown(float(name.replace("+Inf", "inf")), panel.unit).replace("–", "∞") for name, _, _ in ordered]
    every = max(1, len(names) // 6)
    axes.set_yticks(range(0, len(names), every), names[::every])


def _numbers(figure: Any, card: Any, inner: Any, panel: Panel, values: list[tuple[str, float]]) -> None:
    if not values:
        _note(card, "no data")
        return
    if panel.steps or panel.words:
        card.set_facecolor(colour_of(panel, values[-1][1]))
    for number, (name, value) in enumerate(values[:8]):
        word = panel.words.get(f"{value:g}")
        text = word[0] if word else shown(value, panel.unit)
        if panel.options.get("textMode") == "name":
            text, name = name, ""
        x = (number + 0.5) / len(values[:8])
        size = 20 if len(values) < 3 else 15
        card.text(x, 0.42, text, color="white", fontsize=size, ha="center", va="center", transform=card.transAxes)
        if len(values) > 1:
            card.text(x, 0.12, name, color="white", fontsize=9, ha="center", transform=card.transAxes)


def _bars(figure: Any, card: Any, inner: Any, panel: Panel, values: list[tuple[str, float]]) -> None:
    if not values:
        _note(card, "no data")
        return
    left, bottom, width, height = inner
    axes = _axes(figure, (left + 0.02, bottom - 0.01, width - 0.03, height))
    axes.barh([name for name, _ in values], [value for _, value in values], color=COLOURS[2], height=0.6)
    axes.set_xticks([])
    for row, (_, value) in enumerate(values):
        axes.text(value, row, " " + shown(value, panel.unit), color=INK, fontsize=9, va="center")


def main() -> None:
    """Draw all boards."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prometheus", required=True, metavar="URL")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--seconds", type=float, default=120, help="how far back the graphs reach")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    mpl.use("Agg")
    source = Source(arguments.prometheus.rstrip("/"), arguments.seconds)
    for board in BOARDS:
        draw(board, source, arguments.out / f"{board.uid}.png")


if __name__ == "__main__":
    main()

"""The HTML report of a run, and how it compares with earlier ones."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path
from typing import Any

from measure import QUANTILES, Result, quantile, rate, running
from plots import Plot, number, top

STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.tiles, .plots { display: grid; gap: 1rem; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.plots { grid-template-columns: repeat(auto-fit, minmax(430px, 1fr)); }
.tile { border: 1px solid #8885; border-radius: 8px; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.5rem; } .bad b { color: #dc2626; }
figure { margin: 0; } figcaption { font-weight: 600; }
svg { width: 100%; font-size: 11px; } svg text { fill: currentColor; }
table { border-collapse: collapse; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #8883; }
th:first-child, td:first-child { text-align: left; } .muted { opacity: .7; }
"""
ROWS = (("Time to first token", "first_token"), ("Time between tokens", "inter_token"), ("Whole call", "duration"))
COMPARED = (
    ("Calls/s", "calls_per_second"),
    ("Goodput/s", "goodput_calls_per_second"),
    ("Tokens/s", "completion_tokens_per_second"),
    ("First token p50", "first_token_p50_seconds"),
    ("First token p95", "first_token_p95_seconds"),
    ("Between tokens p95", "inter_token_p95_seconds"),
    ("Errors", "errors"),
)


def comparable(history: Path, run: dict[str, Any]) -> list[dict[str, Any]]:
    """Earlier runs of the same kind against the same model, oldest first."""
    if not history.exists():
        return []
    runs = [json.loads(line) for line in history.read_text().splitlines() if line.strip()]
    return [earlier for earlier in runs if earlier["kind"] == run["kind"] and earlier["when"] != run["when"]]


def milliseconds(value: float) -> str:
    """Seconds as milliseconds, or a dash."""
    return "–" if not math.isfinite(value) else f"{number(value * 1000)} ms"


def page(run: dict[str, Any], result: Result, earlier: list[dict[str, Any]]) -> str:
    """The report as HTML; it loads nothing."""
    summary, kind = result.summary, run["kind"]
    load = f"{kind['concurrency']} callers" if kind["rate"] is None else f"{kind['rate']:g} calls a second"
    tiles = [
        ("Calls", f"{summary['calls']:,}", False),
        ("Errors", f"{summary['errors']:,}", summary["errors"] > 0),
        ("Calls a second", number(summary["calls_per_second"]), False),
        ("Tokens a second", number(summary["completion_tokens_per_second"]), False),
        ("Goodput", f"{summary['goodput_share']:.1%}", summary["goodput_share"] < 0.95),
        ("First token, p95", milliseconds(summary["first_token_p95_seconds"]), False),
    ]
    first, then = (milliseconds(result.levels[name]) for name in ("first_token", "inter_token"))
    about = (
        f"<p>{html.escape(kind['model'])} at {html.escape(run['url'])}, {load} for {summary['seconds']:.0f} s "
        f"({'closed' if kind['rate'] is None else 'open'} loop), at most {kind['max_tokens']} tokens an answer.<br>"
        f"Goodput counts calls within the service level: first token within {first}, then {then} a token.</p>"
    )
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>Load test {html.escape(run['when'])}</title><style>{STYLE}</style>",
        f"<h1>Load test, {html.escape(run['when'])}</h1>",
        about,
        "<div class=tiles>",
        *(f"<div class='tile{' bad' if bad else ''}'>{name}<b>{value}</b></div>" for name, value, bad in tiles),
        "</div><h2>Times</h2><table><tr><th></th>",
        *(f"<th>p{percent}</th>" for percent in QUANTILES),
        "</tr>",
    ]
    for name, key in ROWS:
        cells = "".join(f"<td>{milliseconds(summary[f'{key}_p{percent}_seconds'])}</td>" for percent in QUANTILES)
        parts.append(f"<tr><td>{name}</td>{cells}</tr>")
    parts.append("</table>")
    if summary["error_kinds"]:
        rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{v:,}</td></tr>" for k, v in summary["error_kinds"].items())
        parts.append(f"<h2>Errors</h2><table><tr><th>kind</th><th>calls</th></tr>{rows}</table>")
    parts.append(f"<h2>Plots</h2><div class=plots>{''.join(_plots(result))}</div>")
    parts.append(_history(run, earlier))
    return "".join(parts) + "</html>\n"


def _plots(result: Result) -> list[str]:
    samples, seconds = result.samples, result.seconds
    first = [(s.start, s.first_token) for s in samples if s.first_token is not None and not s.error]
    bad = [(s.start, 0.0) for s in samples if s.error]
    gaps = [(s.start, s.inter_token) for s in samples if s.inter_token is not None and not s.error]
    tokens, busy = rate(samples, seconds), running(samples, seconds)
    ladder = [number / 2 for number in range(1, 200)]
    spread = {
        name: [(percent, quantile([y for _, y in points], percent)) for percent in ladder] if points else []
        for name, points in (("first token", first), ("between tokens", gaps))
    }
    times = Plot("Time to first token, call by call", "seconds into the run", "seconds", seconds, top(first))
    times.dots(first).level(result.levels["first_token"], "service level")
    if bad:
        times.dots(bad, "error", bad=True)
    between = Plot("Time between tokens, call by call", "seconds into the run", "seconds", seconds, top(gaps))
    between.dots(gaps).level(result.levels["inter_token"], "service level")
    shares = Plot("How many calls were how fast", "percent of calls", "seconds", 100, top(*spread.values()))
    for name, points in spread.items():
        shares.line(points, name)
    flow = Plot("Tokens a second", "seconds into the run", "tokens a second", seconds, top(tokens)).line(tokens)
    flight = Plot("Calls in flight", "seconds into the run", "calls", seconds, top(busy)).line(busy)
    return [plot.svg for plot in (times, between, shares, flow, flight)]


def _history(run: dict[str, Any], earlier: list[dict[str, Any]]) -> str:
    if not earlier:
        return "<h2>Earlier runs</h2><p class=muted>None of this kind yet; the next one is compared with this.</p>"
    head = "".join(f"<th>{name}</th>" for name, _ in COMPARED)
    rows = []
    for one in [*earlier[-9:], run]:
        cells = []
        for _, key in COMPARED:
            value = one["summary"][key]
            text = milliseconds(value) if key.endswith("_seconds") else number(value)
            before = earlier[-1]["summary"][key]
            change = f" ({value / before - 1:+.0%})" if one is run and before and math.isfinite(value / before) else ""
            cells.append(f"<td>{text}{change}</td>")
        name = "<b>this one</b>" if one is run else html.escape(one["when"])
        rows.append(f"<tr><td>{name}</td>{''.join(cells)}</tr>")
    return (
        "<h2>Earlier runs</h2><p class=muted>Same model, load, prompts and length of answers; the change is "
        f"against the one before.</p><table><tr><th>when</th>{head}</tr>{''.join(rows)}</table>"
    )


def lines(summary: dict[str, Any]) -> list[str]:
    """The result for the terminal."""
    table = [f"{'':22}" + "".join(f"{f'p{percent}':>12}" for percent in QUANTILES)]
    for name, key in ROWS:
        cells = [milliseconds(summary[f"{key}_p{percent}_seconds"]) for percent in QUANTILES]
        table.append(f"{name:22}" + "".join(f"{cell:>12}" for cell in cells))
    head = (
        f"{summary['calls']:,} calls, {summary['errors']:,} errors in {summary['seconds']:.1f} s: "
        f"{number(summary['calls_per_second'])} calls/s, {number(summary['completion_tokens_per_second'])} tokens/s, "
        f"goodput {summary['goodput_share']:.1%} ({number(summary['goodput_calls_per_second'])}/s)"
    )
    return [
        head,
        *table,
        *(f"  {count:,} × {kind}" for kind, count in summary["error_kinds"].items()),
    ]

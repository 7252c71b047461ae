"""From rounds to medians, ratios, tables and plots."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench import engine, machine
from tests.bench.gateways import ALL
from tests.bench.load import IDLE_STREAMS

Round = dict[str, Any]
TEMPLATE = Path(__file__).parent / "benchmarks.template.md"
QUIET = 0.35  # cores that other programs may use in a measurement before it is left out


def line(number: int, name: str, taken: Round) -> str:
    """One line of progress."""
    calls = "  ".join(
        f"c{count} {found['calls_s']:,.0f}/s {found['cpu_us']:.0f}µs" for count, found in taken["calls"].items()
    )
    paced = taken["streams"]["paced"]
    return (
        f"round {number + 1} {name:12} {calls}  paced {paced['cpu_percent']:.0f}% ttft {paced['ttft_p50_ms']:.2f}/"
        f"{paced['ttft_p99_ms']:.2f} ms wrong {paced['wrong']} broken {paced['broken']} others {paced['others']:.2f}"
    )


def values(result: Round, name: str, get: Callable[[Round], Round], field: str) -> list[float]:
    """`field` of one measurement over all rounds; disturbed ones are left out unless all are."""
    found = [get(taken[name]) for taken in result["rounds"] if name in taken]
    calm = [one for one in found if one["others"] <= QUIET]
    return [one[field] for one in (calm or found)]


def median(numbers: list[float]) -> float:
    """The median, or NaN of nothing."""
    return statistics.median(numbers) if numbers else float("nan")


def spread(numbers: list[float], form: str = ",.0f") -> str:
    """The median and in brackets the range."""
    if not numbers or any(math.isnan(number) for number in numbers):
        return "–"
    if len(numbers) == 1:
        return format(numbers[0], form)
    return f"{format(median(numbers), form)} ({format(min(numbers), form)}–{format(max(numbers), form)})"


def calls_of(count: int) -> Callable[[Round], Round]:
    """The measurement of JSON calls with `count` connections."""
    return lambda taken: taken["calls"][str(count)]


def paced(taken: Round) -> Round:
    """The measurement of paced streams."""
    return taken["streams"]["paced"]


def ratio(result: Round, one: str, other: str, get: Callable[[Round], Round], field: str) -> list[float]:
    """`one` over `other`, pair by pair of the same round."""
    return [
        get(taken[one])[field] / get(taken[other])[field]
        for taken in result["rounds"]
        if one in taken and other in taken and get(taken[other])[field]
    ]


def names(result: Round) -> list[str]:
    """Who was measured, in the order of the table."""
    return [name for name in ALL if result["rounds"] and name in result["rounds"][0]]


def some_count(result: Round) -> int:
    """The connections at which CPU for a call is told: 64 where it was measured."""
    return 64 if 64 in counts(result) else counts(result)[-1]


def counts(result: Round) -> list[int]:
    """With how many connections JSON calls were measured."""
    return [int(count) for count in next(iter(result["rounds"][0].values()))["calls"]]


def table(result: Round) -> str:
    """The main table as Markdown."""
    wanted = counts(result)
    head = ["gateway", *(f"JSON calls/s, {count}" for count in wanted), f"CPU µs a call at {some_count(result)}",
            f"p99 ms at {16 if 16 in wanted else wanted[0]}", "256 streams: CPU", "added first byte p50 / p99 ms",
            "added gap p99 ms", "CPU µs an event", "wrong + broken", "start s", "MB at rest / after",
            f"kB a silent stream (of {IDLE_STREAMS:,})"]  # fmt: skip
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    direct = {
        field: median(values(result, "direct", paced, field)) for field in ("ttft_p50_ms", "ttft_p99_ms", "gap_p99_ms")
    }
    at = 16 if 16 in wanted else wanted[0]
    for name in names(result):
        idle = result["idle"].get(name, {})
        start = result["start"][name]
        bad = sum(
            stream["wrong"] + stream["broken"]
            for taken in result["rounds"]
            if name in taken
            for stream in taken[name]["streams"].values()
        )
        added = [
            median(values(result, name, paced, field)) - direct[field]
            for field in ("ttft_p50_ms", "ttft_p99_ms", "gap_p99_ms")
        ]
        cells = [
            ALL[name].label,
            *(spread(values(result, name, calls_of(count), "calls_s")) for count in wanted),
            spread(values(result, name, calls_of(some_count(result)), "cpu_us")),
            f"{median(values(result, name, calls_of(at), 'p99_ms')):.2f}",
            f"{median(values(result, name, paced, 'cpu_percent')):.0f} %",
            f"{added[0]:.2f} / {added[1]:.2f}",
            f"{added[2]:.2f}",
            spread([median(values(result, name, paced, "cpu_us_event"))], ".1f"),
            f"{bad:,}",
            f"{start['start_seconds']:.1f}",
            f"{start['rest_mb']:.0f} / {median([taken[name]['rss_mb'] for taken in result['rounds'] if name in taken]):.0f}",
            f"{idle['kb']:.0f}" if "kb" in idle else "failed" if idle else "–",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def ratios(result: Round) -> str:
    """Ours over each other: calls a second, and calls for a CPU second (which other load does not disturb)."""
    rows = [
        "| ours against | calls/s at 16 | calls/s at 64 | calls per CPU second at 64 | CPU an event |",
        "|---|---|---|---|---|",
    ]
    for name in names(result):
        if name == "ours" or "ours" not in names(result):
            continue
        cells = [
            spread(ratio(result, "ours", name, calls_of(count), field), ".2f") if count in counts(result) else "–"
            for count, field in ((16, "calls_s"), (64, "calls_s"), (64, "calls_per_cpu_s"))
        ]
        cells.append(spread(ratio(result, "ours", name, paced, "cpu_us_event"), ".2f"))
        rows.append(f"| {ALL[name].label} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def verdicts(result: Round) -> str:
    """What is aimed at, what this run found, and whether that is enough, as Markdown."""
    rows = ["| aimed at | this run | met |", "|---|---|---|"]

    def row(aim: str, found: float, form: str, met: bool) -> None:
        rows.append(f"| {aim} | {format(found, form)} | {'yes' if met else '**no**'} |")

    def over(other: str, count: int, field: str) -> float:
        measured = "ours" in names(result) and other in names(result) and count in counts(result)
        return median(ratio(result, "ours", other, calls_of(count), field)) if measured else float("nan")

    for other, least in (("smg", 1.2), ("vllm-router", 0.55), ("litellm", 80), ("plain", 8)):
        found = over(other, 64, "calls_per_cpu_s")
        row(
            f"calls for a CPU second at 64 connections, against {other}: at least {least:g} ×",
            found,
            ".2f",
            found >= least,
        )
    found = over("smg", 16, "calls_s")
    row("calls/s at 16 connections, against smg: at least 0.9 ×", found, ".2f", found >= 0.9)
    if "ours" not in names(result):
        return "\n".join(rows)
    if 16 in counts(result):
        found = median(values(result, "ours", calls_of(16), "p99_ms"))
        row("p99 at 16 connections: at most 5 ms", found, ".1f", found <= 5)
    found = median(values(result, "ours", paced, "cpu_percent"))
    row("256 streams at 50 events/s: under 55 % of a core", found, ".0f", found < 55)
    for field, most in (("ttft_p50_ms", 1), ("ttft_p99_ms", 4)):
        found = median(values(result, "ours", paced, field)) - median(values(result, "direct", paced, field))
        row(f"added {field[5:8]} of the first byte: at most {most} ms", found, ".2f", found <= most)
    broken = sum(
        stream["wrong"] + stream["broken"]
        for taken in result["rounds"]
        for stream in taken.get("ours", {"streams": {}})["streams"].values()
    )
    row("bytes lost or changed: none", broken, ".0f", not broken)
    found = result["idle"].get("ours", {}).get("kb", float("nan"))
    row(f"{IDLE_STREAMS:,} silent streams: under 30 kB each", found, ".0f", found < 30)
    return "\n".join(rows)


def edge(result: Round) -> str:
    """This gateway behind nginx and TLS, as Markdown."""
    if not result.get("edge"):
        return "Not measured in this run."
    rows = ["| connections | calls/s | p50 / p99 ms | CPU µs a call: gateway | nginx |", "|---|---|---|---|---|"]
    for count in counts(result):
        taken = [one[str(count)] for one in result["edge"]]
        calm = [one for one in taken if one["others"] <= QUIET] or taken

        def of(field: str, calm: list[Round] = calm) -> list[float]:
            return [one[field] for one in calm]

        rows.append(
            f"| {count} | {spread(of('calls_s'))} | {median(of('p50_ms')):.2f} / {median(of('p99_ms')):.2f} "
            f"| {spread(of('gateway_us'))} | {spread(of('cpu_us'))} |"
        )
    return "\n".join(rows)


def at_the_engine() -> str:
    """What `tests.bench.engine` found last, as Markdown."""
    path = machine.STATE / "engine.json"
    if not path.exists():
        return "none."
    result = json.loads(path.read_text())
    told = result["machine"]
    load = " ".join(f"{name} {value}" for name, value in result["load"].items())
    return f"{told['time']}, load average {told['load_average']} at the start; {load}.\n\n{engine.table(result)}"


def bars(title: str, unit: str, numbers: list[tuple[str, float]]) -> str:
    """A bar chart as SVG."""
    width, row = 760, 26
    top = max((number for _, number in numbers if not math.isnan(number)), default=1.0) or 1.0
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{50 + row * len(numbers)}" '
            'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="white"/>'
            f'<text x="10" y="24" font-size="16">{title}</text>'
        )
    ]
    for index, (label, number) in enumerate(numbers):
        y = 40 + index * row
        length = 1.0 if math.isnan(number) else max(1.0, number / top * 380)
        colour = "#c4472d" if "this gateway" in label else "#7a8da6"
        parts.append(
            f'<text x="10" y="{y + 15}">{label}</text><rect x="270" y="{y + 2}" width="{length:.0f}" height="17" '
            f'fill="{colour}"/><text x="{276 + length:.0f}" y="{y + 15}">{number:,.3g} {unit}</text>'
        )
    return "".join(parts) + "</svg>\n"


def growth(result: Round) -> str:
    """Calls a second over connections, as SVG."""
    wanted = counts(result)
    lines = [(name, [median(values(result, name, calls_of(c), "calls_s")) for c in wanted]) for name in names(result)]
    top = max((max(points) for _, points in lines), default=1.0)
    x = [80 + index * 480 / max(1, len(wanted) - 1) for index in range(len(wanted))]
    colours = ["#5b8c5a", "#7a8da6", "#b08d57", "#c4472d", "#d98f7a", "#6d597a", "#222222"]
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" width="860" height="380" font-family="sans-serif" font-size="13">',
             ('<rect width="100%" height="100%" fill="white"/><text x="10" y="24" font-size="16">JSON calls a second by '
             'connections (both axes logarithmic)</text>')]  # fmt: skip
    low = 10.0

    def y(number: float) -> float:
        return 330 - 280 * (math.log10(max(number, low)) - 1) / (math.log10(top) - 1)

    for power in (10, 100, 1000, 10_000):
        height = y(power)
        parts += [
            f'<line x1="80" x2="560" y1="{height:.0f}" y2="{height:.0f}" stroke="#ddd"/>',
            f'<text x="30" y="{height + 4:.0f}">{power:,}</text>',
        ]
    for count, at in zip(wanted, x, strict=True):
        parts.append(f'<text x="{at - 8:.0f}" y="352">{count}</text>')
    for index, (name, points) in enumerate(lines):
        colour = colours[index % len(colours)]
        path = " ".join(f"{at:.0f},{y(point):.0f}" for at, point in zip(x, points, strict=True))
        label = ALL[name].label.replace("*", "").replace("`", "")
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
            f'<text x="570" y="{60 + index * 20}" fill="{colour}">{label[:44]}</text>'
        )
    return "".join(parts) + "</svg>\n"


def write(result: Round, docs: Path) -> None:
    """docs/benchmarks.md from its template, and its plots."""
    plots = docs / "benchmarks"
    plots.mkdir(parents=True, exist_ok=True)
    label = {name: ALL[name].label.replace("*", "").replace("`", "") for name in names(result)}
    per_call = [(label[n], median(values(result, n, calls_of(some_count(result)), "cpu_us"))) for n in names(result)]
    per_event = [(label[n], median(values(result, n, paced, "cpu_us_event"))) for n in names(result)]
    (plots / "cpu-per-call.svg").write_text(bars("CPU a JSON call", "µs", per_call))
    (plots / "cpu-per-event.svg").write_text(bars("CPU a streamed event, 256 streams at 50 a second", "µs", per_event))
    (plots / "growth.svg").write_text(growth(result))
    told = result["machine"]
    others = [
        one["others"] for taken in result["rounds"] for one in [m for t in taken.values() for m in t["calls"].values()]
    ]
    text = TEMPLATE.read_text()
    for mark, value in {
        "TABLE": table(result),
        "RATIOS": ratios(result),
        "MACHINE": f"{told['cpu']}, {told['cores']} cores, Linux {told['kernel']}, Python {told['python']}, "
        f"a disk that keeps 12 kB in {told['sync_ms'][0]} ms (99 % within {told['sync_ms'][1]} ms), {told['time']}",
        "ROUNDS": str(len(result["rounds"])),
        "OTHERS": f"{median(others):.2f} (up to {max(others):.2f})",
        "LEFT_OUT": "; ".join(f"{name}: {why}" for name, why in result["left_out"].items()) or "nothing",
        "QUIET": f"{QUIET:g}",
        "IDLE": f"{IDLE_STREAMS:,}",
        "EDGE": edge(result),
        "VERDICTS": verdicts(result),
        "ENGINE": at_the_engine(),
    }.items():
        text = text.replace("{{" + mark + "}}", value)
    (docs / "benchmarks.md").write_text(text)

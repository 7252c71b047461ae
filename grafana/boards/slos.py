"""What callers were promised, how much of the month's budget of failures is left, how fast it goes."""

from grafana.panels import GREEN, RED, YELLOW, Board, Query, lines, stat

FAST, MEDIUM, SLOW = 14.4, 6, 1


def left(bad: str, all_: str, budget: float) -> str:
    """Share of the 30-day budget that is left; all of it where there was no traffic."""
    spent = f"(avg_over_time({bad}:rate5m[30d]) / (avg_over_time({all_}:rate5m[30d]) > 0)) / {budget}"
    return f"(1 - {spent}) or vector(1)"


def burn(ratio: str, budget: float) -> tuple[Query, ...]:
    """Burn rates: 1 uses the budget up in exactly 30 days."""
    return tuple(Query(f"{ratio}:ratio_rate{window} / {budget}", window) for window in ("5m", "1h", "6h", "3d"))


BURN_STEPS = ((None, GREEN), (SLOW, YELLOW), (FAST, RED))
LEFT_STEPS = ((None, RED), (0, YELLOW), (0.25, GREEN))

BOARD = Board(
    uid="slos",
    title="SLOs",
    why="Availability 99.9 % and first token within 2.5 s for 95 %, over 30 days; burn rates as the alerts see them.",
    range="now-24h",
    refresh="1m",
    rows=(
        (
            "Availability: 99.9 % of calls are not failed by the service",
            (
                stat(
                    "Budget left",
                    "Of the failures that 30 days allow. Below zero: the promise is broken.",
                    left("gateway:bad_calls", "gateway:calls", 0.001),
                    unit="percentunit",
                    minimum=None,
                    steps=LEFT_STEPS,
                    decimals=1,
                    height=8,
                ),
                lines(
                    "Failed calls",
                    "Share of calls that failed.",
                    *(Query(f"gateway:bad_per_calls:ratio_rate{w}", w) for w in ("5m", "1h", "6h", "3d")),
                    unit="percentunit",
                    width=10,
                    steps=((None, GREEN), (0.001, RED)),
                ),
                lines(
                    "Burn rate",
                    "How many times too fast the budget goes. 14.4 for an hour or 6 for six hours pages, 1 tickets.",
                    *burn("gateway:bad_per_calls", 0.001),
                    width=10,
                    steps=BURN_STEPS,
                ),
            ),
        ),
        (
            "Latency: 95 % of streams get their first token within 2.5 s",
            (
                stat(
                    "Budget left",
                    "Of the late streams that 30 days allow.",
                    left("gateway:late_streams", "gateway:streams", 0.05),
                    unit="percentunit",
                    minimum=None,
                    steps=LEFT_STEPS,
                    decimals=1,
                    height=8,
                ),
                lines(
                    "Late streams",
                    "Share of streams whose first token came after 2.5 s.",
                    *(Query(f"gateway:late_per_streams:ratio_rate{w}", w) for w in ("5m", "1h", "6h", "3d")),
                    unit="percentunit",
                    width=10,
                    steps=((None, GREEN), (0.05, RED)),
                ),
                lines(
                    "Burn rate",
                    "How many times too fast the budget goes.",
                    *burn("gateway:late_per_streams", 0.05),
                    width=10,
                    steps=BURN_STEPS,
                ),
            ),
        ),
        (
            "What it is made of",
            (
                lines(
                    "Calls that count",
                    "Calls a second, and those that the service failed.",
                    Query("gateway:calls:rate5m", "calls"),
                    Query("gateway:bad_calls:rate5m", "failed"),
                    unit="reqps",
                    width=12,
                ),
                lines(
                    "Streams that count",
                    "Streams a second, and those that were late.",
                    Query("gateway:streams:rate5m", "streams"),
                    Query("gateway:late_streams:rate5m", "late"),
                    unit="reqps",
                    width=12,
                ),
            ),
        ),
    ),
)

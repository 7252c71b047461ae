"""Who uses how much, who is refused, and whether the books agree with the engine."""

from grafana.panels import GREEN, RED, Board, Panel, Query, Variable, lines, logs, stat

CLOSED = '{service="gateway"} |= `call_closed` | json'
KEY = "key_id=~`$key.*`"


def per_key(what: str, window: str) -> str:
    """Sum of a field of `call_closed` by key; per-key numbers are never labels of Prometheus."""
    return f"sum by (key_id) (sum_over_time({CLOSED} | {KEY} | unwrap {what} [{window}]))"


BOARD = Board(
    uid="keys",
    title="Keys and usage",
    why="Who uses how much and who is refused (from the log), and whether the ledger agrees with the engine.",
    range="now-24h",
    refresh="1m",
    variables=(Variable("key", "Key id begins with"),),
    rows=(
        (
            "The books",
            (
                stat(
                    "Ledger drift",
                    "Tokens that the engines counted and the ledger does not know. It should stay near zero.",
                    "gateway_ledger_drift_tokens",
                    minimum=None,
                    steps=((None, RED), (-1000, GREEN), (1000, RED)),
                    decimals=0,
                ),
                stat(
                    "Spool",
                    "Usage records that wait for the database. Any: nothing new is admitted.",
                    "gateway_ledger_spool_records",
                    steps=((None, GREEN), (1, RED)),
                    decimals=0,
                ),
                stat(
                    "Prompt tokens",
                    "Of the time range.",
                    'sum(increase(gateway_tokens_total{direction="prompt"}[$__range]))',
                    decimals=1,
                ),
                stat(
                    "Completion tokens",
                    "Of the time range.",
                    'sum(increase(gateway_tokens_total{direction="completion"}[$__range]))',
                    decimals=1,
                ),
                stat(
                    "Calls",
                    "Of the time range, all outcomes.",
                    "sum(increase(gateway_requests_total[$__range]))",
                    decimals=1,
                ),
                stat(
                    "Lost calls",
                    "Calls that ended with a dead gateway, settled from their holds at its last start.",
                    'sum(gateway_requests_total{outcome="lost"}) or vector(0)',
                    steps=((None, GREEN), (1, RED)),
                    decimals=0,
                ),
                lines(
                    "Holds and calls",
                    "Holds on quotas follow the calls in flight. More holds than calls for long: they leak.",
                    Query("gateway_holds", "holds"),
                    Query("sum(gateway_in_flight_calls)", "calls in flight"),
                ),
                lines(
                    "Drift and spool over time",
                    "A slope: somebody calls the engine past the gateway. A jump: the engine was restarted in calls.",
                    Query("gateway_ledger_drift_tokens", "drift, tokens"),
                    Query("gateway_ledger_spool_records", "spool, records"),
                    Query("rate(engine_own_tokens_total[$__rate_interval])", "the engine's own tokens a second"),
                    minimum=None,
                ),
                lines(
                    "Refusals by limit",
                    "Calls a second that a limit or a key stopped.",
                    Query(
                        "sum by (code) (rate(gateway_refusals_total{code=~"
                        '"rate_limit_exceeded|concurrency_exceeded|quota_exhausted|.*key.*|model_not_allowed"}'
                        "[$__rate_interval]))",
                        "{{code}}",
                    ),
                    unit="reqps",
                    stacked=True,
                ),
                Panel(
                    "Ledger",
                    "Whether usage can be recorded. While it cannot, no call is admitted.",
                    (Query("gateway_ledger_up", "ledger"),),
                    kind="state-timeline",
                    width=24,
                    height=4,
                    words={"1": ("written", GREEN), "0": ("refused", RED)},
                ),
            ),
        ),
        (
            "By key",
            (
                Panel(
                    "Completion tokens by key",
                    "Written tokens of the time range, ten largest.",
                    (logs(f"topk(10, {per_key('completion_tokens', '$__range')})", "{{key_id}}", instant=True),),
                    kind="bargauge",
                ),
                Panel(
                    "Prompt tokens by key",
                    "Read tokens of the time range, ten largest.",
                    (logs(f"topk(10, {per_key('prompt_tokens', '$__range')})", "{{key_id}}", instant=True),),
                    kind="bargauge",
                ),
                Panel(
                    "Refusals by key",
                    "Refused calls of the time range by key and code.",
                    (
                        logs(
                            f"topk(10, sum by (key_id, code) (count_over_time({CLOSED} | {KEY} "
                            '| outcome="refused" [$__range])))',
                            "{{key_id}} {{code}}",
                            instant=True,
                        ),
                    ),
                    kind="bargauge",
                ),
                lines(
                    "Calls by key",
                    "Calls a second.",
                    logs(f"sum by (key_id) (rate({CLOSED} | {KEY} [$__auto]))", "{{key_id}}"),
                    unit="reqps",
                    stacked=True,
                    width=12,
                ),
                lines(
                    "Tokens by key",
                    "Written tokens, summed over each step.",
                    logs(per_key("completion_tokens", "$__auto"), "{{key_id}}"),
                    stacked=True,
                    width=12,
                ),
            ),
        ),
        (
            "Slow and broken calls",
            (
                Panel(
                    "Failed and interrupted",
                    "Open a line: Trace leads to Jaeger, Call to every line of the same call.",
                    (logs(f'{CLOSED} | {KEY} | outcome=~"failed|interrupted|lost"'),),
                    kind="logs",
                    width=12,
                    height=10,
                ),
                Panel(
                    "Slower than ten seconds to the first token",
                    "Open a line for its stages and its trace.",
                    (logs(f"{CLOSED} | {KEY} | first_token_seconds > 10"),),
                    kind="logs",
                    width=12,
                    height=10,
                ),
            ),
        ),
    ),
)

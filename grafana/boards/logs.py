"""All log lines, and whether they arrive."""

from grafana.panels import GREEN, RED, Board, Panel, Query, Variable, lines, logs

CHOSEN = '{service=~".*$service.*"} |~ `(?i)$search`'

BOARD = Board(
    uid="logs",
    title="Logs",
    why="All log lines. Type a request id, a trace id, a key id or a word into Search.",
    variables=(Variable("service", "Service"), Variable("search", "Search")),
    refresh="30s",
    rows=(
        (
            "How much, how bad",
            (
                lines(
                    "Lines by service",
                    "Lines a second.",
                    logs('sum by (service) (rate({service=~".+"} [$__auto]))', "{{service}}"),
                    stacked=True,
                ),
                lines(
                    "Warnings and errors",
                    "Lines a second at warning or above.",
                    logs(
                        'sum by (service, level) (rate({service=~".+", level=~"warn|warning|error|critical|fatal"} '
                        "[$__auto]))",
                        "{{service}} {{level}}",
                    ),
                ),
                lines(
                    "Edge refusals",
                    "Lines of nginx with a 4xx, by status.",
                    logs(
                        'sum by (status) (rate({service="nginx"} |= `edge_request` | json | status >= 400 [$__auto]))',
                        "{{status}}",
                    ),
                    unit="reqps",
                ),
            ),
        ),
        (
            "Lines",
            (
                Panel(
                    "Errors",
                    "Newest first. Open a line: Trace leads to Jaeger, Call to every line of the same call.",
                    (logs('{service=~".*$service.*", level=~"error|critical|fatal"} |~ `(?i)$search`'),),
                    kind="logs",
                    width=24,
                    height=8,
                ),
                Panel(
                    "All lines",
                    "Newest first.",
                    (logs(CHOSEN),),
                    kind="logs",
                    width=24,
                    height=16,
                ),
            ),
        ),
        (
            "The pipeline",
            (
                lines(
                    "Lines sent",
                    "Lines a second that reached Loki.",
                    Query(
                        'sum(rate({__name__=~"loki_write_sent_entries_total|promtail_sent_entries_total"}'
                        "[$__rate_interval]))",
                        "sent",
                    ),
                ),
                lines(
                    "Lines lost",
                    "Given up by promtail or dropped by the gateway.",
                    Query(
                        'sum(rate({__name__=~"loki_write_dropped_entries_total|promtail_dropped_entries_total"}'
                        "[$__rate_interval]))",
                        "promtail",
                    ),
                    Query("sum(rate(gateway_log_lines_dropped_total[$__rate_interval]))", "gateway"),
                    steps=((None, GREEN), (0.001, RED)),
                ),
                lines(
                    "Tries again",
                    "Batches that Loki did not take at once: it is down, slow or refuses.",
                    Query(
                        'sum(rate({__name__=~"loki_write_batch_retries_total|promtail_batch_retries_total"}'
                        "[$__rate_interval]))",
                        "retries",
                    ),
                ),
            ),
        ),
    ),
)

"""The six stages: where a call's time goes and why calls end as they do."""

from grafana.panels import GREEN, RED, YELLOW, Board, Panel, Query, Variable, heatmap, lines, quantiles

CHOSEN = 'endpoint=~"$endpoint",model=~"$model"'

BOARD = Board(
    uid="gateway",
    title="Gateway",
    why="The six stages auth, budget, capacity, dispatch, forward, ledger: where a call's time goes and how it ends.",
    variables=(
        Variable("endpoint", "Endpoint", "label_values(gateway_requests_total, endpoint)"),
        Variable("model", "Model", "label_values(gateway_requests_total, model)"),
    ),
    rows=(
        (
            "Calls",
            (
                lines(
                    "Outcomes",
                    "ok, rejected (vLLM's 4xx), refused (by us), cancelled, revoked, failed, interrupted, lost.",
                    Query(
                        f"sum by (outcome) (rate(gateway_requests_total{{{CHOSEN}}}[$__rate_interval]))", "{{outcome}}"
                    ),
                    unit="reqps",
                    stacked=True,
                    link=("Lines of these calls", "/d/logs"),
                ),
                lines(
                    "Refusals by code",
                    "Why calls were turned away: limits of the key, queue, no engine, ledger.",
                    Query("gateway:refusals:rate5m", "{{code}}"),
                    unit="reqps",
                    stacked=True,
                ),
                lines(
                    "In flight and waiting",
                    "Calls between head and end, and those of them that wait for the engine, by priority.",
                    Query("sum(gateway_in_flight_calls)", "in flight"),
                    Query("sum by (priority) (gateway_queue_calls)", "waiting, {{priority}}"),
                    steps=((None, GREEN), (32, RED)),
                ),
                lines(
                    "Calls by endpoint",
                    "What is asked for.",
                    Query(
                        f"sum by (endpoint) (rate(gateway_requests_total{{{CHOSEN}}}[$__rate_interval]))",
                        "{{endpoint}}",
                    ),
                    unit="reqps",
                    stacked=True,
                ),
                lines(
                    "Tokens",
                    "Settled tokens a second by direction.",
                    Query(
                        'sum by (direction) (rate(gateway_tokens_total{model=~"$model"}[$__rate_interval]))',
                        "{{direction}}",
                    ),
                ),
                lines(
                    "Tried again",
                    "Exchanges repeated on another backend before the first byte. More than a few: an engine fails.",
                    Query("sum(rate(gateway_retries_total[$__rate_interval]))", "retries"),
                    unit="reqps",
                ),
            ),
        ),
        (
            "Time",
            (
                quantiles(
                    "Time to first token",
                    "From a request's head to the first generated token. The promise is 2.5 s for 95 %.",
                    "gateway_time_to_first_token_seconds",
                    CHOSEN,
                    steps=((None, GREEN), (2.5, RED)),
                ),
                quantiles(
                    "Time between tokens",
                    "Mean of each stream. Reading speed is about 0.1 s.",
                    "gateway_inter_token_seconds",
                    CHOSEN,
                    steps=((None, GREEN), (0.25, RED)),
                ),
                quantiles(
                    "Duration of calls",
                    "From head to end. Click a dot for the trace of that call.",
                    "gateway_request_duration_seconds",
                    CHOSEN,
                ),
                lines(
                    "Where the time goes",
                    "Mean seconds of a call in each stage. capacity: waiting for the engine, forward: the engine.",
                    Query(
                        "sum by (stage) (rate(gateway_stage_seconds_sum[$__rate_interval])) "
                        "/ sum by (stage) (rate(gateway_stage_seconds_count[$__rate_interval]))",
                        "{{stage}}",
                    ),
                    unit="s",
                    stacked=True,
                ),
                lines(
                    "The gateway's own stages, p99",
                    "What the gateway itself costs: one call in a hundred takes longer than this in the stage.",
                    Query(
                        "histogram_quantile(0.99, sum by (le, stage) "
                        '(rate(gateway_stage_seconds_bucket{stage!~"forward|capacity"}[$__rate_interval])))',
                        "{{stage}}",
                    ),
                    unit="s",
                ),
                quantiles(
                    "Time in queue",
                    "How long calls wait for a place in the engine.",
                    "gateway_queue_seconds",
                ),
                heatmap(
                    "Time to first token, all of it",
                    "Two bands mean two kinds of calls (cached and not, short and long).",
                    "gateway_time_to_first_token_seconds",
                    width=12,
                ),
                heatmap(
                    "Duration, all of it",
                    "Calls by how long they took.",
                    "gateway_request_duration_seconds",
                    width=12,
                ),
            ),
        ),
        (
            "Engines and the process",
            (
                Panel(
                    "Engines",
                    "Health as the gateway sees it.",
                    (Query("gateway_backend_up", "{{backend}}"),),
                    kind="state-timeline",
                    height=6,
                    words={"1": ("healthy", GREEN), "0": ("down", RED)},
                ),
                Panel(
                    "Breakers",
                    "Closed: calls go through. Open: too many failures in a row, nothing is sent but a probe.",
                    (Query("gateway_breaker_state", "{{backend}}"),),
                    kind="state-timeline",
                    height=6,
                    words={"0": ("closed", GREEN), "1": ("half-open", YELLOW), "2": ("open", RED)},
                ),
                lines(
                    "Event loop",
                    "How late timers run. Above 0.25 s every stream feels it.",
                    Query("gateway_event_loop_lag_seconds", "lag"),
                    unit="s",
                    height=6,
                    steps=((None, GREEN), (0.25, RED)),
                ),
                lines(
                    "CPU",
                    "Of one core: the gateway uses one.",
                    Query('rate(process_cpu_seconds_total{job="gateway"}[$__rate_interval])', "cores"),
                    unit="percentunit",
                ),
                lines(
                    "Memory",
                    "Resident memory of the gateway.",
                    Query('process_resident_memory_bytes{job="gateway"}', "resident"),
                    unit="bytes",
                ),
                lines(
                    "Descriptors",
                    "Open files and sockets against the most that may be open.",
                    Query('process_open_fds{job="gateway"}', "open"),
                    Query('process_max_fds{job="gateway"}', "limit"),
                ),
                lines(
                    "Told too fast",
                    "Log lines and spans that were dropped because their reader was slow. Answers never wait for them.",
                    Query("sum(rate(gateway_log_lines_dropped_total[$__rate_interval]))", "log lines"),
                    Query("sum(rate(gateway_spans_dropped_total[$__rate_interval]))", "spans"),
                    width=12,
                    height=6,
                ),
                Panel(
                    "Version",
                    "What runs.",
                    (Query("gateway_build_info", "{{version}}", instant=True),),
                    kind="stat",
                    width=12,
                    height=6,
                    options={"textMode": "name"},
                ),
            ),
        ),
    ),
)

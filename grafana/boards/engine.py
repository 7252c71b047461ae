"""vLLM and its supervisor: is it alive, how full is it, how fast."""

from grafana.panels import GREEN, RED, Board, Panel, Query, Variable, heatmap, lines, quantiles

MODEL = 'model_name=~"$model_name"'
RATE = "[$__rate_interval]"


def mean(family: str) -> str:
    """Mean of a histogram family over the rate interval."""
    return f"sum(rate({family}_sum{{{MODEL}}}{RATE})) / sum(rate({family}_count{{{MODEL}}}{RATE}))"


BOARD = Board(
    uid="engine",
    title="Engine",
    why="vLLM by its own numbers, and its supervisor: is it alive, how full is it, how fast.",
    variables=(Variable("model_name", "Model", "label_values(vllm:num_requests_running, model_name)"),),
    rows=(
        (
            "Alive",
            (
                Panel(
                    "State",
                    "The supervisor's view. Hung: calls are in flight and no token comes, although /health says 200.",
                    (Query("engine_state == 1", "{{state}}"),),
                    kind="state-timeline",
                    width=12,
                    height=7,
                    words={"1": ("now", GREEN)},
                ),
                lines(
                    "Restarts by reason",
                    "hung: by the watchdog; the others: the process ended by itself.",
                    Query("sum by (reason) (engine_restarts_total)", "{{reason}}"),
                    width=6,
                    height=7,
                    decimals=0,
                ),
                Panel(
                    "Seconds to ready by phase",
                    "What the last start spent its time on.",
                    (Query("engine_ready_seconds", "{{phase}}", instant=True),),
                    kind="bargauge",
                    unit="s",
                    width=6,
                    height=7,
                ),
                quantiles(
                    "Canary",
                    "How long a request for one token takes. It sees a hang that no gauge of vLLM's shows.",
                    "engine_canary_seconds",
                    steps=((None, GREEN), (10, RED)),
                ),
                lines(
                    "Running calls",
                    "Sequences in vLLM's batch, and those that wait inside it (they should wait in the gateway).",
                    Query(f"sum(vllm:num_requests_running{{{MODEL}}})", "running"),
                    Query(f"sum(vllm:num_requests_waiting{{{MODEL}}})", "waiting in vLLM"),
                    Query("engine_calls", "inside vLLM, as the supervisor counts"),
                    Query("sum(gateway_in_flight_calls)", "in flight at the gateway"),
                ),
                lines(
                    "Suspicion",
                    "For how long nothing has moved while calls run, and from when on that is called a hang.",
                    Query("engine_suspicion_seconds", "nothing has moved for"),
                    Query("engine_hang_bound_seconds", "a hang from"),
                    unit="s",
                ),
                lines(
                    "Canaries lost",
                    "One-token requests that were refused, broken or too late, a second.",
                    Query(f"sum(rate(engine_canaries_lost_total{RATE}))", "lost"),
                ),
                lines(
                    "Prefill speed",
                    "Tokens a second that the warm-up measured: what the watchdog's patience is made of.",
                    Query("engine_prefill_tokens_per_second", "at warm-up"),
                ),
                lines(
                    "Waiting in vLLM by reason",
                    "capacity: no room in the KV cache. deferred: held back by a constraint.",
                    Query(f"sum by (reason) (vllm:num_requests_waiting_by_reason{{{MODEL}}})", "{{reason}}"),
                    stacked=True,
                ),
            ),
        ),
        (
            "Full",
            (
                lines(
                    "KV cache",
                    "Share of the cache in use. Above 85 % preemptions are near.",
                    Query(f"max by (model_name) (vllm:kv_cache_usage_perc{{{MODEL}}})", "{{model_name}}"),
                    unit="percentunit",
                    maximum=1,
                    steps=((None, GREEN), (0.85, RED)),
                ),
                lines(
                    "Preemptions",
                    "Running calls that were thrown out and computed again.",
                    Query(f"sum by (model_name) (rate(vllm:num_preemptions_total{{{MODEL}}}{RATE}))", "{{model_name}}"),
                    unit="ops",
                    steps=((None, GREEN), (0.1, RED)),
                ),
                lines(
                    "Prefix cache hits",
                    "Share of prompt tokens that were found in the cache.",
                    Query("engine:prefix_cache_hits_per_queries:ratio_rate5m", "{{model_name}}"),
                    unit="percentunit",
                    maximum=1,
                ),
                lines(
                    "Rejections by reason",
                    "Calls that vLLM itself turned away: the gateway should have held them back.",
                    Query(
                        f"sum by (reason) (rate(vllm:admission_rejections_total{{{MODEL}}}{RATE}))",
                        "{{reason}}",
                    ),
                    unit="reqps",
                ),
                lines(
                    "Ends by reason",
                    "stop: the model was done. length: cut at max_tokens. abort: the client left.",
                    Query(
                        f"sum by (finished_reason) (rate(vllm:request_success_total{{{MODEL}}}{RATE}))",
                        "{{finished_reason}}",
                    ),
                    unit="reqps",
                    stacked=True,
                ),
                lines(
                    "Tokens per iteration",
                    "Mean size of a step: large steps use the GPU well, and make each stream wait longer.",
                    Query(mean("vllm:iteration_tokens_total"), "tokens"),
                ),
            ),
        ),
        (
            "Fast",
            (
                lines(
                    "Tokens a second",
                    "Read (prefill) and written (decode).",
                    Query("engine:prompt_tokens:rate5m", "{{model_name}} read"),
                    Query("engine:generation_tokens:rate5m", "{{model_name}} written"),
                ),
                quantiles(
                    "Time to first token in vLLM",
                    "Without the gateway's queue. The gateway's own number is on its dashboard.",
                    "vllm:time_to_first_token_seconds",
                    MODEL,
                ),
                quantiles(
                    "Time between tokens in vLLM",
                    "Every gap of every stream.",
                    "vllm:inter_token_latency_seconds",
                    MODEL,
                ),
                lines(
                    "Phases of a call",
                    "Mean seconds of a call in vLLM: waiting, reading the prompt, writing the answer.",
                    Query(mean("vllm:request_queue_time_seconds"), "queue"),
                    Query(mean("vllm:request_prefill_time_seconds"), "prefill"),
                    Query(mean("vllm:request_decode_time_seconds"), "decode"),
                    unit="s",
                    stacked=True,
                ),
                quantiles(
                    "Duration in vLLM",
                    "From vLLM's sight of a request to its end.",
                    "vllm:e2e_request_latency_seconds",
                    MODEL,
                ),
                lines(
                    "Where prompt tokens come from",
                    "Computed, or taken from a cache.",
                    Query(f"sum by (source) (rate(vllm:prompt_tokens_by_source_total{{{MODEL}}}{RATE}))", "{{source}}"),
                    stacked=True,
                ),
                heatmap(
                    "Prompt length",
                    "Tokens of prompts.",
                    "vllm:request_prompt_tokens",
                    unit="short",
                    width=12,
                ),
                heatmap(
                    "Answer length",
                    "Tokens of answers.",
                    "vllm:request_generation_tokens",
                    unit="short",
                    width=12,
                ),
            ),
        ),
        (
            "The processes",
            (
                lines(
                    "Memory",
                    "Resident memory of vLLM's API server and of the supervisor.",
                    Query('process_resident_memory_bytes{job=~"vllm|engine"}', "{{job}}"),
                    unit="bytes",
                    width=12,
                ),
                lines(
                    "CPU",
                    "Cores that they use.",
                    Query('rate(process_cpu_seconds_total{job=~"vllm|engine"}[$__rate_interval])', "{{job}}"),
                    width=12,
                ),
            ),
        ),
    ),
)

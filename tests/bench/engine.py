"""What the appliance costs at the saturation of the real engine: `BENCH_ENGINE=1 make bench`.

As many streams as the engine takes at once; rounds of the same work in turns sent directly, through the gateway
(everything on) and through TLS and nginx as well; and turns in which each half of the streams goes one way, so that both
meet the same engine at the same moment. Without a GPU it is vLLM's CPU build with the embedded model: the
engine then uses every core, so what the gateway needs is taken from the engine. With a GPU it is not: the engine's own
variables (`ENGINE_DEVICE=gpu MODEL_NAME=… TP_SIZE=2`, docs/engine.md) choose another engine, `BENCH_STREAMS`,
`BENCH_TOKENS`, `BENCH_CLIENTS` (processes) and `BENCH_ROUNDS` the load.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import ssl
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
from tests.bench import edge, gateways, machine
from tests.bench.machine import Process
from tests.engine.conftest import KEY, MODEL, START_SECONDS, RealEngine

STREAMS = int(os.environ.get("BENCH_STREAMS", "16"))  # at once
# On average: half to one and a half times as many, 16 calls in a row alike, so that each way gets the same.
TOKENS = int(os.environ.get("BENCH_TOKENS", "48"))
TEMPERATURE = float(os.environ.get("BENCH_TEMPERATURE", "0"))  # above 0 for weights that are dummies
CALLS = 3 * STREAMS  # a round
CLIENTS = int(os.environ.get("BENCH_CLIENTS", "1"))  # processes: one reads some thousand events a second
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "4"))
LABELS = {"direct": "to vLLM directly", "through": "through the gateway", "edge": "through TLS, nginx and the gateway"}
COUNTED = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total")
OWN = "engine_own_tokens_total"  # the supervisor's canaries, which vLLM counts too


class Stream(NamedTuple):
    """What a client saw of one stream."""

    first: float  # seconds to the first token
    whole: float  # … and to the end
    tokens: int
    billed: int  # the prompt's too
    events: int


@dataclass(frozen=True)
class Way:
    """Where calls go, and as whom."""

    url: str
    key: str
    model: str


async def one(session: aiohttp.ClientSession, way: Way, number: int) -> Stream:
    """One stream, read to its end."""
    body = {
        "model": way.model, "messages": [{"role": "user", "content": f"Tell me story {number}."}], "stream": True,
        "max_tokens": TOKENS // 2 + number // 16 * 37 % TOKENS, "ignore_eos": True, "temperature": TEMPERATURE,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    began = time.perf_counter()
    first, usage, events = 0.0, {}, 0
    headers = {"authorization": f"Bearer {way.key}"}
    async with session.post(f"{way.url}/v1/chat/completions", json=body, headers=headers) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                events += 1
                if events == 2:  # the first only says who speaks
                    first = time.perf_counter() - began
                if b'"choices":[]' in line:
                    usage = json.loads(line[6:])["usage"]
    whole = time.perf_counter() - began  # events: without that one and the one of the usage
    return Stream(first, whole, usage["completion_tokens"], usage["total_tokens"], events - 2)


async def _shift(way: Way, streams: int, numbers: range) -> tuple[float, float, list[Stream]]:
    waiting = iter(numbers)
    found: list[Stream] = []
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE  # a certificate that this run made itself

    async def worker(session: aiohttp.ClientSession) -> None:
        for number in waiting:
            taken = await one(session, way, number)
            found.append(taken)

    connector = aiohttp.TCPConnector(limit=0, ssl=trusting)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as session:
        began = time.monotonic()
        await asyncio.gather(*(worker(session) for _ in range(streams)))
        return began, time.monotonic(), found


def shift(way: Way, streams: int, numbers: range) -> tuple[float, float, list[Stream]]:
    """One client process's part of a turn: when it began and ended (monotonic seconds), and its streams."""
    return asyncio.run(_shift(way, streams, numbers))


def turn(pool: ProcessPoolExecutor, ways: Sequence[Way], seed: int, gateway: Process) -> list[dict[str, float]]:
    """`CALLS` calls, `STREAMS` at once, an equal part each way at the same time; what was seen on each."""
    used = gateway.cpu_seconds()
    parts = len(ways) * max(1, CLIENTS // len(ways))
    done = [
        pool.submit(shift, ways[i % len(ways)], STREAMS // parts, range(seed * CALLS + i, (seed + 1) * CALLS, parts))
        for i in range(parts)
    ]
    ended = [part.result() for part in done]
    cores = gateway.cpu_seconds() - used
    return [_seen(ended[i :: len(ways)], cores) for i in range(len(ways))]


def _seen(parts: list[tuple[float, float, list[Stream]]], gateway_seconds: float) -> dict[str, float]:
    seconds = max(ended for _, ended, _ in parts) - min(began for began, _, _ in parts)
    found = list(itertools.chain.from_iterable(streams for _, _, streams in parts))
    firsts = sorted(stream.first for stream in found)
    tokens = sum(stream.tokens for stream in found)
    return {
        "tokens_s": tokens / seconds,
        "events_s": sum(stream.events for stream in found) / seconds,
        "ttft_p50_ms": statistics.median(firsts) * 1e3,
        "ttft_p99_ms": firsts[-1 - len(firsts) // 100] * 1e3,
        "ms_a_token": sum(stream.whole for stream in found) / max(1, tokens) * 1e3,
        "gateway_cores": gateway_seconds / seconds,
        "tokens": tokens,
        "billed": sum(stream.billed for stream in found),
    }


def _places(folder: Path) -> dict[str, str]:
    """The engine's environment: what is set here, else the CPU build and the embedded model."""
    secret = folder / "api-key"
    secret.write_text(KEY + "\n")
    names = ("MODEL_NAME", "SERVED_MODEL_NAME", "MODEL_CACHE_DIR", "TP_SIZE", "MAX_MODEL_LEN", "MAX_NUM_SEQS")
    names += ("GPU_MEMORY_UTILIZATION", "LD_LIBRARY_PATH")
    given = {
        name: value for name, value in os.environ.items() if name in names or name.startswith(("ENGINE_", "VLLM_"))
    }
    return {
        "ENGINE_VENV": str(machine.ROOT / ".state" / "engine-venv"),
        "MODEL_CACHE_DIR": str(machine.ROOT / ".state" / "models"),
        "ENGINE_EAGER": "true",
        "MAX_NUM_SEQS": str(STREAMS),
        "VLLM_API_KEY_FILE": str(secret),
        **given,
    }


def _ready(engine: RealEngine) -> bool:
    status = engine.status()
    if status["state"] == "failed":
        raise RuntimeError(f"the engine failed: {status['reason']}; its log: {engine.log}")
    return bool(status["ready"])


def _counted(url: str) -> float:
    """Tokens that the engine says it read and made for others."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as page:
        lines = page.read().decode().splitlines()
    own = sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(OWN))
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(COUNTED)) - own


def _billed(url: str) -> int:
    asked = urllib.request.Request(f"{url}/v1/usage", headers={"Authorization": f"Bearer {gateways.KEY}"})
    with urllib.request.urlopen(asked, timeout=30) as answer:
        return int(json.load(answer)["used_tokens"])


def measure(folder: Path) -> dict[str, Any]:
    """Start all, load them in turns, stop them."""
    environment = _places(folder)
    model = os.environ.get("SERVED_MODEL_NAME", MODEL)
    told = {"streams": STREAMS, "tokens": TOKENS, "calls": CALLS, "model": model, "clients": CLIENTS}
    result: dict[str, Any] = {"machine": machine.describe(gateways.PYTHON), "load": told, "rounds": []}
    nginx: Process | None = None
    with RealEngine(folder / "engine", environment) as engine:
        machine.wait_for("the engine is ready", lambda: _ready(engine), START_SECONDS)
        port = machine.free_port()
        argv, settings = gateways.ours(port, engine.port, folder)
        settings |= {"VLLM_API_KEY": KEY, "TRACE_RATIO": "0.1", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
        gateway = Process("gateway", argv, None, folder, settings)
        try:
            url = f"http://127.0.0.1:{port}"
            machine.wait_for("the gateway is ready", lambda: machine.answers(f"{url}/ready"), 60)
            ways = {"direct": Way(engine.url, KEY, model), "through": Way(url, gateways.KEY, model)}
            if edge.NGINX is not None:
                nginx, https = edge.start(port, folder)
                ways["edge"] = Way(f"https://127.0.0.1:{https}", gateways.KEY, model)
            turns = [(way,) for way in ways] + [("direct", way) for way in list(ways)[1:]]
            with ProcessPoolExecutor(max(CLIENTS, 2), mp_context=get_context("spawn")) as pool:
                for seed, way in enumerate(ways.values()):
                    turn(pool, [way], 1_000_000 + seed, gateway)  # warm
                billed, counted = _billed(url), 0.0
                for number in range(ROUNDS):
                    taken = {}
                    # Prompts of its own for each turn: whoever repeats another's finds them in the engine's cache.
                    for index, names in enumerate(turns if number % 2 else turns[::-1]):
                        before = _counted(engine.url)
                        seen = turn(pool, [ways[name] for name in names], number * len(turns) + index, gateway)
                        counted += _counted(engine.url) - before
                        for name, values in zip(names, seen, strict=True):
                            counted -= values["billed"] * (name == "direct")
                            taken[" beside ".join((name, *(n for n in names if n != name)))] = values
                            told_now = " ".join(f"{what} {value:.4g}" for what, value in values.items())
                            print(f"round {number + 1} {'+'.join(names):14} {name:8} {told_now}", flush=True)
                    result["rounds"].append(taken)
                result["billed"], result["counted"] = _billed(url) - billed, round(counted)
        finally:
            if nginx is not None:
                nginx.stop()
            gateway.stop()
    return result


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    rounds: list[dict[str, dict[str, float]]] = result["rounds"]
    ways = [way for way in LABELS if way in rounds[0]]
    rows = ["| | tokens/s | events/s | TTFT p50 ms | TTFT p99 ms | cores of the gateway |", "|---|---|---|---|---|---|"]
    for way in ways:
        taken = [round_[way] for round_ in rounds]
        cells = [
            f"{statistics.median(t[name] for t in taken):,.{digits}f} "
            f"({min(t[name] for t in taken):,.{digits}f}–{max(t[name] for t in taken):,.{digits}f})"
            for name, digits in (("tokens_s", 0), ("events_s", 0), ("ttft_p50_ms", 1), ("ttft_p99_ms", 1))
        ]
        cores = statistics.median(t["gateway_cores"] for t in taken)
        rows.append(f"| {LABELS[way]} | " + " | ".join(cells) + f" | {cores:.2f} |")
    for way in ways[1:]:
        for direct, through, how in (
            ("direct", way, "in turns"),
            (f"direct beside {way}", f"{way} beside direct", "side by side"),
        ):
            pairs = [(round_[direct], round_[through]) for round_ in rounds]
            parts = [one["ms_a_token"] / other["ms_a_token"] for one, other in pairs]
            added = [other["ttft_p50_ms"] - one["ttft_p50_ms"] for one, other in pairs]
            rows.append(
                f"\n{LABELS[way]}, {how}: a stream gets {statistics.median(parts):.2%} of the direct tokens a second "
                f"({min(parts):.2%}–{max(parts):.2%}), TTFT p50 {statistics.median(added):+.1f} ms "
                f"({min(added):+.1f} to {max(added):+.1f})."
            )
    rows.append(
        f"\nThe ledger has {result['billed']:,} tokens of these calls, the engine counted {result['counted']:,}."
    )
    return "\n".join(rows)


def main(docs: Path | None) -> None:
    """Measure, keep the figures, and unless `docs` is None write the document from the last run of both kinds."""
    machine.STATE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="engine-", dir=machine.STATE) as folder:
        Path(folder).chmod(0o755)  # a root nginx's workers run as another user
        result = measure(Path(folder))
    (machine.STATE / "engine.json").write_text(json.dumps(result, indent=1))
    print(table(result))
    from tests.bench import report  # here: report shows this file's table

    if docs is not None and (machine.STATE / "results.json").exists():
        report.write(json.loads((machine.STATE / "results.json").read_text()), docs)

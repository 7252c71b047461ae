"""What the appliance costs at the saturation of the real engine: `BENCH_ENGINE=1 make bench`.

vLLM's CPU build with the embedded model, more streams than it takes at once; rounds of the same work in turns sent
directly and through the gateway (everything on). On a machine without a GPU the engine uses every core, so what the
gateway needs is taken from the engine; with a GPU it is not.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
from tests.bench import gateways, machine
from tests.bench.machine import Process
from tests.engine.conftest import KEY, MODEL, START_SECONDS, RealEngine

STREAMS, TOKENS = 16, 48  # at once, each
CALLS = 48  # a round
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "4"))


async def one(session: aiohttp.ClientSession, url: str, key: str, number: int) -> tuple[float, int]:
    """Seconds to the first token, and tokens, of one stream."""
    body = {
        "model": MODEL, "messages": [{"role": "user", "content": f"Tell me story {number}."}], "stream": True,
        "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0, "stream_options": {"include_usage": True},
    }  # fmt: skip
    began = time.perf_counter()
    first, tokens = 0.0, 0
    async with session.post(
        f"{url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"}
    ) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if not first and b'"content":"' in line and b'"content":""' not in line:
                first = time.perf_counter() - began
            if b'"usage":{' in line and b'"choices":[]' in line:
                tokens = json.loads(line[6:])["usage"]["completion_tokens"]
    return first, tokens


async def turn(url: str, key: str, seed: int) -> dict[str, float]:
    """One round: `CALLS` calls, `STREAMS` at once."""
    waiting = iter(range(CALLS))
    found: list[tuple[float, int]] = []

    async def worker(session: aiohttp.ClientSession) -> None:
        for number in waiting:
            taken = await one(session, url, key, seed * CALLS + number)
            found.append(taken)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        began = time.perf_counter()
        await asyncio.gather(*(worker(session) for _ in range(STREAMS)))
        seconds = time.perf_counter() - began
    firsts = sorted(first for first, _ in found)
    return {
        "tokens_s": sum(tokens for _, tokens in found) / seconds,
        "ttft_p50_ms": statistics.median(firsts) * 1e3,
        "ttft_p99_ms": firsts[-1 - len(firsts) // 100] * 1e3,
    }


def measure(folder: Path) -> dict[str, Any]:
    """Start both, load them in turns, stop both."""
    places = {
        "ENGINE_VENV": os.environ.get("ENGINE_VENV") or str(machine.ROOT / ".state" / "engine-venv"),
        "MODEL_CACHE_DIR": os.environ.get("MODEL_CACHE_DIR") or str(machine.ROOT / ".state" / "models"),
    }
    secret = folder / "api-key"
    secret.write_text(KEY + "\n")
    environment = {**places, "VLLM_API_KEY_FILE": str(secret), "ENGINE_EAGER": "true", "MAX_NUM_SEQS": str(STREAMS)}
    result: dict[str, Any] = {"machine": machine.describe(), "direct": [], "through": [], "others": []}
    with RealEngine(folder / "engine", environment) as engine:
        engine.wait_for("ready", START_SECONDS)
        port = machine.free_port()
        argv, settings = gateways.ours(port, engine.port, folder)
        settings |= {"VLLM_API_KEY": KEY, "TRACE_RATIO": "0.1", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
        gateway = Process("gateway", argv, None, folder, settings)
        try:
            machine.wait_for("the gateway is ready", lambda: machine.answers(f"http://127.0.0.1:{port}/ready"), 60)
            ways = {"direct": (engine.url, KEY), "through": (f"http://127.0.0.1:{port}", gateways.KEY)}
            for url, key in ways.values():
                asyncio.run(turn(url, key, 999))  # warm
            for number in range(ROUNDS):
                order = list(ways) if number % 2 else list(reversed(ways))
                for way in order:
                    url, key = ways[way]
                    taken = asyncio.run(turn(url, key, number))
                    print(
                        f"round {number + 1} {way:8} " + " ".join(f"{n} {v:.1f}" for n, v in taken.items()), flush=True
                    )
                    result[way].append(taken)
        finally:
            gateway.stop()
    return result


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    rows = ["| | tokens/s | TTFT p50 ms | TTFT p99 ms |", "|---|---|---|---|"]
    for way, label in (("direct", "to vLLM directly"), ("through", "through the gateway")):
        taken = result[way]
        cells = [
            f"{statistics.median(t[name] for t in taken):.1f} ({min(t[name] for t in taken):.1f}–"
            f"{max(t[name] for t in taken):.1f})"
            for name in ("tokens_s", "ttft_p50_ms", "ttft_p99_ms")
        ]
        rows.append(f"| {label} | " + " | ".join(cells) + " |")
    pairs = list(zip(result["direct"], result["through"], strict=True))
    part = statistics.median(through["tokens_s"] / direct["tokens_s"] for direct, through in pairs)
    added = statistics.median(through["ttft_p50_ms"] - direct["ttft_p50_ms"] for direct, through in pairs)
    rows.append(f"\nPair by pair: {part:.1%} of the direct throughput, TTFT p50 {added:+.1f} ms.")
    return "\n".join(rows)


def main(docs: Path) -> None:
    """Measure, keep the figures, write the document from the last run of both kinds."""
    machine.STATE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="engine-", dir=machine.STATE) as folder:
        result = measure(Path(folder))
    (machine.STATE / "engine.json").write_text(json.dumps(result, indent=1))
    print(table(result))
    from tests.bench import report  # here: report shows this file's table

    if (machine.STATE / "results.json").exists():
        report.write(json.loads((machine.STATE / "results.json").read_text()), docs)

"""The relay on the real engine: every dialect byte for byte, work ends with its client, the ledger agrees with vLLM."""

import http.client
import json
import re
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.doubles.gateway import KEY, GatewayProcess
from tests.doubles.waiting import wait_until

pytestmark = pytest.mark.timeout(1800)  # the first of these tests may wait for the engine's start
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
STORY = [{"role": "user", "content": "Tell a very long story about the sea."}]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"usage": {"type": "object"}}}},
    }
]
USAGE = {"include_usage": True}
RUNNING = {"include_usage": True, "continuous_usage_stats": True}
COUNTERS = re.compile(rb"^vllm:(?:prompt|generation)_tokens_total\{[^}]*\} ([0-9.e+]+)$", re.MULTILINE)
RUNNING_NOW = re.compile(rb"^vllm:num_requests_(?:running|waiting)\{[^}]*\} ([0-9.e+]+)$", re.MULTILINE)
# What differs between two answers to the same request: names, times, and the last digits of probabilities (the second
# run finds its prompt in the engine's prefix cache and adds in another order).
NAMES = (
    (re.compile(rb'"(id|item_id|response_id)":\s*"[^"]*"'), rb'"\1":"X"'),
    (re.compile(rb'"(created|created_at|completed_at)":\s*[\d.]+'), rb'"\1":0'),
    (re.compile(rb"-?\d+\.\d{4,}(?:e-?\d+)?"), rb"0.0"),
)


@pytest.fixture(scope="module")
def gateway(engine: Any) -> Iterator[GatewayProcess]:
    with GatewayProcess(VLLM_URL=engine.url, VLLM_API_KEY=engine.api_key) as process:
        yield process


def ask(port: int, path: str, body: dict[str, Any], key: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=240)
    try:
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        connection.request("POST", path, json.dumps(body), headers)
        answer = connection.getresponse()
        data = answer.read()
    finally:
        connection.close()
    for pattern, name in NAMES:
        data = pattern.sub(name, data)
    return answer.status, data


def event_sizes(data: bytes) -> list[int]:
    """Bytes of each event, in order of size: equal for two answers that were cut into events at the same places."""
    return sorted(len(event) for event in data.split(b"\n\n"))


def alike(through: Callable[[], tuple[int, bytes]], direct: Callable[[], tuple[int, bytes]]) -> tuple[Any, Any]:
    """One answer through the gateway and one of the engine itself, cut into events at the same places.

    A busy engine joins two tokens in one event now and then, in one answer and not in the other; such pairs are asked
    again, a few times. What is returned at last must be equal, byte for byte.
    """
    for _ in range(6):
        first, second = through(), direct()
        if event_sizes(first[1]) == event_sizes(second[1]):
            break
    return first, second


def port_of(engine: Any) -> int:
    return int(engine.url.rpartition(":")[2])


def counted(engine: Any, pattern: re.Pattern[bytes]) -> float:
    with urllib.request.urlopen(f"{engine.url}/metrics", timeout=60) as page:
        return sum(float(value) for value in pattern.findall(page.read()))


@pytest.mark.parametrize(("path", "body"), [
    ("/v1/chat/completions", {"messages": QUESTION}),
    ("/v1/chat/completions", {"messages": QUESTION, "stream": True}),
    ("/v1/chat/completions", {"messages": QUESTION, "stream": True, "stream_options": USAGE}),
    ("/v1/chat/completions", {"messages": QUESTION, "stream": True, "stream_options": RUNNING}),
    ("/v1/chat/completions", {"messages": QUESTION, "stream": True, "logprobs": True, "top_logprobs": 3}),
    ("/v1/chat/completions", {"messages": QUESTION, "stream": True, "tools": TOOLS, "tool_choice": "none"}),
    ("/v1/completions", {"prompt": "Hello, my name is"}),
    ("/v1/completions", {"prompt": "Hello, my name is", "stream": True}),
    ("/v1/completions", {"prompt": "Hello, my name is", "stream": True, "logprobs": 2, "stream_options": USAGE}),
    ("/v1/responses", {"input": "Say hello."}),
    ("/v1/responses", {"input": "Say hello.", "stream": True}),
    ("/v1/messages", {"messages": QUESTION}),
    ("/v1/messages", {"messages": QUESTION, "stream": True}),
    ("/v1/messages/count_tokens", {"messages": QUESTION}),
    ("/v1/tokenize", {"prompt": "one two three"}),
    ("/v1/detokenize", {"tokens": [1, 2, 3]}),
])  # fmt: skip
def test_an_answer_is_what_the_engine_says(gateway: GatewayProcess, engine: Any, path: str, body: dict[str, Any]):
    limit = {"/v1/responses": "max_output_tokens"}.get(path, "max_tokens")
    if "tokens" not in path.rpartition("/")[2] and "tokenize" not in path:
        body = {**body, limit: 8, "temperature": 0}
    body = {"model": engine.model, **body}
    direct = path.replace("/v1", "", 1) if "tokenize" in path else path

    through, said = alike(
        lambda: ask(gateway.port, path, body, KEY), lambda: ask(port_of(engine), direct, body, engine.api_key)
    )

    assert through == said


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_several_choices_are_what_the_engine_says_choice_by_choice(gateway: GatewayProcess, engine: Any, path: str):
    """Choices are interleaved as the engine's scheduler happens to finish them; each one's events keep their order."""
    shared = {"model": engine.model, "max_tokens": 6, "temperature": 0, "stream": True}
    body = {"prompt": ["Hello, my name is", "The sea"], **shared} if path == "/v1/completions" else {
        "messages": QUESTION, "n": 2, "seed": 1, **shared, "temperature": 0.01
    }  # fmt: skip

    def by_choice(data: bytes) -> dict[Any, list[bytes]]:
        found: dict[Any, list[bytes]] = {}
        for event in data.split(b"\n\n"):
            index = re.search(rb'"index":(\d+)', event)
            found.setdefault(index and index[1], []).append(event)
        return found

    (_, through), (_, said) = alike(
        lambda: ask(gateway.port, path, body, KEY), lambda: ask(port_of(engine), path, body, engine.api_key)
    )

    assert by_choice(through) == by_choice(said)


def test_the_ledger_agrees_with_the_engine(engine: Any):
    wait_until("the engine is idle", lambda: counted(engine, RUNNING_NOW) == 0)
    with GatewayProcess(VLLM_URL=engine.url, VLLM_API_KEY=engine.api_key) as gateway:
        before = counted(engine, COUNTERS)
        for stream in (False, True):
            answer = gateway.chat("Hello there", model=engine.model, max_tokens=5, stream=stream)
            assert answer.status == 200, answer.body
        assert (
            gateway.post("/v1/completions", {"model": engine.model, "prompt": ["a", "b"], "max_tokens": 5}).status
            == 200
        )
        assert (
            gateway.post("/v1/messages", {"model": engine.model, "messages": QUESTION, "max_tokens": 5}).status == 200
        )
        assert (
            gateway.post("/v1/responses", {"model": engine.model, "input": "Hi", "max_output_tokens": 5}).status == 200
        )
        used = gateway.get("/v1/usage").json["used_tokens"]
        wait_until("the engine has counted the same", lambda: counted(engine, COUNTERS) - before == used)

        # A caller sends a prompt once; the engine computes, and counts, it once for each choice. That is no drift.
        assert gateway.chat("Hello there", model=engine.model, max_tokens=5, n=3).status == 200
        wait_until("the engine has counted more", lambda: counted(engine, COUNTERS) - before > used)
        drift = re.compile(rb"^gateway_ledger_drift_tokens ([-0-9.e+]+)$", re.MULTILINE)
        wait_until("there is no drift", lambda: float(drift.search(gateway.get("/metrics").body)[1]) == 0)  # type: ignore[index]

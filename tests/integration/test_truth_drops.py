"""Clients that hang up, by FIN and by RST, at every point of a call: the ledger has exactly what was read by then.

The engine's double stands still after a chosen event, so that what it sent, what the gateway read and what the client has
are the same, and the ledger can be held to the token.
"""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.doubles.gateway import KEY, GatewayProcess
from tests.doubles.vllm import VllmDouble
from tests.doubles.waiting import wait_until
from tests.integration.test_truth_proofs import ledger

CHAT = "/v1/chat/completions"
TOKENS = 20  # a whole stream: the role, 19 tokens with text, the last token with the reason, usage, [DONE]
RESET = pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])


class Dropper:
    """A client that hangs up at a chosen moment."""

    def __init__(self, gateway: GatewayProcess, directive: str, *, path: str = CHAT, **fields: Any) -> None:
        text = f"double:{directive}"
        asked = {"prompt": text} if path == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}
        body = json.dumps({"model": "double", "stream": True, "max_tokens": 400, **asked, **fields}).encode()
        self.request_id = f"drop-{time.monotonic_ns()}-{random.getrandbits(32):08x}"
        self.socket = socket.create_connection(("127.0.0.1", gateway.port), timeout=60)
        head = (
            f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\nx-request-id: {self.request_id}"
            f"\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self.socket.sendall(head.encode() + body)
        self.text = b""

    def read_until(self, mark: bytes, count: int = 1) -> None:
        while self.text.count(mark) < count:
            data = self.socket.recv(4096)
            assert data, f"the gateway closed first: {self.text!r}"
            self.text += data

    @property
    def tokens(self) -> int:
        """Generated tokens with text that this client has."""
        return self.text.count(b'"content":"') - self.text.count(b'"content":""')

    def drop(self, reset: bool) -> None:
        if reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        self.socket.close()


class Site:
    """A double, and a gateway that lets few calls at a time into it."""

    def __init__(self, engine: VllmDouble, gateway: GatewayProcess) -> None:
        self.engine = engine
        self.gateway = gateway

    def seen(self, client: Dropper) -> dict[str, Any] | None:
        """What the engine knows of a call."""
        return next((r for r in self.engine.requests() if r["request_id"] == client.request_id), None)

    def wait_for(self, client: Dropper, what: str, condition: Any) -> None:
        wait_until(what, lambda: (seen := self.seen(client)) is not None and condition(seen))

    def billed(self, client: Dropper, outcome: str = "cancelled") -> tuple[int, int]:
        """Prompt and completion tokens of a call's one record, once it is written: nobody waits for that of a call whose
        client is gone, so its line in the log may come first."""
        line = self.gateway.closed(client.request_id)
        assert line["outcome"] == outcome, line
        columns = "outcome, prompt_tokens, completion_tokens FROM usage_records"
        asked = f"SELECT {columns} WHERE request_id = ?"
        rows = wait_until("its record", lambda: ledger(self.gateway, asked, client.request_id))
        assert len(rows) == 1
        assert rows[0][0] == outcome
        held = "SELECT COUNT(*) FROM holds WHERE request_id = ?"
        wait_until("its hold is gone", lambda: ledger(self.gateway, held, client.request_id) == [(0,)])
        return rows[0][1], rows[0][2]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with VllmDouble(model="double") as engine, GatewayProcess(VLLM_URL=engine.url, ENGINE_CONCURRENCY=1) as gateway:
        yield Site(engine, gateway)


@RESET
def test_in_the_queue_it_costs_nothing(site, reset):
    blocker = Dropper(site.gateway, "tokens=300,hang_after=3")
    blocker.read_until(b'"content":"', 3)
    client = Dropper(site.gateway, "tokens=50")
    wait_until("it waits", lambda: len(site.gateway.admin("GET", "/admin/queue").json["data"]) == 1)
    client.drop(reset)
    assert site.billed(client) == (0, 0)
    assert site.seen(client) is None
    blocker.drop(reset)
    site.billed(blocker)


@RESET
def test_in_prefill_the_engine_has_reported_nothing(site, reset):
    client = Dropper(site.gateway, "tokens=50,prefill_ms=20000")
    site.wait_for(client, "prefill", lambda seen: seen["state"] == "prefill")
    client.drop(reset)
    assert site.billed(client) == (0, 0)
    site.wait_for(client, "the engine stopped", lambda seen: seen["state"] == "cancelled")
    assert (site.seen(client)["prompt_tokens"], site.seen(client)["completion_tokens"]) == (0, 0)


@RESET
@pytest.mark.parametrize("events", [1, 2, 3, 4, 11, TOKENS - 1, TOKENS])
def test_after_a_chunk_of_a_stream(site, reset, events):
    """1: the role alone; 20: just before the last chunk."""
    client = Dropper(site.gateway, f"tokens={TOKENS},hang_after={events}")
    client.read_until(b'"content":"', events)
    client.drop(reset)
    prompt, completion = site.billed(client)
    site.wait_for(client, "the engine stopped", lambda seen: seen["state"] == "cancelled")
    seen = site.seen(client)
    assert seen["events"] == events
    assert (prompt, completion) == (seen["prompt_tokens"], events - 1)
    assert completion == client.tokens
    # One more was made, and never sent: nobody can know of it.
    assert seen["completion_tokens"] - completion == 1


@RESET
@pytest.mark.parametrize(("events", "mark"), [(TOKENS + 1, b'"finish_reason":"stop"'), (TOKENS + 2, b'"choices":[]')])
def test_after_the_last_chunk_but_before_the_end(site, reset, events, mark):
    """The reason or the usage has come, `[DONE]` has not."""
    client = Dropper(
        site.gateway, f"tokens={TOKENS},hang_after={events}", stream_options={"include_usage": True}
    )  # fmt: skip
    client.read_until(mark)
    client.drop(reset)
    prompt, completion = site.billed(client)
    site.wait_for(client, "the engine stopped", lambda seen: seen["state"] == "cancelled")
    seen = site.seen(client)
    assert (seen["events"], seen["completion_tokens"]) == (events, TOKENS)
    assert (prompt, completion) == (seen["prompt_tokens"], TOKENS)


@RESET
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "JSON"])
def test_an_answer_that_was_made_and_not_read_costs_what_it_is(site, reset, stream):
    client = Dropper(site.gateway, f"tokens={TOKENS}", stream=stream)
    site.wait_for(client, "the engine has ended", lambda seen: seen["state"] == "done")
    line = site.gateway.closed(client.request_id)  # the whole of it waits in the client's socket
    client.drop(reset)
    assert line["outcome"] == "ok"
    seen = site.seen(client)
    assert (
        site.billed(client, "ok")
        == (seen["prompt_tokens"], TOKENS)
        == (seen["prompt_tokens"], seen["completion_tokens"])
    )


@RESET
def test_of_an_answer_in_one_piece_nothing_is_known_before_it_comes(site, reset):
    """The engine reports usage with the answer; whoever leaves before is charged nothing, and the engine stops."""
    client = Dropper(site.gateway, "tokens=4000,pace_ms=10", stream=False, max_tokens=4000)
    site.wait_for(client, "it decodes", lambda seen: seen["completion_tokens"] > 5)
    client.drop(reset)
    assert site.billed(client) == (0, 0)
    site.wait_for(client, "the engine stopped", lambda seen: seen["state"] == "cancelled")
    assert site.seen(client)["completion_tokens"] < 2000


@RESET
@pytest.mark.parametrize(
    ("path", "events", "mark", "marks", "tokens"),
    [
        ("/v1/completions", 5, b'"text":"', 5, 5),
        ("/v1/messages", 1, b"event: message_start", 1, 0),
        ("/v1/messages", 7, b"event: content_block_delta", 5, 5),
    ],
)
def test_in_the_other_dialects(site, reset, path, events, mark, marks, tokens):
    client = Dropper(site.gateway, f"tokens={TOKENS},hang_after={events}", path=path)
    client.read_until(mark, marks)
    client.drop(reset)
    prompt, completion = site.billed(client)
    site.wait_for(client, "the engine stopped", lambda seen: seen["state"] == "cancelled")
    seen = site.seen(client)
    assert seen["events"] == events
    assert (prompt, completion) == (seen["prompt_tokens"], tokens)


@RESET
def test_several_choices_are_added_up(site, reset):
    client = Dropper(site.gateway, f"tokens={TOKENS},hang_after=11", n=2)
    client.read_until(b'"content":"', 11)
    client.drop(reset)
    prompt, completion = site.billed(client)
    site.wait_for(client, "the engine stopped", lambda seen: seen["state"] == "cancelled")
    assert completion == client.tokens
    assert prompt == site.seen(client)["prompt_tokens"]


@RESET
@pytest.mark.parametrize("tokens", [1, 30])
def test_in_the_middle_of_a_running_stream(site, reset, tokens):
    """Nothing stands still: at least what the client had, at most what the engine made until it stopped."""
    client = Dropper(site.gateway, "tokens=4000,pace_ms=5", max_tokens=4000)
    client.read_until(b'"content":"', tokens + 1)
    client.drop(reset)
    prompt, completion = site.billed(client)
    site.wait_for(client, "the engine stopped", lambda seen: seen["state"] == "cancelled")
    seen = site.seen(client)
    assert prompt == seen["prompt_tokens"]
    assert client.tokens <= completion <= seen["completion_tokens"] < 4000

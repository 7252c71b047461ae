"""An engine that is not vLLM: HTTP/1.0, spaces in its JSON, CRLF, usage at the end or never, limits not kept.

People put other OpenAI-compatible servers behind `BACKENDS`; what they generate must be counted and capped as well.
"""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from tests.doubles.gateway import GatewayProcess

CHUNKS = 400


class Engine(BaseHTTPRequestHandler):
    """Answers streams with CHUNKS tokens, whatever was asked; `manner` says how."""

    manner: dict[str, Any] = {}  # noqa: RUF012 - set by each test for the one server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._say({"data": [{"id": "m", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        usage = {"prompt_tokens": 3, "completion_tokens": CHUNKS, "total_tokens": 3 + CHUNKS}
        if self.manner.get("page"):
            self._say_page()
            return
        if not body.get("stream"):
            self._say({"choices": [{"index": 0, "message": {"content": "Paris"}}], "usage": usage})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        blank = self.manner.get("blank", "\n\n")
        events: list[Any] = [{"choices": [{"index": 0, "delta": {"content": f"t{i} "}}]} for i in range(CHUNKS)]
        if self.manner.get("usage"):
            events.append({"choices": [], "usage": usage})
        for event in events:
            self.wfile.write(f"data: {json.dumps(event)}{blank}".encode())
        self.wfile.write(f"data: [DONE]{blank}".encode())

    def _say(self, answer: Any) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def _say_page(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<html>Welcome</html>")


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayProcess]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with GatewayProcess(VLLM_URL=f"http://127.0.0.1:{server.server_port}") as process:
            yield process
    finally:
        server.shutdown()
        server.server_close()


def stream(gateway: GatewayProcess, key: str, **fields: int) -> list[str]:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True, **fields}
    answer = gateway.post("/v1/chat/completions", body, key=key)
    assert answer.status == 200, answer.body
    return [event.removeprefix("data: ") for event in answer.body.decode().split("\n\n") if event]


def new_key(gateway: GatewayProcess, **limits: int) -> str:
    return str(gateway.admin("POST", "/admin/keys", {"name": "foreign", **limits}).json["secret"])


@pytest.mark.parametrize("blank", ["\n\n", "\r\n\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize(("usage", "counted"), [(True, 3 + CHUNKS), (False, CHUNKS)], ids=["usage", "no usage"])
def test_what_it_generates_is_relayed_and_counted(gateway: GatewayProcess, blank: str, usage: bool, counted: int):
    Engine.manner = {"blank": blank, "usage": usage}
    key = new_key(gateway)

    *events, done = stream(gateway, key)

    assert [json.loads(event)["choices"][0]["delta"]["content"] for event in events] == [
        f"t{i} " for i in range(CHUNKS)
    ]
    assert done == "[DONE]"
    assert gateway.get("/v1/usage", key=key).json["used_tokens"] == counted


def test_a_json_answer_is_counted(gateway: GatewayProcess):
    Engine.manner = {}
    key = new_key(gateway)
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}

    assert gateway.post("/v1/chat/completions", body, key=key).status == 200
    assert gateway.get("/v1/usage", key=key).json["used_tokens"] == 3 + CHUNKS


def test_it_cannot_spend_more_than_the_day_allows(gateway: GatewayProcess):
    """It ignores the limit that the gateway gave it; the stream ends at that limit, in order."""
    Engine.manner = {}
    key = new_key(gateway, daily_tokens=300)

    *events, done = stream(gateway, key, max_tokens=2)

    assert done == "[DONE]"
    assert json.loads(events[-1])["choices"][0]["finish_reason"] == "length"
    assert len(events) - 1 == gateway.get("/v1/usage", key=key).json["used_tokens"] <= 300


def test_nor_with_an_answer_in_one_piece(gateway: GatewayProcess):
    Engine.manner = {}
    key = new_key(gateway, daily_tokens=300)
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}

    assert gateway.post("/v1/chat/completions", body, key=key).status == 200
    assert 0 < gateway.get("/v1/usage", key=key).json["used_tokens"] <= 300


@pytest.mark.parametrize("stream", [True, False])
def test_a_page_is_no_answer(gateway: GatewayProcess, stream: bool):
    """What a wrong address or a proxy in between says with status 200."""
    Engine.manner = {"page": True}
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream}

    answer = gateway.post("/v1/chat/completions", body)

    assert (answer.status, answer.code) == (502, "upstream_error")
    assert b"Welcome" not in answer.body

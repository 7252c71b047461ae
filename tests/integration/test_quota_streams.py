"""What a day's quota does to streams whose hold is not the truth: images that cost more, engines that keep no limit."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from tests.doubles.gateway import GatewayProcess

PROMPT = 9_000  # tokens, more than MEDIA_TOKENS says that an image costs
FAILURES = 5
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


class Engine(BaseHTTPRequestHandler):
    """Streams `tokens` tokens in the dialect of its path, and counts `prompt` for the prompt."""

    prompt = PROMPT
    tokens = 5

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._say("application/json", b'{"data":[{"id":"m","object":"model"}]}')

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        if self.path not in (CHAT, MESSAGES, RESPONSES):
            self.send_error(404)
            return
        named = {CHAT: self._chat, MESSAGES: self._messages, RESPONSES: self._responses}[self.path]
        self._say("text/event-stream", b"".join(named()))

    def _chat(self) -> Iterator[bytes]:
        for number in range(1, self.tokens + 1):
            usage = {"prompt_tokens": self.prompt, "completion_tokens": number, "total_tokens": self.prompt + number}
            finish = "stop" if number == self.tokens else None
            choice = {"index": 0, "delta": {"content": f"t{number} "}, "finish_reason": finish}
            chunk = {"id": "c", "object": "chat.completion.chunk", "choices": [choice], "usage": usage}
            yield b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"

    def _messages(self) -> Iterator[bytes]:
        usage = {"input_tokens": self.prompt, "output_tokens": 0}
        yield _event({"type": "message_start", "message": {"usage": usage}})
        for number in range(1, self.tokens + 1):
            yield _event({"type": "content_block_delta", "delta": {"type": "text_delta", "text": f"t{number} "}})
        usage["output_tokens"] = self.tokens
        yield _event({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage})
        yield _event({"type": "message_stop"})

    def _responses(self) -> Iterator[bytes]:
        for number in range(1, self.tokens + 1):
            yield _event({"type": "response.output_text.delta", "sequence_number": number, "delta": f"t{number} "})
        usage = {"input_tokens": self.prompt, "output_tokens": self.tokens}
        yield _event({"type": "response.completed", "sequence_number": 99, "response": {"usage": usage}})

    def _say(self, content_type: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.end_headers()
        self.wfile.write(body)


def _event(data: dict[str, Any]) -> bytes:
    return f"event: {data['type']}\ndata: ".encode() + json.dumps(data).encode() + b"\n\n"


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayProcess]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        with GatewayProcess(VLLM_URL=url, BREAKER_FAILURES=FAILURES, BREAKER_SECONDS=60) as process:
            yield process
    finally:
        server.shutdown()
        server.server_close()


def new_key(gateway: GatewayProcess, **limits: int) -> str:
    return str(gateway.admin("POST", "/admin/keys", {"name": "thrifty", **limits}).json["secret"])


def stream(gateway: GatewayProcess, path: str, key: str, content: Any, most: int = 100) -> str:
    said = {"input": [{"role": "user", "content": content}]} if path == RESPONSES else {}
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": content}], **said}
    if path == RESPONSES:
        del body["messages"]
    body["max_output_tokens" if path == RESPONSES else "max_tokens"] = most
    answer = gateway.post(path, body, key=key)
    assert answer.status == 200, answer.body
    return answer.body.decode()


@pytest.mark.parametrize(
    ("path", "end"), [(CHAT, "[DONE]"), (MESSAGES, "event: message_stop"), (RESPONSES, "event: response.completed")]
)
def test_an_image_that_costs_more_than_was_held_is_answered_whole(gateway: GatewayProcess, path: str, end: str):
    """Only the answer tells what an image costs: it is booked, and nothing is cut."""
    Engine.prompt, Engine.tokens = PROMPT, 5
    key = new_key(gateway, daily_tokens=1_000_000)

    for _ in range(FAILURES):
        told = stream(gateway, path, key, [IMAGE, {"type": "text", "text": "What is it?"}])

        assert [f"t{number} " in told for number in range(1, 6)] == [True] * 5, told
        assert end in told
        assert '"length"' not in told
    assert gateway.get("/v1/usage", key=key).json["used_tokens"] == FAILURES * (PROMPT + 5)


@pytest.mark.parametrize(("path", "error"), [(MESSAGES, "event: error"), (RESPONSES, "event: response.failed")])
def test_an_engine_that_keeps_no_limit_is_cut_but_not_taken_for_failed(gateway: GatewayProcess, path: str, error: str):
    """The key pays what was held; the others go on being served."""
    Engine.prompt, Engine.tokens = 3, 3_000
    key = new_key(gateway, daily_tokens=1_000_000)

    for _ in range(FAILURES):
        told = stream(gateway, path, key, "hi", most=2)
        assert error in told, told[-300:]
        assert "t3000 " not in told
    assert 0 < gateway.get("/v1/usage", key=key).json["used_tokens"] < 3_000

    assert "t3000 " in stream(gateway, CHAT, new_key(gateway), "hi")

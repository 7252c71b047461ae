"""An engine of a few lines, for answers that no honest engine gives and for moments that a test must hold.

A request whose body has `script:NAME` is answered by the function of that name, every other one by `default`.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Script = Callable[[BaseHTTPRequestHandler], None]
_NAME = re.compile(rb"script:(\w+)")
DONE = b"data: [DONE]\n\n"


def whole(answer: Any, status: int = 200, kind: str = "application/json") -> Script:
    """An answer in one piece; bytes as they are, everything else as JSON."""
    body = answer if isinstance(answer, bytes) else json.dumps(answer, separators=(",", ":")).encode()

    def say(to: BaseHTTPRequestHandler) -> None:
        to.send_response(status)
        to.send_header("content-type", kind)
        to.send_header("content-length", str(len(body)))
        to.end_headers()
        to.wfile.write(body)

    return say


def begin(to: BaseHTTPRequestHandler) -> None:
    """The head of a stream."""
    to.send_response(200)
    to.send_header("content-type", "text/event-stream; charset=utf-8")
    to.send_header("transfer-encoding", "chunked")
    to.end_headers()


def send(to: BaseHTTPRequestHandler, data: bytes) -> None:
    """A piece of a stream; nothing: its end."""
    to.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
    to.wfile.flush()


def streamed(events: Iterable[bytes], end: bool = True) -> Script:
    """A stream of `events`; unless `end`, the connection breaks behind them."""

    def say(to: BaseHTTPRequestHandler) -> None:
        begin(to)
        for event in events:
            send(to, event)
        if end:
            send(to, b"")
        else:
            to.close_connection = True

    return say


def event(data: Any, name: str = "") -> bytes:
    """One event of a stream."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


def token(number: int, finish: str | None = None) -> bytes:
    """The event of the `number`th token of a chat, as vLLM writes it."""
    choice = {"index": 0, "delta": {"content": "a"}, "logprobs": None, "finish_reason": finish}
    usage = {"prompt_tokens": 3, "total_tokens": 3 + number, "completion_tokens": number}
    stamp = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "double"}
    return event({**stamp, "choices": [choice], "usage": usage})


ANSWER = {"id": "c", "choices": [], "usage": {"prompt_tokens": 3, "total_tokens": 5, "completion_tokens": 2}}
FAILURE = whole({"error": {"message": "out of memory"}}, 500)


class ScriptedEngine:
    """Serves one model, `double`. `scripts` may change while it runs; `asked` counts the requests of each."""

    def __init__(self, **scripts: Script) -> None:
        self.asked: dict[str, int] = {}
        self.scripts: dict[str, Script] = {"default": whole(ANSWER), **scripts}
        engine = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                whole({"data": [{"id": "double", "object": "model", "max_model_len": 8192}]})(self)

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):  # the gateway gave an answer up
                    super().handle()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                found = _NAME.search(body)
                name = found[1].decode() if found else "default"
                engine.asked[name] = engine.asked.get(name, 0) + 1
                if self.path == "/tokenize" and not found:
                    whole({"count": 10, "max_model_len": 8192, "tokens": []})(self)
                else:
                    engine.scripts[name](self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

"""A whole path for tests of flow: engine doubles, the real gateway, and nginx in front if there is one; raw clients."""

from __future__ import annotations

import contextlib
import json
import socket
import sqlite3
import ssl
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.doubles.gateway import KEY, GatewayProcess
from tests.doubles.machine import patience
from tests.doubles.vllm import VllmDouble, wait_until

PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
    "embeddings": "/v1/embeddings",
}


def asking(what: str, directive: str, **fields: Any) -> dict[str, Any]:
    """A body in the dialect `what` that carries `directive` to the double."""
    text = f"double:{directive}"
    messages = [{"role": "user", "content": text}]
    bodies: dict[str, dict[str, Any]] = {
        "chat": {"messages": messages},
        "completions": {"prompt": text, "max_tokens": 4000},
        "responses": {"input": text},
        "messages": {"messages": messages, "max_tokens": 4000},
        "embeddings": {"input": text},
    }
    return {"model": "double", **bodies[what], **fields}


class Wire:
    """One connection with one request on it, read and closed by hand."""

    def __init__(self, port: int, path: str, body: dict[str, Any], trust: ssl.SSLContext | None = None, key: str = KEY,
                 request_id: str | None = None, receive_buffer: int | None = None) -> None:  # fmt: skip
        payload = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: edge.test\r\nauthorization: Bearer {key}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(payload)}\r\n"
        head += f"x-request-id: {request_id}\r\n" if request_id else ""
        if trust is not None:
            head += "connection: close\r\n"  # nginx keeps a client's connection, however the answer ended
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect(("127.0.0.1", port))
        self.plain = self.socket
        if trust is not None:
            self.socket = trust.wrap_socket(self.socket, server_hostname="edge.test")
        self.socket.settimeout(60)
        self.socket.sendall(head.encode() + b"\r\n" + payload)
        self.received = b""

    def read_until(self, mark: bytes) -> bytes:
        """Read until `mark` has come."""
        while mark not in self.received:
            part = self.socket.recv(65536)
            assert part, f"closed before {mark!r}: {self.received[-300:]!r}"
            self.received += part
        return self.received

    def read_all(self) -> bytes:
        """Read until the other side closes."""
        with contextlib.suppress(ConnectionResetError, ssl.SSLEOFError):
            while part := self.socket.recv(65536):
                self.received += part
        return self.received

    def close(self, how: str = "fin") -> None:
        """Leave by FIN or by RST."""
        if how == "rst":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def body_of(raw: bytes) -> tuple[int, bytes, bool]:
    """Status, body and whether it ended properly, of one HTTP/1.1 answer."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    if b"transfer-encoding: chunked" not in head.lower():
        return status, rest, True
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size or b"0", 16)
        if not length:
            return status, body, bool(size)
        body, rest = body + rest[:length], rest[length + 2 :]
    return status, body, False


def ledger(gateway: GatewayProcess, request_id: str, seconds: float = 60.0) -> dict[str, Any]:
    """The one row of a call in the ledger; waits for it."""
    rows = wait_until(
        f"a ledger row of {request_id}",
        lambda: query(gateway, "SELECT * FROM usage_records WHERE request_id = ?", request_id),
        seconds,
    )
    assert len(rows) == 1
    return rows[0]


def query(gateway: GatewayProcess, sql: str, *values: Any) -> list[dict[str, Any]]:
    """Rows from the gateway's SQLite file, read beside it."""
    path = gateway.environment["DATABASE_URL"].removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=60)) as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute(sql, values)]


def metric(gateway: GatewayProcess, name: str) -> float:
    """The sum of a family's samples."""
    lines = gateway.get("/metrics", key=None).body.decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def at_rest(gateway: GatewayProcess, engine: VllmDouble, seconds: float = 1.0) -> None:
    """Nothing runs, waits or is held, within `seconds` (more on a busy machine)."""

    def resting() -> bool:
        state = engine.state()
        held = query(gateway, "SELECT request_id FROM holds")
        return not state["running"] and not state["waiting"] and not held

    wait_until("engine and holds are empty", resting, patience(seconds))
    assert metric(gateway, "gateway_in_flight_calls") == 0
    assert metric(gateway, "gateway_holds") == 0
    assert metric(gateway, "gateway_queue_calls") == 0


@contextlib.contextmanager
def edge_before(gateway: GatewayProcess, folder: Path) -> Iterator[Any]:
    """nginx with our configuration in front of `gateway`."""
    from tests.doubles import edge_running

    with edge_running.edge(folder, gateway=f"127.0.0.1:{gateway.port}") as running:
        yield running

"""HTTP: `/metrics`, `/health` and `/energy`, all from the last snapshot, so that no scrape waits for the driver."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from loguru import logger
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from gpu_exporter.collector import Health, render_health
from gpu_exporter.exposition import CONTENT_TYPE
from gpu_exporter.sampler import Snapshot

MOST_CONNECTIONS = 32
IDLE_SECONDS = 60.0


class Pages:
    """The answers, by path. Thread-safe: everything is read from one immutable snapshot."""

    def __init__(self, snapshot: Callable[[], Snapshot], alive: Callable[[], bool], names: str) -> None:
        self._snapshot, self._alive, self._names = snapshot, alive, names
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Status, content type and body for a path."""
        if path == "/metrics":
            return 200, CONTENT_TYPE, self._metrics()
        if path == "/health":
            return self._health()
        if path == "/energy":
            return self._energy()
        return _json(404, {"error": "not found; there are /metrics, /health and /energy"})

    def _metrics(self) -> bytes:
        snapshot, data = self._current()
        health = render_health(snapshot.health, self._names, time.time())
        process: bytes = generate_latest(self._process)
        return (data + health).encode() + process

    def _health(self) -> tuple[int, str, bytes]:
        """200 while the exporter works, also without a GPU: a driver that fails calls for an alert, not a restart."""
        health = self._current()[0].health
        status = "ok" if health.success and health.visible >= health.expected else "degraded"
        body = {
            "status": status if self._alive() else "broken",
            "state": health.state,
            "visible": health.visible,
            "expected": health.expected,
            "last_success_timestamp": health.succeeded_at or None,
            "demo": health.demo,
        }
        return _json(200 if self._alive() else 503, body)

    def _energy(self) -> tuple[int, str, bytes]:
        """Joules by GPU since its driver was loaded: a GPU's number falls when the driver is loaded again."""
        snapshot, data = self._current()
        if not data or snapshot.energy is None:
            return _json(503, {"error": "no sample", "state": snapshot.health.state})
        total = sum(snapshot.energy.values())
        body = {"joules_total": total, "timestamp": snapshot.health.finished_at, "gpus": snapshot.energy}
        return _json(200, body)

    def _current(self) -> tuple[Snapshot, str]:
        """The snapshot and its data, or no data when it is too old: even a dead sampler leaves nothing stale."""
        snapshot = self._snapshot()
        if snapshot.data and time.monotonic() > snapshot.expires:
            return Snapshot(_expired(snapshot.health)), ""
        return snapshot, snapshot.data


def _expired(health: Health) -> Health:
    return replace(health, state="failed", success=False, visible=0)


def _json(status: int, body: dict[str, Any]) -> tuple[int, str, bytes]:
    return status, "application/json", json.dumps(body).encode() + b"\n"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # One segment an answer: head and body written apart would cost 40 ms to delayed acknowledgements.
    wbufsize = 1 << 20
    disable_nagle_algorithm = True
    timeout = IDLE_SECONDS
    server: Server

    def do_GET(self) -> None:
        status, kind, body = self.server.pages.answer(self.path.partition("?")[0])
        self.send_response_only(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """As all answers here: JSON, and nothing of what was sent."""
        self.request_version = self.protocol_version  # else a line that cannot be read would get no head
        status, kind, body = _json(code, {"error": f"{HTTPStatus(code).phrase}; there is GET and HEAD over HTTP/1"})
        self.send_response_only(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not events."""


class Server(ThreadingHTTPServer):
    """A thread for each connection, and no more of them than `MOST_CONNECTIONS`: the rest is closed at once."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host: str, port: int, pages: Pages) -> None:
        self.pages = pages
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    @property
    def port(self) -> int:
        """The port that is bound."""
        return int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            logger.warning("connection_refused", most=MOST_CONNECTIONS)
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is no error of ours."""
        logger.opt(exception=True).debug("connection_failed")

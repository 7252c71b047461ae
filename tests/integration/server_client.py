"""Raw sockets against a server process: what was sent is exact bytes, what came is read by h11."""

from __future__ import annotations

import http.client
import json
import select
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

import h11
from tests.doubles.waiting import PATIENCE, wait_until


@dataclass
class Response:
    """One response as the client saw it."""

    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool = True
    interim: list[int] = field(default_factory=list)

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


class Wire:
    """One client connection."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self._rest = b""

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send all of `data`; a server that has closed meanwhile is not an error."""
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return

    def receive(self) -> bytes:
        """Some bytes; b"" at the end, also at a reset."""
        try:
            return self.socket.recv(65_536)
        except ConnectionResetError:
            return b""

    def response(self, method: str = "GET") -> Response | None:
        """The next response; None if the connection ended before one began."""
        parser = h11.Connection(h11.CLIENT)
        parser.send(h11.Request(method=method, target="/", headers=[("host", "x"), ("content-length", "0")]))
        parser.send(h11.EndOfMessage())
        if self._rest:
            parser.receive_data(self._rest)
            self._rest = b""
        found: Response | None = None
        interim: list[int] = []
        while True:
            try:
                event = parser.next_event()
            except h11.RemoteProtocolError:
                if found is not None:
                    found.whole = False
                return found
            if event is h11.NEED_DATA:
                parser.receive_data(self.receive())
            elif isinstance(event, h11.InformationalResponse):
                interim.append(event.status_code)
            elif isinstance(event, h11.Response):
                headers = {n.decode(): v.decode("latin-1") for n, v in event.headers}
                found = Response(event.status_code, headers, b"", interim=interim)
            elif isinstance(event, h11.Data):
                assert found is not None
                found.body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                self._rest = parser.trailing_data[0]
                return found
            else:
                return None

    def ended(self, seconds: float = PATIENCE) -> bool:
        """Whether the server ends the connection within `seconds`; what it still sends is dropped."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self.socket], [], [], left)[0] and not self.receive():
                return True
        return False


class Server:
    """A server process of tests/doubles/asgi_server.py."""

    def __init__(self, kind: str, **bounds: float) -> None:
        argv = [sys.executable, "-m", "tests.doubles.asgi_server", kind]
        self.kind = kind
        self.process = subprocess.Popen(
            [*argv, json.dumps(bounds)] if bounds else argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def talk(self, *pieces: bytes, answers: int = 1, methods: tuple[str, ...] = ()) -> list[Response | None]:
        """Send `pieces`, one segment each, and return the next `answers` responses."""
        with Wire(self.port) as wire:
            wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for piece in pieces:
                wire.send(piece)
            return [wire.response(methods[i] if i < len(methods) else "GET") for i in range(answers)]

    def state(self) -> Any:
        """What the application has seen."""

        def told() -> Any:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/state", timeout=PATIENCE) as response:
                    return json.load(response)
            except urllib.error.HTTPError as refusal:
                if refusal.code != 408:
                    raise
                refusal.close()
            except (ConnectionError, http.client.RemoteDisconnected, urllib.error.URLError):
                if self.process.poll() is not None:
                    raise
            return None  # we were too slow for its short deadlines: once more

        return wait_until("the application's state", told)

    def terminate(self) -> Any:
        """Stop the server gracefully; its last state. Fails unless it exits with 0."""
        self.process.terminate()
        out, _ = self.process.communicate(timeout=2 * PATIENCE)
        assert self.process.returncode == 0
        return json.loads(out)

"""A stream beside bodies of 20 MB: what they add to its pauses, against the same stream without them in the same test."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.doubles.flow_site import PATHS, Wire, asking, ledger
from tests.doubles.gateway import KEY, GatewayProcess
from tests.doubles.machine import patience
from tests.doubles.vllm import VllmDouble

MEGABYTE = 1024 * 1024
BODY_BYTES = 20_000_000  # the default limit is 20 MiB
BODIES = 3  # one behind the other, on connections of their own
ADDED_SECONDS = 0.020
ROUNDS = 12
QUIET_SECONDS = 0.6


class Sink:
    """An engine that reads bodies as cheaply as can be, so that what is measured is the gateway: it answers `{}`."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.longest = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(ConnectionError):  # the gateway's polls may be given up
            while request := connection.recv(65536):
                head, _, rest = request.partition(b"\r\n\r\n")
                size = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
                left = size - len(rest)
                while left > 0:
                    left -= len(connection.recv(min(left, MEGABYTE)))
                self.longest = max(self.longest, size)
                card = {"id": "large", "object": "model", "max_model_len": 100_000}
                told = {"data": [card]} if head.startswith(b"GET") else {}
                body = json.dumps(told).encode()
                status = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: "
                connection.sendall(status + str(len(body)).encode() + b"\r\n\r\n" + body)


@pytest.fixture(scope="module")
def gateway() -> Iterator[tuple[GatewayProcess, Sink]]:
    sink = Sink()
    with VllmDouble(max_model_len=1_000_000) as engine:
        backends = [
            {"name": "small", "url": engine.url, "models": ["double"]},
            {"name": "large", "url": sink.url, "models": ["large"]},
        ]
        with GatewayProcess(BACKENDS=json.dumps(backends)) as running:
            yield running, sink
    sink.listener.close()


def large(kind: str, folder: Path) -> tuple[str, str, Path]:
    """Route, content type and file of a body of 20 MB."""
    file = folder / kind
    if kind == "sound":
        head = '--cut\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        tail = '\r\n--cut\r\nContent-Disposition: form-data; name="model"\r\n\r\nlarge\r\n--cut--\r\n'
        file.write_bytes(head.encode() + bytes(BODY_BYTES) + tail.encode())
        return "/v1/audio/transcriptions", "multipart/form-data; boundary=cut", file
    image = "data:image/png;base64," + "iVBORw0KGgoAAAANSUhEUgAAA/E+" * (BODY_BYTES // 4 // 28)
    parts = [{"type": "image_url", "image_url": {"url": image}} for _ in range(4)]
    content = [*parts, {"type": "text", "text": "what?"}]
    if kind == "images of PHP":  # whose slashes are escaped
        image = image[: len(image) * 28 // 29]
    body = json.dumps({"model": "large", "messages": [{"role": "user", "content": content}], "max_tokens": 2})
    file.write_text(body.replace("/", "\\/") if kind == "images of PHP" else body)
    return PATHS["chat"], "application/json", file


def longest_pause(gateway: GatewayProcess, bodies: tuple[str, str, Path] | None) -> float:
    """Seconds between two pieces of a stream, at most, while large bodies are sent as other calls."""
    arrivals: list[float] = []
    senders: subprocess.Popen[bytes] | None = None
    ends = time.monotonic() + QUIET_SECONDS
    with Wire(gateway.port, PATHS["chat"], asking("chat", "tokens=20000,pace_ms=5", stream=True)) as stream:
        while senders.poll() is None if senders else time.monotonic() < ends:
            assert stream.socket.recv(65536)
            arrivals.append(time.monotonic())
            if bodies is not None and senders is None and len(arrivals) > 5:
                senders = send(gateway, *bodies)
    assert senders is None or senders.returncode == 0
    return max(later - earlier for earlier, later in itertools.pairwise(arrivals))


def send(gateway: GatewayProcess, path: str, content_type: str, file: Path) -> subprocess.Popen[bytes]:
    """Send the file several times from another process, which gives way to all others; it ends with 0 if all was well."""
    program = (
        "import http.client,os,sys; os.nice(10); data=open(sys.argv[5],'rb').read(); good=True\n"
        "for _ in range(int(sys.argv[6])):\n"
        " c=http.client.HTTPConnection('127.0.0.1',int(sys.argv[1]),timeout=30)\n"
        " c.request('POST',sys.argv[3],data,{'content-type':sys.argv[4],'authorization':'Bearer '+sys.argv[2]})\n"
        " r=c.getresponse(); r.read(); good=good and r.status==200; c.close()\n"
        "sys.exit(not good)"
    )
    arguments = [str(gateway.port), KEY, path, content_type, str(file), str(BODIES)]
    return subprocess.Popen([sys.executable, "-c", program, *arguments])


@pytest.mark.parametrize("kind", ["images", "images of PHP", "sound"])
def test_bodies_of_20_mb_hold_up_no_stream(gateway: tuple[GatewayProcess, Sink], tmp_path: Path, kind: str) -> None:
    """Rounds with and without them take turns. What the gateway adds it adds every time; what the machine adds comes
    and goes, so the best round of each kind is compared. That no step of the gateway takes longer, whatever the machine
    does, is proven in processor time (test_large_body)."""
    running, sink = gateway
    body = large(kind, tmp_path)
    quiet, disturbed = [], []
    for _ in range(ROUNDS):
        quiet.append(longest_pause(running, None))
        disturbed.append(longest_pause(running, body))
        if min(disturbed) - min(quiet) < patience(ADDED_SECONDS) and len(quiet) >= 2:
            break
    told = [f"{seconds * 1000:.1f}" for seconds in (min(quiet), min(disturbed))]
    print(f"{kind}: longest pause {told[0]} ms without, {told[1]} ms with them; {len(quiet)} rounds")

    assert sink.longest >= 0.99 * BODY_BYTES
    assert min(disturbed) - min(quiet) < patience(ADDED_SECONDS), (quiet, disturbed)


def test_a_large_body_reaches_the_engine_as_it_was_sent(tmp_path: Path) -> None:
    """The double keeps a digest of what it got: every field byte for byte."""
    _, _, file = large("images", tmp_path)
    sent = file.read_bytes().replace(b'"large"', b'"double"', 1)
    with VllmDouble(max_model_len=100_000_000) as engine, GatewayProcess(VLLM_URL=engine.url) as gateway:
        answer = gateway.post(PATHS["chat"], sent, x_request_id="large-and-whole")

        assert answer.status == 200, answer.body
        got = engine.requests()[-1]
        messages = json.dumps(json.loads(sent)["messages"])
        expected = f'{{"model":"double","messages":{messages},"max_tokens":2}}'
        assert got["body_sha256"] == hashlib.sha256(expected.encode()).hexdigest()
        row = ledger(gateway, "large-and-whole")
        assert (row["outcome"], row["prompt_tokens"]) == ("ok", got["prompt_tokens"])

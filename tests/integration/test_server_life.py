"""Connections over time: clients that leave, read slowly, send slowly or not at all, and the server's end."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from tests.doubles.waiting import PATIENCE, wait_until
from tests.integration.server_client import Server, Wire

GET = b"GET /echo HTTP/1.1\r\nHost: test\r\n\r\n"


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode()


@pytest.fixture
def quick() -> Iterator[Server]:
    """Short deadlines."""
    bounds = {"head_seconds": 0.3, "idle_seconds": 0.6, "body_stall_seconds": 0.3, "body_seconds": 1.0}
    with Server("fast", **bounds, write_stall_seconds=0.5, linger_seconds=0.3, sweep_seconds=0.02) as server:
        yield server


@pytest.fixture(scope="module")
def fast() -> Iterator[Server]:
    with Server("fast") as server:
        yield server


def test_an_end_that_the_head_did_not_announce_follows_the_last_byte_at_once() -> None:
    """A client that keeps connections must not send its next request into a connection that is about to be reset."""
    with Server("fast") as server, Wire(server.port) as wire:
        wire.send(get("/last-of-all"))

        response = wire.response()

        assert response is not None
        assert (response.body, response.whole) == (b"last", True)
        assert wire.ended()
        assert server.state()["running"] == 1, "the application has not returned"
        server.talk(get("/release"))


# Slow and silent clients


@pytest.mark.parametrize("sent", [b"", b"GET", GET[:-2], b"\r", b"\r\n\r\n"])
def test_slow_head(quick: Server, sent: bytes) -> None:
    with Wire(quick.port) as wire:
        wire.send(sent)
        response = wire.response()
        if sent.strip():
            assert response is not None
            assert response.status == 408
            assert response.json()["error"]["code"] == "invalid_request"
        else:
            assert response is None
        assert wire.ended()
    wait_until("no call began", lambda: quick.state()["seen"] == [])


def test_dripping_head_is_not_kept_alive_by_its_drops(quick: Server) -> None:
    """Slowloris: a byte now and then must not extend the time for a head."""
    with Wire(quick.port) as wire:
        wire.socket.settimeout(0.02)
        for byte in GET[:-2] * 3:
            wire.send(bytes([byte]))
            try:
                if answer := wire.socket.recv(100):
                    assert b" 408 " in answer
                    return
            except TimeoutError:
                continue
            except ConnectionResetError:
                return
    pytest.fail("the connection lived on drops")


def test_idle_connection_is_closed_after_its_time(quick: Server) -> None:
    with Wire(quick.port) as wire:
        wire.send(GET)
        assert wire.response() is not None
        assert wire.ended()


@pytest.mark.parametrize("framing", [b"Content-Length: 10\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n3\r\nab"])
def test_slow_body(quick: Server, framing: bytes) -> None:
    with Wire(quick.port) as wire:
        wire.send(b"POST /echo HTTP/1.1\r\nHost: test\r\n" + framing)
        response = wire.response("POST")
        assert response is not None
        assert response.status == 408
        assert wire.ended()
    wait_until("the application was told", lambda: quick.state()["gone"] == 1 and not quick.state()["running"])


def test_unread_rest_of_a_body_does_not_hold_the_connection(quick: Server) -> None:
    with Wire(quick.port) as wire:
        wire.send(b"POST /early HTTP/1.1\r\nHost: test\r\nContent-Length: 100\r\n\r\nabc")
        response = wire.response("POST")
        assert response is not None
        assert response.status == 401
        assert wire.ended()


def test_client_that_does_not_read_slows_the_application_then_loses_the_connection(quick: Server) -> None:
    with Wire(quick.port) as wire:
        wire.send(get("/stream?n=8192&size=65536"))  # 512 MB
        wait_until("the stall was given up", lambda: quick.state()["seen"] and quick.state()["running"] == 0)
        assert rss(quick) < 200_000_000, "the answer was buffered"
        assert wire.ended()


def test_slow_reader_slows_only_itself(fast: Server) -> None:
    with Wire(fast.port) as slow:
        slow.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.send(get("/stream?n=2000&size=65536"))
        wait_until("the stream runs", lambda: fast.state()["running"] == 1)
        for _ in range(20):
            response = fast.talk(GET)[0]
            assert response is not None
        sent = fast.state()["sent"]
        assert sent < 2000 * 65536, "the application was not slowed"
        assert rss(fast) < 200_000_000
    wait_until("the slow reader's call ended", lambda: fast.state()["running"] == 0)


def rss(server: Server) -> int:
    """Resident bytes of the server."""
    with open(f"/proc/{server.process.pid}/statm") as file:
        return int(file.read().split()[1]) * 4096


def places(server: Server) -> int:
    """How many open files its table has room for."""
    with open(f"/proc/{server.process.pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("FDSize:"))


def test_table_of_open_files_does_not_grow_while_connections_come(fast: Server) -> None:
    """Growing it stops a process that has threads for 6 to 19 ms."""
    before = places(fast)

    with contextlib.ExitStack() as many:
        for _ in range(600):
            many.enter_context(Wire(fast.port))
        files = f"/proc/{fast.process.pid}/fd"
        wait_until("600 connections are there", lambda: len(os.listdir(files)) > 600)
        assert places(fast) == before


def test_body_waits_for_the_application(fast: Server) -> None:
    """Back-pressure from the application to the client: the unread body stays in the sockets."""
    with Wire(fast.port) as wire:
        wire.socket.setblocking(False)
        wire.socket.sendall(b"POST /wait HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n" % 20_000_000)
        sent = 0

        def full() -> bool:
            nonlocal sent
            try:
                sent += wire.socket.send(b"x" * 65536)
            except BlockingIOError:
                return True
            return False

        wait_until("the sockets are full", full)
        assert sent < 20_000_000
        assert rss(fast) < 200_000_000
        assert fast.state()["read"] == 0
        wire.socket.settimeout(PATIENCE)
        fast.talk(get("/release"))
        wire.socket.sendall(b"x" * (20_000_000 - sent))
        response = wire.response("POST")
        assert response is not None
        assert response.json()["length"] == 20_000_000


# Clients that leave


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
@pytest.mark.parametrize("kind", ["fast", "stock"])
def test_application_learns_that_the_client_left(kind: str, how: str) -> None:
    with Server(kind) as server, Wire(server.port) as wire:
        wire.send(get("/hang"))
        wait_until("the call hangs", lambda: server.state().get("hanging") == 1)
        if how == "half-close":
            wire.socket.shutdown(socket.SHUT_WR)
        else:
            if how == "reset":
                wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            wire.socket.close()
        wait_until("the application knows", lambda: server.state()["gone"] == 1)
        assert server.state()["callbacks"] == (1 if kind == "fast" else 0)


LARGE = b"POST /hang HTTP/1.1\r\nHost: a\r\nContent-Length: 200000\r\n\r\n" + b"x" * 200_000
NEXT = b"GET /echo HTTP/1.1\r\nHost: a\r\n\r\n"
WITH_MORE_THAN_IS_BUFFERED = {
    "large body": LARGE,
    "chunked body": b"POST /hang HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"30d40\r\n" + b"x" * 200_000 + b"\r\n0\r\n\r\n",
    "many requests behind": b"GET /hang HTTP/1.1\r\nHost: a\r\n\r\n" + NEXT * 20_000,
    "many requests behind a large body": LARGE + NEXT * 20_000,
}  # fmt: skip


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("sent", WITH_MORE_THAN_IS_BUFFERED)
def test_client_that_sent_more_than_is_buffered_is_seen_to_leave(sent: str, how: str) -> None:
    with Server("fast", sweep_seconds=0.1) as server:
        wire = Wire(server.port)
        wire.send(WITH_MORE_THAN_IS_BUFFERED[sent])
        wait_until("the application waits", lambda: server.state().get("hanging"))
        if how == "rst":
            wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wire.socket.close()
        wait_until("the application learns it", lambda: server.state()["gone"] == 1)


def test_requests_behind_one_that_takes_long_are_answered_in_order() -> None:
    count = 10_000  # several times what is buffered
    with Server("fast") as server, Wire(server.port) as wire, Wire(server.port) as other:
        sender = threading.Thread(target=wire.send, args=[b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n" + NEXT * count])
        sender.start()
        time.sleep(0.3)
        other.send(b"GET /release HTTP/1.1\r\nHost: a\r\n\r\n")
        assert other.response() is not None
        answers = [wire.response() for _ in range(count + 1)]
        sender.join()
    assert [answer.json()["path"] for answer in answers if answer] == ["/wait"] + ["/echo"] * count


def test_client_that_leaves_in_its_body(fast: Server) -> None:
    before = fast.state()["gone"]
    with Wire(fast.port) as wire:
        wire.send(b"POST /echo HTTP/1.1\r\nHost: test\r\nContent-Length: 10\r\n\r\nabc")
    wait_until("the application knows", lambda: fast.state()["gone"] == before + 1)


def test_disconnect_callback_does_not_run_after_a_whole_answer(fast: Server) -> None:
    before = fast.state()["callbacks"]
    for _ in range(20):
        assert fast.talk(GET)[0] is not None
    assert fast.state()["callbacks"] == before


# The server's end


@pytest.mark.parametrize("kind", ["fast", "stock"])
def test_running_answers_are_finished_at_shutdown_and_idle_connections_closed(kind: str) -> None:
    with Server(kind) as server, Wire(server.port) as idle, Wire(server.port) as busy, Wire(server.port) as late:
        # A call in the middle of its body: its last byte, sent after the stop has begun, lets the stream end.
        late.send(b"POST /release HTTP/1.1\r\nHost: test\r\nContent-Length: 2\r\n\r\nx")
        wait_until("the release was accepted", lambda: "POST /release" in server.state()["seen"])
        idle.send(GET)
        assert idle.response() is not None
        busy.send(get("/held-stream"))
        wait_until("the stream runs", lambda: server.state()["running"] == 2)
        server.process.terminate()
        assert idle.ended()
        late.send(b"y")
        response = late.response("POST")
        assert response is not None
        assert response.headers.get("connection") == ("close" if kind == "fast" else None)
        response = busy.response()
        assert response is not None
        assert (response.body, response.whole) == (b"firstlast", True)
        assert busy.ended()
        out, _ = server.process.communicate(timeout=2 * PATIENCE)
        assert server.process.returncode == 0
        assert b'"lifespan": "over"' in out


def test_calls_that_do_not_end_are_cancelled_after_the_graceful_time() -> None:
    """DRAIN_SECONDS is 0 here, so Hypercorn waits 5 s."""
    with Server("fast") as server, Wire(server.port) as wire:
        wire.send(get("/held-stream"))
        wait_until("the stream runs", lambda: server.state()["running"] == 1)
        state = server.terminate()
        assert state["running"] == 0
        response = wire.response()
        assert response is None or not response.whole

"""A process that serves a small ASGI application through `gateway.server.serve`, for tests of the server itself.

`python -m tests.doubles.asgi_server fast|stock [bounds as JSON]` prints its port; SIGTERM drains and stops it.
The path chooses what the application does; `/state` tells what it has seen.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import sys
from typing import Any
from urllib.parse import parse_qs

import uvloop

from gateway.bounds import Bounds
from gateway.server import serve
from gateway.settings import load

STATE: dict[str, Any] = {"seen": [], "gone": 0, "callbacks": 0, "sent": 0, "errors": [], "running": 0, "read": 0}
release = asyncio.Event()


async def read_body(receive: Any) -> bytes | None:
    """The body, or None if the client left."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message["body"]
        STATE["read"] += len(message["body"])
        if not message["more_body"]:
            return body


async def answer(send: Any, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    """A whole JSON answer."""
    fixed = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
    await send({"type": "http.response.body", "body": body})


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Tell what was understood of the request."""
    body = await read_body(receive)
    if body is None:
        STATE["gone"] += 1
        return
    told = {
        "method": scope["method"],
        "path": scope["path"],
        "raw_path": scope["raw_path"].decode("ascii"),
        "query": scope["query_string"].decode("ascii"),
        "version": scope["http_version"],
        "headers": sorted((n.decode("latin-1"), v.decode("latin-1")) for n, v in scope["headers"]),
        "length": len(body),
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    await answer(send, 200, json.dumps(told).encode())


async def stream(scope: Any, receive: Any, send: Any) -> None:
    """`n` chunks of `size` bytes."""
    query = parse_qs(scope["query_string"].decode())
    n, size = int(query.get("n", ["3"])[0]), int(query.get("size", ["10"])[0])
    if await read_body(receive) is None:
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    for number in range(n):
        await send({"type": "http.response.body", "body": bytes([97 + number % 26]) * size, "more_body": True})
        STATE["sent"] += size
    await send({"type": "http.response.body", "body": b""})


async def hang(scope: Any, receive: Any, send: Any) -> None:
    """Answer nothing until the client goes."""
    await read_body(receive)
    exchange = scope["extensions"].get("gateway.exchange")
    if exchange is not None:
        exchange.on_disconnect(lambda: STATE.__setitem__("callbacks", STATE["callbacks"] + 1))
    STATE["hanging"] = STATE.get("hanging", 0) + 1
    while (await receive())["type"] != "http.disconnect":
        pass
    STATE["gone"] += 1


async def application(scope: Any, receive: Any, send: Any) -> None:
    """The ASGI callable."""
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        STATE["lifespan"] = "over"
        await send({"type": "lifespan.shutdown.complete"})
        return
    path = scope["path"]
    if path != "/state":
        STATE["seen"].append(f"{scope['method']} {path}")
        STATE["running"] += 1
    try:
        await route(path, scope, receive, send)
    except (ValueError, RuntimeError) as error:
        STATE["errors"].append(str(error))
        raise
    finally:
        if path != "/state":
            STATE["running"] -= 1


async def route(path: str, scope: Any, receive: Any, send: Any) -> None:
    """What each path does."""
    start: dict[str, Any] = {"type": "http.response.start", "status": 200, "headers": []}
    if path == "/state":
        await answer(send, 200, json.dumps(STATE).encode())
    elif path == "/stream":
        await stream(scope, receive, send)
    elif path == "/hang":
        await hang(scope, receive, send)
    elif path == "/early":
        await answer(send, 401, b'{"error":"early"}')
    elif path == "/wait":  # reads nothing until /release
        await release.wait()
        await echo(scope, receive, send)
    elif path == "/release":
        await read_body(receive)
        release.set()
        await answer(send, 200, b"{}")
    elif path == "/held-stream":  # one chunk, then the rest after /release
        await send(start)
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await release.wait()
        await send({"type": "http.response.body", "body": b"last"})
    elif path == "/crash":
        raise ValueError("crashed on purpose")
    elif path == "/nothing":
        pass
    elif path == "/cut":
        await send(start)
        await send({"type": "http.response.body", "body": b"part", "more_body": True})
        raise ValueError("cut on purpose")
    elif path == "/short":
        await send({**start, "headers": [(b"content-length", b"100")]})
        await send({"type": "http.response.body", "body": b"part"})
    elif path == "/long":
        await send({**start, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"too long"})
    elif path == "/no-content":
        await send({**start, "status": 204})
        await send({"type": "http.response.body", "body": b""})
    elif path == "/close":
        exchange = scope["extensions"].get("gateway.exchange")
        if exchange is not None:
            exchange.close_after()
        await answer(send, 200, b"{}", *(() if exchange else ((b"connection", b"close"),)))
    elif path == "/last-of-all":  # ends the connection after a head that does not say so, and returns after /release
        await send(start)
        scope["extensions"]["gateway.exchange"].close_after()
        await send({"type": "http.response.body", "body": b"last"})
        await release.wait()
    elif path == "/inject":
        value = parse_qs(scope["query_string"].decode("latin-1"), encoding="latin-1")
        name = value.get("name", ["x-a"])[0].encode("latin-1")
        await answer(send, 200, b"{}", (name, value.get("value", ["b"])[0].encode("latin-1")))
    else:
        await echo(scope, receive, send)


async def main() -> None:
    """Serve until SIGTERM."""
    shutdown = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, shutdown.set)
    environment = {"GATEWAY_PORT": "0", "GATEWAY_SERVER": sys.argv[1], "DRAIN_SECONDS": "0"}
    bounds = Bounds(**json.loads(sys.argv[2])) if len(sys.argv) > 2 else None
    settings = load(environment)
    await serve(application, settings, shutdown, lambda found: print(found[0][1], flush=True), bounds)
    print(json.dumps(STATE), flush=True)


if __name__ == "__main__":
    uvloop.run(main())

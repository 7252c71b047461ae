"""What stands behind nginx in the edge's tests: tells what reached it, streams on a schedule, fails on request.

A process of its own (`python tests/doubles/edge_upstream.py`): it prints its port as the first line.
"""

from __future__ import annotations

import asyncio
import json
import sys

from aiohttp import web

STEPS = asyncio.Semaphore(0)


async def told(request: web.Request) -> web.Response:
    """Everything that arrived, as JSON."""
    body = await request.read()
    return web.json_response(
        {"path": request.raw_path, "headers": dict(request.headers), "body_bytes": len(body), "method": request.method}
    )


async def stream(request: web.Request) -> web.StreamResponse:
    """`chunks` SSE events, `gap` seconds apart; with `steps`, each but the first only once `/v1/step` has been asked for."""
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(request)
    for number in range(int(request.query.get("chunks", "10"))):
        if number and "steps" in request.query:
            await STEPS.acquire()
        await answer.write(f"data: {json.dumps({'number': number})}\n\n".encode())
        await asyncio.sleep(float(request.query.get("gap", "0.02")))
    await answer.write(b"data: [DONE]\n\n")
    return answer


async def step(request: web.Request) -> web.Response:
    """One event more of the stream that goes by steps."""
    STEPS.release()
    return web.Response()


async def named(request: web.Request) -> web.Response:
    """A refusal as the gateway makes it, with its own id and advice."""
    error = {"message": "no", "type": "rate_limit_error", "code": "quota_exhausted", "param": None}
    return web.Response(
        body=json.dumps({"error": error}).encode(),
        status=int(request.query.get("status", "429")),
        headers={"content-type": "application/json", "x-request-id": "from-the-gateway", "retry-after": "77"},
    )


async def hold(request: web.Request) -> web.Response:
    """Answers only when the client is patient; says when it was left."""
    try:
        await asyncio.sleep(float(request.query.get("seconds", "30")))
    except asyncio.CancelledError:
        print("left", flush=True)
        raise
    return web.Response(text="late")


async def drop(request: web.Request) -> web.Response:
    """Closes without an answer."""
    assert request.transport is not None
    request.transport.close()
    return web.Response()


def application() -> web.Application:
    """All routes; unknown ones tell what arrived too, so that nothing slips through unseen."""
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/v1/stream", stream)
    app.router.add_route("*", "/v1/step", step)
    app.router.add_route("*", "/v1/refused", named)
    app.router.add_route("*", "/v1/hold", hold)
    app.router.add_route("*", "/v1/drop", drop)
    app.router.add_route("*", "/{rest:.*}", told)
    return app


async def serve() -> None:
    """Serve until standard input closes."""
    runner = web.AppRunner(application(), handler_cancellation=True, keepalive_timeout=75)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(serve())

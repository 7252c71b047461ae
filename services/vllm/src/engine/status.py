"""The supervisor's page: `/status` for people and scripts, `/ready` for the gateway, `/health`, `/metrics`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aiohttp import web
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from engine.metrics import Metrics


class StatusServer:
    """Answers from what the supervisor says now; changes nothing."""

    def __init__(self, status: Callable[[], dict[str, Any]], metrics: Metrics) -> None:
        self._status = status
        self._metrics = metrics
        app = web.Application()
        app.add_routes(
            [
                web.get("/status", self._show_status),
                web.get("/ready", self._ready),
                web.get("/health", self._health),
                web.get("/metrics", self._show_metrics),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None)

    async def start(self, host: str, port: int) -> int:
        """Listen; the port, which is a free one when `port` is 0. Raises `OSError` when it is taken."""
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Stop listening."""
        await self._runner.cleanup()

    async def _show_status(self, _: web.Request) -> web.Response:
        return web.json_response(self._status())

    async def _ready(self, _: web.Request) -> web.Response:
        status = self._status()
        return web.json_response(
            {key: status[key] for key in ("ready", "state", "phase", "reason")}, status=200 if status["ready"] else 503
        )

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"alive": True})

    async def _show_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

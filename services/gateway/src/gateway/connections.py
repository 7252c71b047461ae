"""What the connections of one server share: the application, bounds, one sweep for all deadlines, the drain."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

    from gateway.bounds import Bounds
    from gateway.exchange import Application, Exchange
    from gateway.head import Head
    from gateway.protocol import Connection

    Relay = Callable[[Exchange, Head, tuple[str, int] | None], Awaitable[None] | None]


class Connections:
    """All connections of one server: the application they serve, their bounds, their sweep, their drain."""

    def __init__(self, application: Application, bounds: Bounds) -> None:
        self.application = application
        # An application may take requests without ASGI's scope and messages: `relay` returns its coroutine, or None.
        self.relay: Relay | None = getattr(application, "relay", None)
        self.bounds = bounds
        self.draining = False
        self.open: set[Connection] = set()
        self.unread: set[Connection] = set()  # not read for now: an end of file does not show by itself
        self._sweeper: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin the sweep."""
        self._sweep(loop)

    def stop(self) -> None:
        """End the sweep."""
        if self._sweeper is not None:
            self._sweeper.cancel()

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for connection in [c for c in self.open if c.deadline < now]:
            connection.expire()
        for connection in [c for c in self.unread if c.left()]:
            connection.abort()
        self._sweeper = loop.call_later(self.bounds.sweep_seconds, self._sweep, loop)

    def drain(self) -> None:
        """No further request on any connection: idle ones close now, the others after their answer."""
        self.draining = True
        for connection in list(self.open):
            connection.close_if_idle()

"""Hypercorn: its configuration, and our connection protocol in the one place where it picks a connection class.

Hypercorn keeps the sockets, the lifespan and the graceful stop. `GATEWAY_SERVER=fast` answers connections with
`protocol.Connection` (httptools), `stock` with Hypercorn's own classes; docs/decisions/0200 says why and what differs.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import resource
import sys
from collections.abc import Callable
from typing import Any

import hypercorn.asyncio.run as hypercorn_run
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.asyncio.run import worker_serve
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.config import Config
from loguru import logger

from gateway import kernel
from gateway.bounds import MOST_CONNECTIONS, Bounds
from gateway.connections import Connections
from gateway.exchange import Application
from gateway.protocol import Connection
from gateway.settings import Settings

HYPERCORN_VERSION = "0.18.0"  # measured and differentially tested; another may pick its connection class elsewhere
BODY_SLACK_BYTES = 1_048_576
# The ledger's writer thread wants Python's lock after each statement, and a busy event loop keeps it for this long.
# With the default of 5 ms a commit takes tens of milliseconds; measured with 16 connections: half the latency.
SWITCH_SECONDS = 0.0005
OTHER_FILES = 64  # what is open beside clients and engines
MOST_FILES = 2 * MOST_CONNECTIONS + OTHER_FILES
CANCEL_SECONDS = 5.0  # what a cancelled call gets to settle before the process goes on stopping
_StockServer = TCPServer


class ServerLog:
    """Hypercorn's log interface on the gateway's log. Its access log is not ours: one line a call is enough."""

    def __init__(self, config: Config) -> None:
        pass

    async def access(self, request: Any, response: Any, request_time: float) -> None:
        """Nothing: building Hypercorn's access line costs 30 % of the calls a second."""

    async def critical(self, message: str, *args: Any, **kwargs: Any) -> None:
        """Log at this level."""
        logger.critical("server_log", text=message)

    async def error(self, message: str, *args: Any, **kwargs: Any) -> None:
        """Log at this level."""
        logger.error("server_log", text=message)

    async def warning(self, message: str, *args: Any, **kwargs: Any) -> None:
        """Log at this level."""
        logger.warning("server_log", text=message)

    async def info(self, message: str, *args: Any, **kwargs: Any) -> None:
        """Log at this level."""
        logger.info("server_log", text=message)

    async def debug(self, message: str, *args: Any, **kwargs: Any) -> None:
        """Log at this level."""
        logger.debug("server_log", text=message)

    async def exception(self, message: str, *args: Any, **kwargs: Any) -> None:
        """Log with the running exception."""
        logger.opt(exception=True).error("server_log", text=message)


class ServerConfig(Config):
    """Hypercorn's configuration with our registry of connections; None means stock connections."""

    connections: Connections | None = None


def configuration(settings: Settings) -> ServerConfig:
    """Hypercorn's configuration. Each line is a default of Hypercorn that bites."""
    config = ServerConfig()
    host = f"[{settings.gateway_host}]" if ":" in settings.gateway_host else settings.gateway_host
    config.bind = [f"{host}:{settings.gateway_port}"]
    config.logger_class = ServerLog  # type: ignore[assignment]  # not a subclass: Hypercorn's opens handlers
    config.accesslog = None  # 30 % of the calls a second; the gateway writes its own line
    config.include_server_header = False  # no version for strangers
    config.backlog = 4096  # 100 drops connections in the first burst
    # Must outlive nginx's idle upstream connections (60 s): else nginx picks one that is closing, and answers 502.
    config.keep_alive_timeout = 75.0
    config.keep_alive_max_requests = 1_000_000  # 1,000 makes nginx reconnect all day
    # After the gateway's own drain has ended every call, so that calls end by an event of ours and not by a cut.
    # 3 s by default. Compose's stop_grace_period must be longer than this and shutdown_timeout together.
    config.graceful_timeout = settings.drain_seconds + 5.0
    config.shutdown_timeout = 30.0  # ledger and traces are flushed in it
    config.startup_timeout = 60.0
    config.read_timeout = None  # would cut a stream whose client has nothing more to say
    config.max_app_queue_size = 10  # request body messages that wait for the application (stock)
    config.h11_max_incomplete_size = 32_768  # as head.HEAD_BYTES, so that both servers take the same heads
    config.websocket_max_message_size = 1  # there are no websockets here
    return config


def raise_file_limit() -> int:
    """Raise the soft limit of open files to the hard one and return it: a stream takes two."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = 1_048_576
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


class FastServer(_StockServer):
    """Hypercorn's connection task when `protocol.Connection` has taken over the transport."""

    async def run(self) -> None:
        """Hand the transport over and wait for the connection's end."""
        transport: Any = self.writer.transport
        streams = transport.get_protocol()
        connection = Connection(self.config.connections, self.loop)  # type: ignore[attr-defined]
        ended = self.reader.at_eof()
        transport.set_protocol(connection)
        connection.connection_made(transport)
        # Bytes that came before this task ran are in the stream reader; at its end of file reading never waits.
        self.reader.feed_eof()
        early = await self.reader.read()
        streams.connection_lost(None)  # for asyncio's streams it ends here: they refer to each other until they hear so
        if not transport.is_reading() and not transport.is_closing():
            transport.resume_reading()  # the stream reader paused it because of a large body, or it is at its end
        if early:
            connection.data_received(early)
        elif ended:
            transport.close()
        try:
            await connection.closed
        except asyncio.CancelledError:  # Hypercorn's graceful timeout passed
            task = connection.cancel()
            if task is not None:
                await asyncio.wait((task,), timeout=CANCEL_SECONDS)
            raise


def _pick(app: Any, loop: Any, config: Any, context: Any, state: Any, reader: Any, writer: Any) -> TCPServer:
    kind = FastServer if getattr(config, "connections", None) is not None else _StockServer
    return kind(app, loop, config, context, state, reader, writer)


def _install() -> None:
    found = importlib.metadata.version("hypercorn")
    if found != HYPERCORN_VERSION or vars(hypercorn_run)["TCPServer"] not in (_StockServer, _pick):
        raise RuntimeError(f"Hypercorn {HYPERCORN_VERSION} is needed by GATEWAY_SERVER=fast, found {found}")
    vars(hypercorn_run)["TCPServer"] = _pick


def bounds_of(settings: Settings, files: int) -> Bounds:
    """The protocol's bounds. The body's lies above MAX_BODY_BYTES: the application answers first, this is the wall."""
    return Bounds(
        idle_seconds=75.0,
        body_bytes=settings.max_body_bytes + BODY_SLACK_BYTES,
        connections=max(16, (min(files, MOST_FILES) - OTHER_FILES) // 2),
    )


async def serve(
    app: Application,
    settings: Settings,
    shutdown: asyncio.Event,
    on_listening: Callable[[list[tuple[str, int]]], None],
    bounds: Bounds | None = None,
) -> None:
    """Serve `app` until `shutdown` is set and running answers have ended, or DRAIN_SECONDS + 5 s have passed.

    `on_listening` gets (host, port) of every socket once all of them accept. Must run on uvloop for speed; any loop
    works. Raises `OSError` when the address cannot be bound and `LifespanFailureError` when the application refuses
    to start. `bounds` replaces the limits that follow from `settings` (tests).
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    config = configuration(settings)
    files = raise_file_limit()
    connections: Connections | None = None
    if settings.gateway_server == "fast":
        _install()
        connections = config.connections = Connections(app, bounds or bounds_of(settings, files))
        connections.start(asyncio.get_running_loop())
    kernel.make_room_for_files(min(files, MOST_FILES))
    sockets = config.create_sockets()
    addresses = [sock.getsockname()[:2] for sock in sockets.insecure_sockets]

    async def until_shutdown() -> None:
        on_listening(addresses)  # Hypercorn waits for its trigger only after every socket accepts
        await shutdown.wait()
        if connections is not None:
            connections.drain()

    try:
        await worker_serve(ASGIWrapper(app), config, sockets=sockets, shutdown_trigger=until_shutdown)
    finally:
        if connections is not None:
            connections.stop()
        for sock in sockets.insecure_sockets:
            sock.close()

"""Forward: the exchange with the engine, relayed as bytes, ended honestly.

Before the first byte of the answer a failed connection may be tried again, on another engine or the same, within a
retry budget. After it a failure becomes one error event. Silence is judged by one sweeper for all exchanges instead of
a timer for each read: an engine that says nothing for too long is given up, and a stream that is silent for a while
gets a `: keep-alive` comment, so that proxies and people see that it lives. How long is too long depends on what the
engine does: a stream's head comes before the prompt is computed, an answer in one piece when all of it is made. Silence
is the engine's failure only where nobody else has heard from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from typing import TYPE_CHECKING, Any

from gateway import answer, charge, refused, reported, wire
from gateway.call import Outcome
from gateway.errors import ClientGone, NoBackend, UpstreamError, UpstreamTimeout
from gateway.retry_budget import MOST_RETRIES, RetryBudget
from gateway.upstream import BrokenConnection, ConnectError, Exchange, Route, Upstream

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.backends import Backend
    from gateway.call import Call
    from gateway.client import Client
    from gateway.large_body import Buffer
    from gateway.settings import Settings
    from gateway.wire import Endpoint

KEEP_ALIVE = b": keep-alive\n\n"
ANSWER_BUFFER_BYTES = 4 * 1024 * 1024  # a JSON answer up to this size is checked whole before its head is sent
END_SECONDS = 1.0  # for the end of an answer behind its last event, without which its connection is not used again
LATELY = 0.5  # of a limit: an engine that stops altogether was heard by some calls a little later than by others
_VALUE = re.compile(r"[\x20-\x7e\x80-\xff]+")


class _Silence:
    """How long one exchange has been silent, and what that means in its phase."""

    __slots__ = ("call", "client", "keep_alive_at", "limit", "ping", "quiet", "since", "what")

    def __init__(self, call: Call, limit: float, now: float) -> None:
        self.call = call
        self.client: Client | None = None  # set while comments may be sent
        self.since = now
        self.keep_alive_at = now
        self.limit = limit
        self.what = "before its first byte"
        self.quiet = True  # the relay waits for the engine, nothing is being written
        self.ping: asyncio.Task[None] | None = None


class Forward:
    """Relays calls. `start` and `close` frame its life; one per gateway.

    `finish` records a whole answer durably and gives back what the call took; it is awaited before the last bytes
    leave, so that a client's next call finds everything in order. `on_retry` counts retries.
    """

    def __init__(
        self,
        settings: Settings,
        upstream: Upstream,
        registry: Any,
        capacity: Any,
        finish: Callable[[Call], Awaitable[None]],
        on_retry: Callable[[], None],
    ) -> None:
        self._first_byte_seconds = settings.first_byte_seconds
        self._answer_seconds = settings.whole_answer_seconds
        self._idle_seconds = settings.idle_seconds
        self._keep_alive_seconds = settings.keep_alive_seconds
        self._upstream = upstream
        self._registry = registry
        self._capacity = capacity
        self._finish = finish
        self._count_retry = on_retry
        self._retries = RetryBudget(settings.retry_ratio)
        self._routes: dict[tuple[str, str], Route] = {}  # by engine and endpoint
        self._content_types: dict[str, bytes] = {}
        self._silences: set[_Silence] = set()
        self._failed_at: dict[str, float] = {}  # by engine
        self._answered_at: dict[str, float] = {}
        self._sweeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to watch for silence."""
        self._sweeper = asyncio.create_task(self._sweep())

    async def close(self) -> None:
        """Stop watching."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)

    async def _sweep(self) -> None:
        shortest = min(self._first_byte_seconds, self._idle_seconds)
        if self._keep_alive_seconds:
            shortest = min(shortest, self._keep_alive_seconds)
        period = min(0.5, shortest / 4)
        while True:
            await asyncio.sleep(period)
            now = time.perf_counter()
            for silence in list(self._silences):
                self._judge(silence, now)

    def _judge(self, silence: _Silence, now: float) -> None:
        if not silence.quiet:
            # The engine waits for the client. A reader that never comes back must not keep its place for ever.
            if now - silence.since > self._idle_seconds:
                silence.call.abort(ClientGone("The client stopped reading."))
            return
        if now - silence.since > silence.limit:
            answered_at = self._answered_at.get(silence.call.backend.name, 0.0)
            if now - max(answered_at, self._heard(silence.call)) > silence.limit * LATELY:
                self._report(silence.call, False)
            silence.call.abort(UpstreamTimeout(f"The engine said nothing for {silence.limit:g} s {silence.what}."))
        elif (
            silence.client is not None
            and (silence.ping is None or silence.ping.done())
            and self._keep_alive_seconds
            and now - max(silence.since, silence.keep_alive_at) > self._keep_alive_seconds
        ):
            silence.keep_alive_at = now
            silence.ping = asyncio.create_task(silence.client.write(KEEP_ALIVE))

    async def exchange(self, call: Call, client: Client) -> None:
        """Relay `call` to `call.backend`. Raises `GatewayError`; on any way out the engine no longer works for it."""
        assert call.request is not None
        whole = call.endpoint.metered and not call.request.stream
        limit = self._answer_seconds if whole else self._first_byte_seconds
        silence = _Silence(call, limit, time.perf_counter())
        self._silences.add(silence)
        exchange = None
        try:
            exchange = await self._open(call, client)
            silence.since = time.perf_counter()
            if exchange.status != 200:
                await self._refuse(call, exchange)
            elif exchange.content_type.startswith("text/event-stream"):
                await self._stream(call, client, exchange, silence)
            else:
                await self._whole(call, client, exchange, silence)
        except answer.OwnBound:
            if not call.usage.total:  # the usage stood in what was not relayed; the engine has computed the prompt
                charge.count_most(call, 0)
                call.note(call.usage)
            raise
        except UpstreamError:
            if exchange is not None:  # `_open` has told of its own failures
                self._report(call, False)
            raise
        finally:
            self._silences.discard(silence)
            if silence.ping is not None:
                silence.ping.cancel()
            if exchange is not None:
                exchange.close()

    def _report(self, call: Call, ok: bool) -> None:
        """Tell how the engine did. Counting tokens says nothing about what generates them, in neither direction."""
        if not call.endpoint.metered:
            return
        backend = call.backend
        if ok:
            self._answered_at[backend.name] = time.perf_counter()
            if call.grant is not None:
                call.grant.probe = False  # it has its result, and may go on for long
        else:
            failed_before = self._failed_at.get(backend.name, 0.0)
            self._failed_at[backend.name] = time.perf_counter()
            if self._heard(call) > failed_before:
                self._registry.flow(backend)
        self._registry.report(backend, ok)

    def _heard(self, call: Call) -> float:
        """When the engine of `call` last said something in another call's stream."""
        return max(
            (
                silence.since
                for silence in self._silences
                if silence.call.backend is call.backend
                and silence.call is not call
                and silence.call.first_token_at is not None
            ),
            default=0.0,
        )

    async def _open(self, call: Call, client: Client) -> Exchange:
        request = call.request
        assert request is not None
        self._retries.earn()
        failed: list[Backend] = []
        full: list[Backend] = []  # what says 503 is not asked again
        body: bytes | list[Buffer]
        while True:
            backend = call.backend
            headers = {"x-request-id": call.request_id}
            if call.trace is not None:
                headers["traceparent"] = call.trace.traceparent
            if request.endpoint.multipart:
                body = request.raw
                headers["content-type"] = client.headers.text(b"content-type")
            else:
                served = self._registry.served_name(backend, request.model)
                if request.parsed_bytes > wire.LARGE_BYTES:
                    body = await asyncio.to_thread(wire.payload, request, served)
                else:
                    body = wire.payload(request, served)
            route = self._routes.get((backend.name, request.endpoint.name)) or self._route(backend, request.endpoint)
            try:
                exchange = await self._upstream.open(route, headers, body)
            except (ConnectError, BrokenConnection) as error:
                # A call that breaks whatever it meets is one failure of an engine, however often it was tried: alone
                # it must not open a breaker for everybody.
                if backend not in failed:
                    self._report(call, False)
                failed.append(backend)
                if len(failed) + len(full) > MOST_RETRIES or not self._again(call, full):
                    if isinstance(error, ConnectError):
                        raise NoBackend("The engine cannot be reached at the moment.") from error
                    raise
                continue
            if exchange.status == 503:
                full.append(backend)
                if len(failed) + len(full) <= MOST_RETRIES and self._again(call, full):
                    exchange.close()
                    continue
            return exchange

    def _route(self, backend: Backend, endpoint: Endpoint) -> Route:
        headers = {} if endpoint.multipart else {"content-type": "application/json"}
        if backend.api_key:
            headers["authorization"] = f"Bearer {backend.api_key}"
        route = self._upstream.route("POST", backend.url + endpoint.upstream, headers)
        self._routes[backend.name, endpoint.name] = route
        return route

    def _again(self, call: Call, full: list[Backend]) -> bool:
        """Whether `call` goes out once more, to an engine that is not `full`. What goes nowhere costs no retry."""
        if not self._retries.left:
            return False
        backend = self._capacity.reroute(call, full)
        if backend is None:
            return False
        self._retries.take()
        call.backend = backend
        self._count_retry()
        return True

    async def _refuse(self, call: Call, exchange: Exchange) -> None:
        """Turn an error answer of the engine into ours. Texts of its failures are never passed on."""
        body = b""
        while part := await exchange.read():
            body += part
            if len(body) > ANSWER_BUFFER_BYTES:
                break
        raise refused.error_of(call, exchange.status, body)

    async def _stream(self, call: Call, client: Client, exchange: Exchange, silence: _Silence) -> None:
        request = call.request
        assert request is not None
        stream = answer.Stream(request, call.usage, charge.most(call))
        call.answer = stream
        silence.what = "before its first token"
        await client.start(200, self._head(call, exchange, answer.STREAM_HEAD))
        silence.client = client
        feed, push, note, usage = stream.feed, client.push, call.note, call.usage

        def take(data: bytes) -> bool:
            """Pass on what came; True when no more is wanted: the stream has ended, or the client is slower."""
            if not data:
                raise UpstreamError("The engine broke off before the end of its answer.")
            silence.since = time.perf_counter()
            try:
                ready = feed(data)
            except answer.BrokenStream as broken:
                note(usage)
                if broken.before:
                    push(broken.before)
                raise
            note(usage)  # before the client has it: whatever it was given is billed, even after `kill -9`
            if call.first_token_at is None and stream.tokens:
                call.first_token_at = silence.since
                silence.limit = self._idle_seconds
                silence.what = "in the middle of its answer"
                self._report(call, True)
            return (not push(ready) or stream.ended) if ready else stream.ended

        while not stream.ended:
            await exchange.relay(take)
            silence.quiet = False
            if silence.ping is not None:
                await silence.ping
                silence.ping = None
            await client.drained()
            silence.since = time.perf_counter()
            silence.quiet = True
        silence.client = None
        if call.first_token_at is None:  # an answer without tokens
            self._report(call, True)
        call.outcome = Outcome.OK
        await self._finish(call)
        await client.end(stream.tail)
        if stream.cut:
            return
        call.status = 200
        self._silences.discard(silence)  # the call is told and recorded: what comes now is the connection's business
        if exchange.whole:
            exchange.release()
            return
        with contextlib.suppress(UpstreamError, TimeoutError):
            async with asyncio.timeout(END_SECONDS):
                if not await exchange.read():
                    exchange.release()

    async def _whole(self, call: Call, client: Client, exchange: Exchange, silence: _Silence) -> None:
        silence.limit = self._idle_seconds
        silence.what = "in the middle of its answer"
        parts: list[bytes] = []
        size = 0
        while data := await exchange.read():
            silence.since = time.perf_counter()
            parts.append(data)
            if exchange.whole:
                break
            size += len(data)
            if size > ANSWER_BUFFER_BYTES:
                await self._large(call, client, exchange, silence, parts)
                return
        exchange.release()
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        assert call.request is not None
        if not reported.note_body(call.usage, body) and not call.request.endpoint.multipart:
            raise UpstreamError("The engine's answer is not JSON.")  # transcriptions can also be plain text
        if call.usage.known:
            charge.keep_to_hold(call)
        else:
            charge.count_most(call, len(body))
        call.note(call.usage)
        self._report(call, True)
        call.first_token_at = silence.since
        call.outcome = Outcome.OK
        await self._finish(call)
        await client.respond(200, self._head(call, exchange, answer.HEAD), body)

    async def _large(
        self, call: Call, client: Client, exchange: Exchange, silence: _Silence, parts: list[bytes]
    ) -> None:
        """Relay a large JSON answer, always one piece behind, so that its last byte waits for the ledger."""
        self._report(call, True)  # before the client is waited for
        await client.start(200, self._head(call, exchange, answer.HEAD))
        call.first_token_at = silence.since
        pending = b"".join(parts)
        charge.count_most(call, len(pending))  # until its usage is found: the engine has done the work
        search = reported.Search(call.usage)
        search.look(pending)
        while True:
            if call.usage.known:
                charge.keep_to_hold(call)
            call.note(call.usage)
            silence.quiet = True
            data = await exchange.read()
            silence.quiet = False
            silence.since = time.perf_counter()
            if not data:
                break
            search.look(data)
            await client.write(pending)
            pending = data
        exchange.release()
        call.outcome = Outcome.OK
        await self._finish(call)
        await client.end(pending)

    def _head(self, call: Call, exchange: Exchange, form: bytes) -> bytes:
        name = exchange.content_type
        content_type = self._content_types.get(name)
        if content_type is None:
            # What an engine says may not end a line.
            content_type = name.encode("latin-1") if _VALUE.fullmatch(name) else b"application/octet-stream"
            if len(self._content_types) < 64:
                self._content_types[name] = content_type
        return form % (content_type, call.request_id.encode(), call.server_timing(), call.limit_lines)

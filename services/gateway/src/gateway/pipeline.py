"""The six stages in their order, one call a task, one `finally`. Outcomes are decided and errors rendered only here."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from typing import TYPE_CHECKING, Any

from gateway import answer, multipart, wire
from gateway.call import Call, Outcome, Priority
from gateway.errors import (
    CallerError,
    CapacityError,
    ClientGone,
    GatewayError,
    InternalError,
    InvalidApiKey,
    InvalidRequest,
    KeyDisabled,
    KeyExpired,
    LedgerUnavailable,
    QueueFull,
    ShuttingDown,
)
from gateway.large_body import LargeBodies

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.client import Client
    from gateway.settings import Settings
    from gateway.wire import Endpoint, Request

BODY_SECONDS = 60.0  # time to send a body; nginx has read it whole before, so only direct callers can be slow


class Pipeline:
    """Runs calls. `calls` are those under way; `draining` refuses new ones."""

    def __init__(
        self,
        settings: Settings,
        *,
        registry: Any,
        prompt_counter: Any,
        auth: Any,
        budget: Any,
        capacity: Any,
        forward: Any,
        ledger: Any,
        telemetry: Any,
    ) -> None:
        self._max_body_bytes = settings.max_body_bytes
        self._bodies_in_flight_bytes = settings.bodies_in_flight_bytes
        self._registry = registry
        self._prompt_counter = prompt_counter
        self._auth = auth
        self._budget = budget
        self._capacity = capacity
        self._forward = forward
        self._ledger = ledger
        self._telemetry = telemetry
        self._caps = wire.Caps(
            n=settings.max_n,
            logprobs=settings.max_logprobs,
            output_tokens=settings.max_output_tokens,
            prompts=settings.max_prompts,
            inputs=settings.max_inputs,
            media=settings.max_media,
            media_tokens=settings.media_tokens,
            remote_media=settings.remote_media,
        )
        self._body_bytes = 0
        self._large = LargeBodies()
        self.calls: dict[str, Call] = {}
        self.draining = False

    async def run(self, client: Client, endpoint: Endpoint, request_id: str, ip: str) -> None:
        """Take one call through the stages, from its head to its record. Never raises a `GatewayError`."""
        if request_id in self.calls:
            request_id = renamed(request_id)
        call = Call(request_id, endpoint, ip)
        task = call.task = asyncio.current_task()
        assert task is not None
        self.calls[request_id] = call
        self._telemetry.begin(call, client.headers)
        reserved = 0
        try:
            if self.draining:
                raise ShuttingDown("The service is restarting.")
            self._auth.identify(call, client.headers)
            self._budget.admit(call)
            reserved = self._reserve(client)
            request = await self._read(call, client)
            if request.body_bytes < reserved:  # the length was not known
                self._body_bytes -= reserved - request.body_bytes
                reserved = request.body_bytes
            self._auth.allow(call)
            # Refuses a model that nobody serves before anything is taken.
            template = self._registry.template_tokens(request.model)
            request.prompt_bound += template * request.prompts if endpoint.pairs else template
            client.watch(lambda: call.abort(ClientGone("The client closed the connection.")))
            call.enter("budget")
            if self._budget.scarce(call) and (exact := await self._prompt_counter.count(call)) is not None:
                request.prompt_bound = exact
            await self._hold(call)
            call.enter("capacity")
            await self._capacity.enter(call)
            call.enter("forward")
            await self._forward.exchange(call, client)
            call.status = 200
        except GatewayError as error:
            await self._fail(call, client, error)
        except asyncio.CancelledError:
            if call.cause is None:
                call.outcome = call.outcome or Outcome.CANCELLED
                raise
            task.uncancel()
            # Revoked while its end was being recorded: what it cost stands, and its caller is told the cause.
            if not call.settled or not client.started:
                await self._fail(call, client, call.cause)
        except Exception as error:  # the one place that turns a fault of ours into an answer
            self._telemetry.fault(call, error)
            await self._fail(call, client, InternalError("An internal error; the request id leads to it."))
        finally:
            call.enter("ledger")
            client.unwatch()
            self._body_bytes -= reserved
            self._capacity.leave(call)
            self._ledger.close(call)
            self._budget.release(call)
            self.calls.pop(call.request_id, None)
            self._telemetry.end(call)
            # Nothing may keep a finished call alive: an error's traceback leads back here and to who kept the error.
            if call.error is not None:
                call.error.__traceback__ = None
            call.task = call.answer = call.grant = call.error = call.cause = None

    def _reserve(self, client: Client) -> int:
        """Take room for the body among all bodies in flight; the length is known, or it is taken to be the largest."""
        length = client.headers.get(b"content-length")
        size = self._max_body_bytes
        if length is not None and length.isdigit() and (told := int(length)) < size:
            size = told
        if self._body_bytes + size > self._bodies_in_flight_bytes:
            raise QueueFull("Too many large requests are under way.", limit="bodies_in_flight_bytes")
        self._body_bytes += size
        return size

    async def _read(self, call: Call, client: Client) -> Request:
        if client.guarded:
            raw = await client.body(self._max_body_bytes)
        else:
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    raw = await client.body(self._max_body_bytes)
            except TimeoutError:
                raise InvalidRequest(f"The body did not arrive within {BODY_SECONDS:g} s.") from None
        request: Request
        if call.endpoint.multipart:
            content_type = client.headers.text(b"content-type")
            if len(raw) > wire.LARGE_BYTES:
                form = await asyncio.to_thread(multipart.parse, call.endpoint, raw, content_type, self._caps)
            else:
                form = multipart.parse(call.endpoint, raw, content_type, self._caps)
            client.headers[b"content-type"] = form.content_type.encode("ascii")  # the engine's
            request = form
        elif len(raw) > wire.LARGE_BYTES:
            request = await self._large.parse(call.endpoint, raw, self._caps)
        else:
            request = wire.parse(call.endpoint, raw, self._caps)
        wanted = client.headers.text(b"x-priority")
        if wanted:
            try:
                request.priority = Priority(wanted)
            except ValueError:
                raise InvalidRequest("'x-priority' is one of high, normal, low.", param="x-priority") from None
        call.request = request
        return request

    async def _hold(self, call: Call) -> None:
        # A caller may choose its request id, and the ledger has each id once: a used one is extended.
        while not await self._budget.hold(call):
            self.calls.pop(call.request_id, None)
            call.request_id = renamed(call.request_id)
            self.calls[call.request_id] = call

    async def _fail(self, call: Call, client: Client, error: GatewayError) -> None:
        call.error = error
        if call.outcome is None or call.outcome is Outcome.OK:
            call.outcome = outcome_of(error, running=call.cause is error)
        call.status = call.status or error.status
        if isinstance(error, ClientGone):
            return
        if not client.started:
            body = answer.error_body(error, call.endpoint.dialect)
            await client.respond(error.status, _error_head(call, error), body)
            return
        client.close_after()
        if call.answer is None:
            return  # a JSON body that cannot be completed: the connection breaks, and that is the truth
        with contextlib.suppress(LedgerUnavailable):  # the stream has failed already; `close` keeps trying
            await self._ledger.settle(call)
        await client.end(call.answer.broken(error, call.request_id))

    async def drain(self, seconds: float, on_progress: Callable[[int], None]) -> None:
        """Refuse new calls, give running ones `seconds`, end the rest with a terminal event."""
        self.draining = True
        deadline = asyncio.get_running_loop().time() + seconds
        while self.calls and asyncio.get_running_loop().time() < deadline:
            on_progress(len(self.calls))
            tasks = [call.task for call in self.calls.values() if call.task is not None]
            left = deadline - asyncio.get_running_loop().time()
            await asyncio.wait(tasks, timeout=min(1.0, max(0.0, left)), return_when=asyncio.ALL_COMPLETED)
        tasks = [call.task for call in self.calls.values() if call.task is not None]
        for call in list(self.calls.values()):
            call.abort(ShuttingDown("The service is restarting."))
        if tasks:
            await asyncio.wait(tasks, timeout=5.0)


def _error_head(call: Call, error: GatewayError) -> bytes:
    retry = "".join([f"{name}: {value}\r\n" for name, value in error.headers().items()])
    return (
        answer.HEAD % (b"application/json", call.request_id.encode(), call.server_timing(), call.limit_lines)
        + retry.encode()
    )


def outcome_of(error: GatewayError, *, running: bool) -> Outcome:
    """How a call that ends with `error` is counted; `running`: it was ended from outside by this error."""
    if isinstance(error, ClientGone):
        return Outcome.CANCELLED
    if running and isinstance(error, KeyDisabled | KeyExpired | InvalidApiKey):
        return Outcome.REVOKED
    if running and isinstance(error, ShuttingDown):
        return Outcome.INTERRUPTED
    return Outcome.REFUSED if isinstance(error, CallerError | CapacityError) else Outcome.FAILED


def renamed(request_id: str) -> str:
    """Another id that still shows the caller's."""
    return f"{request_id[:64]}.{secrets.token_hex(4)}"

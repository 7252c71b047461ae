"""Capacity: when a call may go to an engine. Fair between keys, bounded, and honest about waiting.

With a free place and nobody waiting a call passes without a future or a timer. Else it waits in the `WaitingRoom`; a
place that becomes free is given away in the same turn of the event loop, so places never lie idle while somebody waits.
All decisions are synchronous; only `enter` waits. `leave` may be called in any state, any number of times.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gateway.call import Priority
from gateway.drain_rate import DrainRate
from gateway.errors import NoBackend, QueueFull, QueueTimeout
from gateway.fair_queue import Ticket
from gateway.promises import Promises
from gateway.waiting_room import WaitingRoom

if TYPE_CHECKING:
    from gateway.backends import Backend, Registry
    from gateway.call import Call
    from gateway.errors import GatewayError
    from gateway.settings import Settings

RANK = {Priority.HIGH: 0, Priority.NORMAL: 1, Priority.LOW: 2}
PRIORITIES = (Priority.HIGH, Priority.NORMAL, Priority.LOW)
LEARNING = 0.05  # weight of the newest call in what is expected of the next
FIRST_OUTPUT_GUESS = 256.0  # tokens of an answer that nothing bounds, until some have been seen
_MARKED_BYTES = 2048
ROOM_SHARE = 0.8  # of the longest wait: a newcomer who would wait longer is told at once; a promise has the rest too

Choose = Callable[[Sequence["Backend"], int | None, float], "Backend"]


class Capacity:
    """Places in the engines and the room in front of them. One per gateway, used from one event loop.

    `registry` knows the engines, `choose` picks one (dispatch), `clock` gives seconds.
    """

    def __init__(
        self, settings: Settings, registry: Registry, choose: Choose, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._registry = registry
        self._choose = choose
        self._clock = clock
        self._seconds = settings.queue_seconds
        self.room = WaitingRoom(settings.queue_calls, settings.queue_tokens, settings.queue_seconds)
        self._rate = DrainRate(settings.engine_concurrency * len(registry.backends))
        self._promises = Promises()
        self._typical_output = FIRST_OUTPUT_GUESS  # tokens of one generated sequence
        self._calibration = 1.0  # what calls cost, to what was expected
        self._timer: asyncio.TimerHandle | None = None
        registry.on_change = self.pump

    async def enter(self, call: Call) -> None:
        """Wait for a place; sets `call.grant` and `call.backend`.

        Raises `QueueFull` or `QueueTimeout` with the time after which a place is expected, `NoBackend` when no engine
        can take it, `ModelNotFound` for a model that nobody serves.
        """
        request, caller = call.request, call.caller
        assert request is not None
        assert caller is not None
        now = self._clock()
        pool = self._registry.pool(request.model)
        output = request.output_tokens
        rank = RANK[caller.priority]
        if request.priority is not None:
            rank = max(rank, RANK[request.priority])
        cost = self._expected(request.prompt_estimate, output, request.n)
        ticket = Ticket(caller.key_id, cost, caller.weight or 1, rank, pool, call)
        ticket.calibration = self._calibration
        if not call.endpoint.metered:
            self._bypass(ticket, now)
        else:
            if self.room.calls:
                self.pump()  # a breaker may have become half-open since: those who wait go first
            if not self._admit(ticket, now):
                await self._wait(ticket, now)
        call.enter("dispatch")

    def _expected(self, prompt: int, output: int | None, n: int) -> float:
        """Tokens that a call will probably cost. Upper bounds would do harm: they are given back at the end, which
        would be credit over the keys that came in meanwhile."""
        likely = self._typical_output * n
        if output is not None and output < likely:
            likely = output
        cost = (prompt + likely) * self._calibration
        return cost if cost > 1.0 else 1.0

    def _bypass(self, ticket: Ticket, now: float) -> None:
        """Calls that the engine answers without its batch (tokenize, count_tokens) need an engine, but no place."""
        able = [backend for backend in ticket.pool if backend.available(now)]
        if not able:
            raise self._no_backend(ticket.pool)
        ticket.call.backend = min(able, key=lambda backend: backend.outstanding)

    def _admit(self, ticket: Ticket, now: float) -> bool:
        """Take a place that is free: nobody who waits could use it, or `pump` would have given it away."""
        free = [backend for backend in ticket.pool if backend.free(now)]
        if not free:
            return False
        self.room.charge(ticket, now)
        self._grant(ticket, free, now)
        return True

    def _grant(self, ticket: Ticket, free: list[Backend], now: float) -> None:
        call = ticket.call
        backend = self._choose(free, call.request.affinity, ticket.cost)
        self._occupy(ticket, backend, now)
        ticket.granted = now
        self._rate.granted(now)
        call.grant = ticket

    def _occupy(self, ticket: Ticket, backend: Backend, now: float) -> None:
        ticket.backend = ticket.call.backend = backend
        ticket.probe = backend.breaker.take(now)
        backend.in_flight += 1
        backend.outstanding += ticket.cost

    def _vacate(self, ticket: Ticket) -> None:
        backend = ticket.backend
        ticket.backend = None
        backend.in_flight -= 1
        outstanding = backend.outstanding - ticket.cost
        backend.outstanding = outstanding if backend.in_flight and outstanding > 0.0 else 0.0
        if ticket.probe:
            ticket.probe = False
            backend.breaker.release()

    async def _wait(self, ticket: Ticket, now: float) -> None:
        self._join(ticket, now)
        call = ticket.call
        call.grant = ticket
        ticket.waiter = asyncio.get_running_loop().create_future()
        self._set_timer()
        # A cancellation that meets a grant in the same turn is not swallowed: `leave` gives the place back.
        error = await ticket.waiter
        call.queue_seconds = self._clock() - now
        if error is not None:
            raise error

    def _join(self, ticket: Ticket, now: float) -> None:
        """Begin to wait, or raise: no engine, no room, or a wait that would be too long.

        The room is as large as it drains in time: for everybody, and within that for each key. What was promised is
        kept free in it, except that nobody's promises beyond its share shut out a key that keeps within its own.
        """
        if not any(backend.available(now) for backend in ticket.pool):
            raise self._no_backend(ticket.pool)
        room, promises = self.room, self._promises
        kept = promises.keep(ticket.key, _mark(ticket.call), now)
        seconds = self._seconds if kept else self._seconds * ROOM_SHARE
        places = _places(room.limit_calls, self._rate.measured(now), seconds)
        waiting, pace = room.of(ticket, now)
        own, promised = (0, 0) if kept else (promises.of(ticket.key), promises.outstanding(now))
        if _taken(waiting, own, _places(places, pace, seconds)):
            raise self._refusal(ticket, now)
        if room.full(ticket.cost, places) or _taken(room.calls, promised, places):
            self._squeeze_in(ticket, (waiting + own + 1) / ticket.weight, places, now)
        room.add(ticket, now)
        self._rate.busy(now)

    def _squeeze_in(self, ticket: Ticket, mine: float, places: int, now: float) -> None:
        """Make room where all `places` are taken or promised, or raise. `mine` is what the key would hold and have been
        promised then, for a unit of weight."""
        room = self.room
        full = room.full(ticket.cost, places)
        share = room.share(ticket, places, self._promises.weights())
        if not full and mine <= share:
            due = self._promises.within(share, lambda key: room.waiting_of(key, ticket.rank))
            if not _taken(room.calls, due, places):
                return
        victim = room.victim(ticket, mine, share)
        if victim is None or (full and room.tokens - victim.cost + ticket.cost > room.limit_tokens):
            raise self._refusal(ticket, now)
        if full:  # else there is a place, promised to somebody else: whoever would have given way keeps its own
            room.remove(victim, now)
            self._wake(victim, self._refusal(victim, now))

    def _refusal(self, ticket: Ticket, now: float) -> QueueFull:
        return QueueFull("The waiting room is full.", retry_after=self._promise(ticket, now), limit="queue_calls")

    def _promise(self, ticket: Ticket, now: float) -> float:
        """Seconds after which there will be room for this call, promised."""
        rate, (_, pace) = self._rate.calls_per_second(now), self.room.of(ticket, now)
        return self._promises.make(ticket.key, _mark(ticket.call), ticket.weight, rate, pace, now)

    def _no_backend(self, pool: Sequence[Backend]) -> NoBackend:
        wait = self._registry.seconds_to_recovery(tuple(pool))
        return NoBackend("No engine is available for this model at the moment.", retry_after=max(1.0, wait))

    def _wake(self, ticket: Ticket, error: GatewayError | None) -> None:
        if error is not None:
            ticket.call.grant = None
        if not ticket.waiter.done():
            ticket.waiter.set_result(error)

    def pump(self) -> None:
        """Give free places away. Called whenever a place or an engine may have become free."""
        room = self.room
        if not room.calls:
            return
        now = self._clock()
        while True:
            free_of: dict[Any, list[Backend]] = {}

            def has_place(pool: Any, found: dict[Any, list[Backend]] = free_of) -> bool:
                free = found[pool] = [backend for backend in pool if backend.free(now)]
                return bool(free)

            ticket = room.next(has_place, now)
            if ticket is None:
                break
            self._rate.admitted(now)
            self._grant(ticket, free_of[ticket.pool], now)
            self._wake(ticket, None)
        if not room.calls:
            self._rate.idle(now)

    def reroute(self, call: Call, not_to: Sequence[Backend] = ()) -> Backend | None:
        """Move a call whose engine failed before its first byte; the engine to try next, or None.

        Another engine with a free place if there is one, else the same again if it may be used; none of `not_to`.
        """
        ticket: Ticket | None = call.grant
        if ticket is None or ticket.backend is None:
            return None
        now = self._clock()
        old: Backend = ticket.backend
        others = [
            backend for backend in ticket.pool if backend is not old and backend not in not_to and backend.free(now)
        ]
        self._vacate(ticket)
        if others:
            chosen = self._choose(others, None, ticket.cost)
        elif old in not_to or not old.available(now):
            chosen = None
        else:
            chosen = old
        if chosen is not None:
            self._occupy(ticket, chosen, now)
        if chosen is not old:
            self.pump()
        return chosen

    def leave(self, call: Call) -> None:
        """The call is over, or was never let in: return what it has and book what it used."""
        ticket: Ticket | None = call.grant
        if ticket is None:
            return
        call.grant = None
        ticket.waiter = None
        now = self._clock()
        if ticket.granted is None:
            self.room.remove(ticket, now)
            if not self.room.calls:
                self._rate.idle(now)
            return
        usage = call.usage
        used = float(usage.total) if usage.known else ticket.cost
        self.room.settle(ticket, used)
        self._rate.left(ticket.granted)
        if usage.known:  # a call that failed says nothing about how long calls take
            self._rate.served(now - ticket.granted)
            # Against the guess as it was before calibration: a call may have waited while that changed.
            ratio = used * ticket.calibration / ticket.cost
            ratio = 4.0 if ratio > 4.0 else 0.1 if ratio < 0.1 else ratio
            self._calibration += (ratio - self._calibration) * LEARNING
            if usage.completion:
                sequence = usage.completion / (call.request.n if call.request is not None else 1)
                self._typical_output += (sequence - self._typical_output) * LEARNING
        if ticket.backend is not None:
            self._vacate(ticket)
        ticket.call = None
        self.pump()

    def _set_timer(self) -> None:
        if self._timer is None and (deadline := self.room.next_deadline()) is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, deadline - self._clock()), self._expire)

    def _expire(self) -> None:
        self._timer = None
        now = self._clock()
        for ticket in self.room.late(now):
            if any(backend.available(now) for backend in ticket.pool):
                message = f"No place became free within {self._seconds:g} s."
                wait = self._promise(ticket, now)
                self._wake(ticket, QueueTimeout(message, retry_after=wait, limit="queue_seconds"))
            else:
                self._wake(ticket, self._no_backend(ticket.pool))
        if not self.room.calls:
            self._rate.idle(now)
        self._set_timer()

    def close(self) -> None:
        """Stop the timer. Calls that still wait are the pipeline's to end."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # Telling

    def queue(self) -> list[dict[str, Any]]:
        """Who waits, since when, for what; in order of arrival."""
        now = self._clock()
        return [
            {
                "request_id": ticket.call.request_id,
                "key_id": ticket.key,
                "model": ticket.call.request.model,
                "endpoint": ticket.call.endpoint.name,
                "priority": PRIORITIES[ticket.rank],
                "tokens": round(ticket.cost),
                "waited_seconds": round(now - ticket.entered, 3),
                "leaves_in_seconds": round(ticket.entered + self._seconds - now, 3),
                "why": "engines_busy" if any(b.available(now) for b in ticket.pool) else "no_engine",
            }
            for ticket in self.room.waiting()
        ]

    def waiting(self) -> dict[str, int]:
        """Calls that wait, by priority (as they are ranked now)."""
        return {priority: queue.calls for priority, queue in zip(PRIORITIES, self.room.classes, strict=True)}

    def __repr__(self) -> str:
        return f"<Capacity {self.room!r} {' '.join(map(repr, self._registry.backends))}>"


def _places(most: int, rate: float | None, seconds: float) -> int:
    """How many of `most` calls may wait, if they get places at `rate` and shall not wait longer than `seconds`."""
    return most if rate is None else min(most, max(1, int(rate * seconds)))


def _taken(waiting: int, promised: float, places: int) -> bool:
    """Whether a newcomer finds no place. What is promised is kept free in the upper half only: the lower one keeps the
    engines busy, whatever becomes of those who were told to come back."""
    return waiting + (promised if waiting * 2 >= places else 0) >= places


def _mark(call: Call) -> int:
    """By what the same request of the same client is known when it comes again."""
    assert call.request is not None
    raw = call.request.raw
    ends = raw if len(raw) <= 2 * _MARKED_BYTES else raw[:_MARKED_BYTES] + raw[-_MARKED_BYTES:]
    return zlib.crc32(ends, zlib.crc32(call.ip.encode()))

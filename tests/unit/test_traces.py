"""One call's trace may fail, every other one arrives; whatever does not arrive is counted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from tests.doubles.waiting import wait_until

from gateway.call import Call, Outcome
from gateway.traces import QUEUE, Tracer, begin
from gateway.wire import ENDPOINTS

STAGES = {"auth": 0.001, "ledger": 0.002}
SPANS = 1 + len(STAGES)


def ended(number: int) -> Call:
    """A call that ended well and is traced; its trace's id is `number`."""
    call = Call(f"{number:032x}", next(iter(ENDPOINTS.values())), "192.0.2.1")
    call.trace = begin(None, call.request_id, 1.0)
    call.stage_seconds = STAGES
    call.outcome = Outcome.OK
    call.status = 200
    return call


class Sender:
    """In the network's place: keeps what is sent, and lets a test look at it as a collector would."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.open = threading.Event()  # clear: the collector lets everybody wait
        self.open.set()
        self.tracer = Tracer("http://127.0.0.1:9", 10.0, "1")
        self.tracer._exporter._send = self.send

    def send(self, body: bytes) -> Any:
        self.open.wait(60)
        self.bodies.append(body)
        return SimpleNamespace(success=True)

    def spans(self) -> list[int]:
        """The traces' ids, once for each span that arrived."""
        requests = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        scopes = [
            scope for request in requests for resource in request.resource_spans for scope in resource.scope_spans
        ]
        return [int.from_bytes(span.trace_id, "big") for scope in scopes for span in scope.spans]


@pytest.fixture
def sender() -> Iterator[Sender]:
    made = Sender()
    yield made
    made.open.set()
    made.tracer.close()


def test_a_call_whose_spans_cannot_be_made_is_dropped_alone_and_counted(sender: Sender) -> None:
    broken = ended(2)
    broken.started_at = -1e9  # a clock that is wrong: protobuf has no such time
    for call in (ended(1), broken, ended(3)):
        sender.tracer.end(call, 0.1, "model")
    sender.tracer.close()
    assert sender.spans() == [1] * SPANS + [3] * SPANS
    assert sender.tracer.dropped == SPANS


def test_a_model_name_that_is_no_text_spoils_nothing(sender: Sender) -> None:
    sender.tracer.end(ended(1), 0.1, "caf\udce9")  # as the environment gives a byte that is not UTF-8
    sender.tracer.close()
    assert sender.spans() == [1] * SPANS


def test_what_finds_no_room_while_the_collector_hangs_is_counted(sender: Sender) -> None:
    sender.open.clear()
    calls = 2 * QUEUE
    for number in range(1, calls + 1):
        sender.tracer.end(ended(number), 0.1, "model")
    dropped = sender.tracer.dropped
    assert SPANS * (calls - QUEUE - 128) <= dropped <= SPANS * (calls - QUEUE)  # 128 may be on their way
    sender.open.set()
    sender.tracer.close()
    assert len(sender.spans()) + dropped == SPANS * calls
    assert sender.tracer.dropped == dropped


def test_room_comes_back_with_the_collector(sender: Sender) -> None:
    sender.open.clear()
    for number in range(1, QUEUE + 200):
        sender.tracer.end(ended(number), 0.1, "model")
    sender.open.set()
    wait_until("the queue is sent", lambda: len(sender.spans()) >= SPANS * QUEUE // 2)
    dropped = sender.tracer.dropped
    sender.tracer.end(ended(10**6), 0.1, "model")
    sender.tracer.close()
    assert 10**6 in sender.spans()
    assert sender.tracer.dropped == dropped

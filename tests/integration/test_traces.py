"""What a caller sends spoils nobody's trace, and an exemplar leads to a trace that exists."""

import re
from collections.abc import Iterator

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from tests.doubles.gateway import GatewayProcess
from tests.doubles.monitoring import Collector
from tests.doubles.vllm import VllmDouble
from tests.doubles.waiting import wait_until


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmDouble]:
    with VllmDouble(alias=["double"]) as double:
        yield double


def arrived(collector: Collector) -> set[str]:
    """The ids of the traces that a collector can read."""
    requests = [ExportTraceServiceRequest.FromString(body) for body in collector.bodies]
    scopes = [scope for request in requests for resource in request.resource_spans for scope in resource.scope_spans]
    return {span.trace_id.hex() for scope in scopes for span in scope.spans}


def test_a_huge_number_in_a_request_spoils_nobodys_trace(engine: VllmDouble) -> None:
    path, messages = "/v1/chat/completions", [{"role": "user", "content": "hello"}]
    wanted = {f"{one:032x}": number for one, number in enumerate((8, 2**63, 10**30, 10**400, 8), 1)}
    with Collector() as collector:
        with GatewayProcess(VLLM_URL=engine.url, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url) as gateway:
            for trace, number in wanted.items():
                body = {"model": "double", "messages": messages, "max_tokens": number}
                answer = gateway.post(path, body, traceparent=f"00-{trace}-00f067aa0ba902b7-01")
                assert answer.status == (200 if number == 8 else 400)
            assert gateway.terminate() == 0  # sends what is left
        assert arrived(collector) == wanted.keys()


def exemplars(gateway: GatewayProcess) -> set[str]:
    """The traces that the gateway's histograms lead to."""
    page = gateway.get("/metrics", accept="application/openmetrics-text").body.decode()
    return set(re.findall(r'# \{trace_id="([0-9a-f]{32})"\}', page))


def test_at_the_default_ratio_every_exemplar_leads_to_a_trace(engine: VllmDouble) -> None:
    with Collector() as collector:
        with GatewayProcess(VLLM_URL=engine.url, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url) as gateway:
            led: set[str] = set()
            for number in range(100):  # that none of them is kept happens once in 40,000 runs
                assert gateway.chat(stream=bool(number % 2)).status == 200
                led |= exemplars(gateway)
            failed = gateway.chat("double:status=500")
            assert failed.status == 502
            wait_until("the failed call leads to its trace", lambda: exemplars(gateway) - led)
            led |= exemplars(gateway)
            assert gateway.terminate() == 0  # sends what is left
        assert len(led) > 1
        assert led <= arrived(collector)

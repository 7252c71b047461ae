"""The appliance's path with its monitoring, as real processes: nginx, gateway, exporter, Prometheus, and an engine."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.doubles.edge_running import Edge, edge
from tests.doubles.gateway import KEY, GatewayProcess
from tests.doubles.monitoring import Collector, Prometheus, fetch, gpu_exporter, prometheus
from tests.doubles.promtail import Promtail
from tests.doubles.vllm import VllmDouble
from tests.doubles.waiting import wait_until

TRACE = "0af7651916cd43dd8448eb211c80319c"


@dataclass
class Monitored:
    """What runs. `double` is the engine's double, where there is one: it can be made to fail."""

    prometheus: Prometheus
    gateway: GatewayProcess
    edge: Edge
    collector: Collector
    addresses: dict[str, str]
    model: str
    double: VllmDouble | None = None
    promtail: Promtail = field(default_factory=Promtail)
    _shipped: int = 0

    def ship(self) -> None:
        """Hand the new lines of nginx's access log to the pipeline that makes metrics of them."""
        lines = self.edge.access_lines()
        self.promtail.ship("nginx", lines[self._shipped :])
        self._shipped = len(lines)

    def body(self, text: str, **more: Any) -> dict[str, Any]:
        """A chat completion; `text` may carry a directive to the double."""
        asked = f"double:{text} hello" if self.double else "Say hello in three languages."
        return {"model": self.model, "messages": [{"role": "user", "content": asked}], "max_tokens": 16, **more}

    def traffic(self, seconds: float) -> None:
        """Calls of every kind for at least this long, each kind at least once."""
        until = time.monotonic() + seconds
        self._round()
        while time.monotonic() < until:
            self._round()

    def _round(self) -> None:
        """Streams, whole answers, embeddings, refusals, failures, and a client that leaves."""
        headers = {"Authorization": f"Bearer {KEY}", "traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
        path = "/v1/chat/completions"
        with self.edge.client(headers=headers) as client:
            for number in range(8 if self.double else 3):
                answer = client.post(path, json=self.body("tokens=6,pace_ms=5", stream=bool(number % 2)))
                assert answer.status_code == 200, answer.text
            assert client.get("/nothing").status_code == 404
            assert client.post(path, json={**self.body("tokens=1"), "model": "none"}).status_code == 404
            wrong = {"Authorization": "Bearer sk-wrong-0123456789"}
            assert client.post(path, json=self.body("tokens=1"), headers=wrong).status_code == 401
            if self.double:
                assert client.post("/v1/embeddings", json={"model": self.model, "input": "text"}).status_code == 200
                assert client.post(path, json=self.body("status=500")).status_code == 502
        self._leave()
        self.ship()

    def _leave(self) -> None:
        """A client that closes its connection in the middle of an answer."""
        with socket.create_connection(("127.0.0.1", self.gateway.port)) as leaver:
            text = json.dumps(self.body("hang_after=2", stream=True))
            leaver.sendall(
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode()
            )
            assert leaver.recv(100)
        if self.double:
            self.double.wait_idle()

    def blank(self, asked: dict[str, str]) -> list[str]:
        """The names of queries that give nothing. On a slow machine the last call of a kind may be more than a minute ago
        when a rate over a minute is asked for: what gives nothing is asked again after more traffic."""
        blank = [name for name, expr in asked.items() if self.prometheus.empty(expr)]
        for _ in range(3):
            if blank:
                self.traffic(5)
                blank = [name for name in blank if self.prometheus.empty(asked[name])]
        return blank

    def pages(self) -> str:
        """What all programs export now, with units and types."""
        ask = "application/openmetrics-text"
        return "\n".join(fetch(f"http://{address}/metrics", accept=ask) for address in self.addresses.values())


@contextmanager
def monitored(
    folder: Path, url: str, key: str, model: str, double: VllmDouble | None = None, **jobs: str
) -> Iterator[Monitored]:
    """Everything in front of and beside the engine at `url`; `jobs` are more addresses for Prometheus."""
    with ExitStack() as running:
        collector = running.enter_context(Collector())
        traces = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "TRACE_RATIO": 1}
        gateway = running.enter_context(GatewayProcess(VLLM_URL=url, VLLM_API_KEY=key, **traces))
        gpu = running.enter_context(gpu_exporter())
        behind = f"127.0.0.1:{gateway.port}"
        nginx = running.enter_context(edge(folder / "edge", gateway=behind, requests_per_second=10_000))
        promtail = Promtail()
        page = promtail.serve()
        running.callback(page.close)
        addresses = {
            "nginx": f"127.0.0.1:{nginx.status}",
            "gateway": behind,
            "vllm": url.removeprefix("http://"),
            "gpu": gpu,
            "promtail": page.address,
            **jobs,
        }
        (folder / "prometheus").mkdir()
        watcher = running.enter_context(prometheus(folder / "prometheus", **addresses))
        whole = Monitored(watcher, gateway, nginx, collector, addresses, model, double, promtail)
        whole.traffic(0)
        # Rates need a first value: what is counted from here on is what they show.
        wait_until("every job is scraped", lambda: len(watcher.query("up == 1")) == len(addresses) + 1)
        yield whole

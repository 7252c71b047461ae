"""What a user does first, from outside, through the published port: a key, an answer, a stream."""

import http.client
import json

import pytest
from tests.stack.alarms import page
from tests.stack.appliance import Appliance
from tests.stack.edge import MODEL, Edge
from tests.stack.waiting import until

pytestmark = pytest.mark.timeout(3600)  # the first test waits for images and for the engine


def test_the_answer_is_paris(appliance: Appliance) -> None:
    answer = appliance.edge.chat()
    assert answer.status == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == "The capital of France is Paris."  # type: ignore[index]
    assert answer.usage is not None
    assert answer.usage["prompt_tokens"] > 0


def test_a_stream_says_the_same_and_ends(appliance: Appliance) -> None:
    whole, stream = appliance.edge.chat(), appliance.edge.chat(stream=True)
    assert stream.ended
    assert stream.text == whole.json()["choices"][0]["message"]["content"]  # type: ignore[index]
    assert stream.usage is not None
    assert stream.usage["total_tokens"] == whole.usage["total_tokens"]  # type: ignore[index]
    assert len(stream.events) > 3


def test_the_certificate_verifies_for_who_trusts_it(appliance: Appliance) -> None:
    trusted = appliance.exec("nginx", "cat", "/etc/edge/certificates/fullchain.pem")
    assert Edge("127.0.0.1", appliance.edge.port, trust=trusted).ready()


def test_keys_are_made_by_the_documented_command_and_count(appliance: Appliance) -> None:
    made = appliance.create_key("second", "--daily-tokens", "100000")
    edge = Edge("127.0.0.1", appliance.edge.port, str(made["secret"]))
    answer = edge.chat(tokens=8)
    assert answer.status == 200, answer.text
    usage = edge.call("GET", "/v1/usage").json()
    assert usage["used_tokens"] == answer.usage["total_tokens"]  # type: ignore[index]
    assert usage["limit_tokens"] == 100000
    record = [one for one in appliance.ledger() if one["request_id"] == answer.request_id]
    assert len(record) == 1
    assert record[0]["key_id"] == made["id"]


def test_models_are_listed_for_a_key_and_refused_without(appliance: Appliance) -> None:
    listed = appliance.edge.call("GET", "/v1/models").json()
    assert MODEL in [one["id"] for one in listed["data"]]  # type: ignore[attr-defined]
    refused = Edge("127.0.0.1", appliance.edge.port).call("GET", "/v1/models")
    assert refused.status == 401
    assert refused.json()["error"]["code"] == "missing_api_key"  # type: ignore[index]


def test_plain_http_redirects_to_the_published_https_port(appliance: Appliance) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", int(appliance.settings["HTTP_PORT"]), timeout=60)
    connection.request("POST", "/v1/chat/completions", "{}", {"host": "llm.example"})
    response = connection.getresponse()
    assert response.status == 308
    assert response.getheader("location") == f"https://llm.example:{appliance.edge.port}/v1/chat/completions"
    connection.close()


def test_prometheus_sees_every_service_of_ours(appliance: Appliance) -> None:
    def up() -> set[str]:
        answer = page(int(appliance.settings["PROMETHEUS_PORT"]), "/api/v1/query?query=up")
        series = json.loads(answer)["data"]["result"] if answer else []
        return {one["metric"]["job"] for one in series if one["value"][1] == "1"}

    wanted = {"gateway", "vllm", "engine", "gpu", "nginx", "alertmanager", "prometheus"}
    until(f"Prometheus scrapes {wanted}", lambda: wanted <= up(), 240)

"""`make up MODE=local` as a whole, with a double in the engine's place: real nginx, gateway, exporter, Prometheus.

The same with the real engine is tests/engine/test_appliance_local.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest
from scripts.local import running, settings
from scripts.local.places import ROOT, Places
from scripts.local.supervisor import LOG_BYTES
from services.init import certificate
from tests.doubles.edge_running import needs_nginx
from tests.doubles.ports import accepts, free_ports
from tests.doubles.waiting import wait_until

pytestmark = needs_nginx


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    ports = dict(zip(settings.PORT_VARIABLES, map(str, free_ports(len(settings.PORT_VARIABLES))), strict=True))
    (tmp_path / "own").mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment = {
        **kept, **ports, "MODE": "local", "APPLIANCE_STATE": str(tmp_path / "state"),
        "CERTIFICATES_DIR": str(tmp_path / "own"), "HEALTH_SECONDS": "0.2", "UP_SECONDS": "240",
    }  # fmt: skip
    yield environment
    running.stop(Places(tmp_path / "state"))
    assert left_behind(environment) == []


def left_behind(environment: dict[str, str]) -> list[str]:
    """Ports that still answer and processes that still know our state folder."""
    ports = [name for name in settings.PORT_VARIABLES if accepts(int(environment[name]))]
    processes = []
    for process in psutil.process_iter(["pid", "name", "cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        if environment["APPLIANCE_STATE"] in words and process.pid != os.getpid():
            processes.append(words)
    return ports + processes


def verb(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """One of `make`'s verbs, as a process."""
    argv = [sys.executable, "-m", "tests.doubles.local_verbs", *words]
    return subprocess.run(argv, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=290, check=False)


def up(environment: dict[str, str]) -> str:
    """What `make up` prints; it must succeed."""
    done = verb(environment, "up")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def client(environment: dict[str, str], key: str) -> httpx.Client:
    trusted = ssl.create_default_context(cafile=f"{environment['APPLIANCE_STATE']}/certificate.pem")
    return httpx.Client(
        base_url=f"https://127.0.0.1:{environment['HTTPS_PORT']}",
        verify=trusted,
        headers={"authorization": f"Bearer {key}"},
        timeout=60,
    )


def chat(through: httpx.Client) -> dict[str, Any]:
    body = {"model": settings.EMBEDDED_MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    answer = through.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_up_twice_and_down(environment: dict[str, str]) -> None:
    told = up(environment)
    assert "mode local: MODE=local" in told
    [key] = re.findall(r"First API key, shown this once: {2}(\S+)", told)
    with client(environment, key) as through:
        assert chat(through)["choices"][0]["message"]["content"]
        assert [model["id"] for model in through.get("/v1/models").json()["data"]] == [settings.EMBEDDED_MODEL]
        assert through.get("/v1/models", headers={"authorization": "Bearer wrong"}).status_code == 401
        assert through.get("/metrics").status_code == 404
    # The curl that is printed works as it stands.
    command = "\n".join(line.strip() for line in told.partition("Try:")[2].splitlines() if line.strip())
    answer = subprocess.run(["bash", "-c", f"{command} -sS"], capture_output=True, text=True, check=True).stdout
    assert json.loads(answer)["object"] == "chat.completion"
    assert verb(environment, "status").returncode == 0
    # Keys are made and listed where the appliance's database is.
    made = verb(environment, "keys", "create", "--name", "second", "--json")
    with client(environment, json.loads(made.stdout)["secret"]) as through:
        chat(through)
    listed = json.loads(verb(environment, "keys", "list", "--json").stdout)
    assert {one["name"] for one in listed["data"]} == {"first", "second"}
    # Again: it says so, and shows no key.
    assert "runs already" in up(environment)
    # The secret is nowhere in the state folder.
    for path in Path(environment["APPLIANCE_STATE"]).rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes(), path
    assert verb(environment, "down").returncode == 0
    assert left_behind(environment) == []
    assert verb(environment, "status").returncode == 1
    # Up again: the key is kept, not shown, and works.
    again = up(environment)
    assert "First API key" not in again
    assert key not in again
    with client(environment, key) as through:
        chat(through)
    stopped = verb(environment, "stop")  # without containers there is nothing to keep: the same as down
    assert (stopped.returncode, stopped.stdout) == (0, "stop: everything is stopped\n")
    assert left_behind(environment) == []


def test_nothing_on_the_whole_path_holds_a_chunk_back(environment: dict[str, str]) -> None:
    """The engine stands still until what it has sent so far has arrived: what is held anywhere never comes."""
    key = re.findall(r"shown this once: {2}(\S+)", up(environment))[0]
    double = f"http://127.0.0.1:{environment['VLLM_PORT']}/double/go"
    with client(environment, key) as through:
        for events in (1, 2, 3, 20, 39):
            text = f"double:tokens=40,wait_after={events}"
            body = {"model": settings.EMBEDDED_MODEL, "messages": [{"role": "user", "content": text}], "stream": True}
            seen = 0
            with through.stream("POST", "/v1/chat/completions", json={**body, "max_tokens": 40}) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        seen += 1
                        if seen == events:
                            httpx.post(double, json={})
            assert seen > events


def test_what_dies_comes_back_and_a_certificate_is_taken_over(environment: dict[str, str], tmp_path: Path) -> None:
    place = Places(tmp_path / "state")
    place.logs.mkdir(parents=True)
    full = [place.logs / f"{name}.log" for name in ("edge-access", "appliance-supervisor", "gateway")]
    for log in full:
        log.touch()
        os.truncate(log, LOG_BYTES + 1)
    key = re.findall(r"shown this once: {2}(\S+)", up(environment))[0]
    wait_until("full logs begin anew", lambda: all(log.stat().st_size < LOG_BYTES for log in full))
    with client(environment, key) as through:
        chat(through)
    wait_until("nginx goes on at the new end", lambda: (place.logs / "edge-access.log").read_bytes().startswith(b"{"))
    for name in ("gateway", "nginx"):

        def alive(name: str = name) -> psutil.Process | None:
            found = running.running(place)
            return found.alive().get(name) if found is not None else None

        killed = wait_until(f"{name} runs", alive)
        killed.kill()

        def is_back(name: str = name, before: int = killed.pid) -> bool:
            now = running.running(place)
            process = now.alive().get(name) if now is not None else None
            if process is None or process.pid == before:
                return False
            try:
                with client(environment, key) as through:
                    return through.get("/ready").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(f"{name} is back", is_back)
    chain, secret = certificate.self_signed(("own.test",), certificate.dt.datetime.now(certificate.dt.UTC))
    (tmp_path / "own" / certificate.CHAIN).write_bytes(chain)
    (tmp_path / "own" / certificate.KEY).write_bytes(secret)

    def taken_over() -> bool:
        return (place.certificates / certificate.CHAIN).read_bytes() == chain

    wait_until("the user's certificate is served", taken_over)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"DOUBLE_STATE": "failed"}, ["the engine failed: as the test said"]),
        ({"DOUBLE_GATEWAY": "broken"}, ["gateway keeps ending", "no luck today"]),
        ({"DOUBLE_STATE": "starting", "VLLM_URL": "x", "BACKENDS": '[{"name":"a","url":"http://127.0.0.1:9"}]',
          "UP_SECONDS": "3"}, ["not ready after 3 s (UP_SECONDS)"]),
    ],
)  # fmt: skip
def test_a_start_that_fails_says_why_and_leaves_nothing(
    environment: dict[str, str], how: dict[str, str], words: list[str]
) -> None:
    done = verb({**environment, **how}, "up")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert left_behind(environment) == []
    assert not Path(environment["APPLIANCE_STATE"], "run", "appliance.json").exists()


def test_an_interrupted_start_leaves_nothing(environment: dict[str, str]) -> None:
    argv = [sys.executable, "-m", "tests.doubles.local_verbs", "up"]
    waiting = {**environment, "BACKENDS": '[{"name":"a","url":"http://127.0.0.1:9"}]'}
    with subprocess.Popen(argv, env=waiting, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        wait_until("the gateway listens", lambda: accepts(int(environment["GATEWAY_PORT"])))
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert left_behind(environment) == []

"""`make up MODE=local` with the real engine: nginx → gateway → vLLM's CPU build, from outside, started once.

The README's own commands are run here, so that they cannot go stale.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2 as httpx
import openai
import psutil
import pytest
from scripts.local import settings
from scripts.local.places import ROOT
from tests.doubles.edge_running import needs_nginx
from tests.doubles.ports import accepts, free_ports

MODEL = settings.EMBEDDED_MODEL
QUESTION = "What is the capital of France? Answer in one sentence."
START_SECONDS = 1200  # it takes about 110 on a machine that has nothing else to do
STATE_VARIABLES = ("ENGINE_VENV", "MODEL_CACHE_DIR", "TORCH_EXTRA_INDEX")
pytestmark = [needs_nginx, pytest.mark.timeout(1800)]


@dataclass
class Appliance:
    """A running appliance as its user sees it."""

    environment: dict[str, str]
    told: str
    key: str
    seconds: float

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.environment['HTTPS_PORT']}"

    @property
    def certificate(self) -> str:
        return f"{self.environment['APPLIANCE_STATE']}/certificate.pem"

    def openai(self, key: str | None = None) -> openai.OpenAI:
        """The official client, unmodified but for the certificate it trusts."""
        context = ssl.create_default_context(cafile=self.certificate)
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key or self.key, max_retries=0, http_client=httpx.Client(verify=context)
        )

    def verb(self, *words: str) -> subprocess.CompletedProcess[str]:
        return make(self.environment, *words)


def make(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """One of `make`'s verbs."""
    return subprocess.run(
        ["make", "--no-print-directory", *words], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


def left_behind(environment: dict[str, str]) -> list[str]:
    """Ports that still answer, and processes that belong to this appliance."""
    ports = [name for name in settings.PORT_VARIABLES if accepts(int(environment[name]))]
    processes = []
    for process in psutil.process_iter(["pid"]):
        try:
            theirs = process.environ().get("APPLIANCE_STATE") == environment["APPLIANCE_STATE"]
            if theirs and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return ports + processes


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    ports = dict(zip(settings.PORT_VARIABLES, map(str, free_ports(len(settings.PORT_VARIABLES))), strict=True))
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", *STATE_VARIABLES) if name in os.environ}
    state = tmp_path_factory.mktemp("appliance") / "state"
    own = tmp_path_factory.mktemp("certificates")
    # The environment and the model are the machine's: made here only if no test has made them yet.
    kept.setdefault("ENGINE_VENV", str(ROOT / ".state" / "engine-venv"))
    kept.setdefault("MODEL_CACHE_DIR", str(ROOT / ".state" / "models"))
    return {
        **kept, **ports, "MODE": "local", "APPLIANCE_STATE": str(state), "CERTIFICATES_DIR": str(own),
        "ENGINE_HANG_SECONDS": "120",  # a busy machine is none
    }  # fmt: skip


@pytest.fixture(scope="module")
def appliance(environment: dict[str, str]) -> Iterator[Appliance]:
    built = subprocess.run(
        [ROOT / "scripts" / "engine-cpu"], env=environment, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    started = time.monotonic()
    done = make(environment, "up")
    seconds = time.monotonic() - started
    try:
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        [key] = re.findall(r"First API key, shown this once: {2}(\S+)", done.stdout)
        yield Appliance(environment, done.stdout, key, seconds)
    finally:
        stopped = make(environment, "down")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert left_behind(environment) == []


def test_it_starts_in_time_and_tells_what_it_does(appliance: Appliance) -> None:
    print(f"started after {appliance.seconds:.0f} s")
    assert appliance.seconds < START_SECONDS
    assert "mode local" in appliance.told
    assert len(re.findall(r"^up: +\d+ s  engine: ", appliance.told, re.MULTILINE)) >= 2
    assert appliance.verb("status").returncode == 0


def test_the_printed_curl_says_paris(appliance: Appliance) -> None:
    command = "\n".join(line.strip() for line in appliance.told.partition("Try:")[2].splitlines() if line.strip())
    answer = subprocess.run(["bash", "-c", f"{command} -sS"], capture_output=True, text=True, check=True)
    assert "Paris" in json.loads(answer.stdout)["choices"][0]["message"]["content"]


def here(text: str, appliance: Appliance) -> str:
    """A command of the README with this test's port and certificate in place of the defaults."""
    return text.replace(":8443", f":{appliance.environment['HTTPS_PORT']}").replace(
        ".state/certificate.pem", appliance.certificate
    )


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_readmes_curl(appliance: Appliance) -> None:
    [command] = [block for block in blocks("sh") if block.startswith("curl")]
    answer = subprocess.run(
        ["bash", "-c", here(command.strip(), appliance) + " -sS"],
        env={**os.environ, "KEY": appliance.key}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "Paris" in json.loads(answer.stdout)["choices"][0]["message"]["content"]


def test_the_readmes_python(appliance: Appliance, tmp_path: Path) -> None:
    [program] = blocks("python")
    path = tmp_path / "readme.py"
    path.write_text(here(program, appliance))
    environment = {**os.environ, "KEY": appliance.key, "SSL_CERT_FILE": appliance.certificate}
    done = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_the_official_client_chats(appliance: Appliance) -> None:
    with appliance.openai() as client:
        answer = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": QUESTION}], temperature=0
        )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.total_tokens > 0


def test_the_official_client_streams_token_by_token(appliance: Appliance) -> None:
    """Nothing on the way holds chunks back: they arrive spread over the time of the answer, most of them one by one."""
    moments: list[float] = []
    text = ""
    with appliance.openai() as client:
        sent = time.monotonic()
        stream = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Count from one to twenty."}],
            temperature=0, max_tokens=60, stream=True,
        )  # fmt: skip
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                moments.append(time.monotonic())
                text += chunk.choices[0].delta.content
    assert len(moments) > 10
    assert text
    gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
    # An answer that was held would come at once: no time between its chunks, all of it before the first.
    # A busy machine may make this client look away for a few at a time.
    assert sum(gap > 0.001 for gap in gaps) > len(gaps) / 5
    assert moments[0] - sent < (moments[-1] - sent) * 0.8


def test_the_official_client_completes(appliance: Appliance) -> None:
    with appliance.openai() as client:
        answer = client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=5, temperature=0)
        parts = list(client.completions.create(model=MODEL, prompt="One, two,", max_tokens=5, stream=True))
    assert answer.choices[0].text
    assert any(part.choices[0].text for part in parts if part.choices)


def test_the_official_client_lists_models(appliance: Appliance) -> None:
    with appliance.openai() as client:
        assert [model.id for model in client.models.list()] == [MODEL]


def test_wrong_key_and_wrong_model(appliance: Appliance) -> None:
    with appliance.openai("sk-wrong-key-1234567890") as client, pytest.raises(openai.AuthenticationError) as refused:
        client.models.list()
    assert refused.value.code == "invalid_api_key"
    with appliance.openai() as client, pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="no-such-model", messages=[{"role": "user", "content": "hi"}])
    assert unknown.value.code == "model_not_found"


def test_nothing_inside_can_be_reached_through_the_edge(appliance: Appliance) -> None:
    context = ssl.create_default_context(cafile=appliance.certificate)
    with httpx.Client(base_url=appliance.url, verify=context) as client:
        for path in ("/metrics", "/admin/keys", "/invocations", "/tokenize", "/version", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 404, path
        assert client.get("/ready").status_code == 200

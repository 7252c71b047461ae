"""Starts the local path and waits until it answers; whatever goes wrong on the way, nothing stays behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from services.init import certificate, edge_local, secret_files

from . import plan, running
from .places import ROOT, Places, program
from .settings import LocalSettings
from .supervisor import Plan

HEARTBEAT_SECONDS = 15.0


class StartError(Exception):
    """The appliance could not be started; the message says why in a few lines."""


def say(text: str) -> None:
    """One line of progress."""
    print(f"up: {text}", flush=True)


def nginx_program(install: bool = True) -> Path:
    """nginx, installed first when that is possible. Raises `StartError` saying what to install when it is not."""
    found = program("nginx")
    if found is not None:
        return found
    if install and os.getuid() == 0 and program("apt-get") is not None:
        say("nginx is missing; installing it with apt-get")
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for argv in (
            ["apt-get", "-qq", "update"],
            ["apt-get", "-qq", "install", "-y", "--no-install-recommends", "nginx"],
        ):
            done = subprocess.run(argv, env=quiet, capture_output=True, text=True, check=False)
        found = program("nginx")
        if found is not None:
            # The package starts its own server on port 80; ours is another.
            if program("systemctl") is not None:
                subprocess.run(["systemctl", "disable", "--now", "nginx"], capture_output=True, check=False)
            return found
        raise StartError(f"nginx could not be installed: {_last_lines(done.stderr, 1)}")
    raise StartError("nginx is missing: install it (Debian, Ubuntu: sudo apt-get install nginx) and try again")


def prepare(settings: LocalSettings) -> None:
    """Folders and secrets, made once."""
    places = settings.places
    for folder in (places.gateway_data, places.gateway_secrets, places.engine_secrets, places.engine_cache):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for folder in (places.logs, places.run, places.prometheus_data, places.edge_config, places.certificates):
        folder.mkdir(parents=True, exist_ok=True)
    given = settings.environment.get
    secret_files.ensure(places.gateway_secrets / "vllm_api_key", given("VLLM_API_KEY"), 0o600)
    secret_files.ensure(places.gateway_secrets / "gateway_admin_key", given("GATEWAY_ADMIN_KEY"), 0o600)
    shared = (places.gateway_secrets / "vllm_api_key").read_text()
    secret_files.ensure(places.engine_secrets / "vllm_api_key", shared, 0o600)


def engine_parts(settings: LocalSettings) -> None:
    """vLLM's CPU build and the model; long the first time, and then it says what it does."""
    environment = {
        **os.environ,
        "ENGINE_VENV": str(plan.engine_venv(settings)),
        "MODEL_CACHE_DIR": str(plan.models(settings)),
        "ENGINE_PARTS": "venv model" if settings.embedded else "venv",
    }
    if subprocess.run([ROOT / "scripts" / "engine-cpu"], env=environment, check=False).returncode != 0:
        raise StartError("the engine could not be made ready (its reason stands above)")
    if not settings.embedded and not model_is_here(settings):
        fetching = plan.engine_environment(settings)
        token = settings.environment.get("HF_TOKEN", "").strip()
        fetching |= {"HF_TOKEN": token} if token else {}
        done = subprocess.run([plan.BIN / "engine", "fetch", settings.model], env=fetching, check=False)
        if done.returncode != 0:
            raise StartError(f"the model {settings.model} could not be fetched (its reason stands above)")


def model_is_here(settings: LocalSettings) -> bool:
    """Whether the model is a folder: by its path, or under the models' folder."""
    folders = (Path(settings.model).expanduser(), plan.models(settings) / settings.model)
    return any((folder / "config.json").is_file() for folder in folders)


def edge_files(settings: LocalSettings, kept: Plan) -> None:
    """Certificate and configuration, accepted by nginx itself."""
    assert kept.edge is not None
    try:
        edge_local.refresh(**kept.edge)
    except (certificate.CertificateError, ValueError, OSError) as bad:
        raise StartError(str(bad)) from None
    complaint = edge_local.test(str(kept.edge["nginx"]), str(settings.places.edge_config))
    if complaint is not None:
        raise StartError(f"nginx refuses its configuration: {complaint}")
    shutil.copyfile(settings.places.certificates / certificate.CHAIN, settings.places.trusted)


def prometheus_files(settings: LocalSettings) -> None:
    """Prometheus' configuration with this machine's addresses."""
    ports = settings.ports
    targets = {
        "nginx": ports.edge_status,
        "gateway": ports.gateway,
        "vllm": ports.vllm,
        "engine": ports.engine_status,
        "gpu": ports.gpu_exporter,
        "prometheus": ports.prometheus,
    }
    folder = settings.places.state / "prometheus-config"
    folder.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, str(ROOT / "prometheus" / "render"), "--out", str(folder)]
    argv += [f"{job}=127.0.0.1:{port}" for job, port in targets.items()]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StartError(f"Prometheus' configuration cannot be written: {_last_lines(done.stderr, 1)}")


def launch(places: Places, kept: Plan, name: str = running.NAME) -> subprocess.Popen[str]:
    """The supervisor, detached from this terminal; it owns everything from here on."""
    places.run.mkdir(parents=True, exist_ok=True)
    with (places.logs / f"{name}-supervisor.log").open("ab") as log:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "scripts.local.supervisor", name],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    assert supervisor.stdin is not None
    supervisor.stdin.write(kept.dump())
    supervisor.stdin.close()
    return supervisor


def wait_ready(settings: LocalSettings, supervisor: subprocess.Popen[str]) -> float:
    """Until the gateway says that a call would be admitted, telling what the engine does; the seconds it took.

    Raises `StartError` when it cannot become ready: the engine gave up, a service keeps dying, the time is over.
    """
    with interruption() as pressed:
        started = time.monotonic()
        shown, told_at = "", started
        while True:
            elapsed = time.monotonic() - started
            if supervisor.poll() is not None:
                raise StartError(_failure(settings, f"{running.NAME}-supervisor", "the supervisor ended"))
            if get(f"http://127.0.0.1:{settings.ports.gateway}/ready")[0] == 200 and _edge_answers(settings):
                return elapsed
            status = _engine_status(settings)
            if status.get("state") == "failed":
                reason = status.get("reason") or "see its log"
                raise StartError(_failure(settings, "vllm", f"the engine failed: {reason}"))
            _check_restarts(settings)
            now = engine_words(status)
            late = time.monotonic() - told_at > HEARTBEAT_SECONDS
            if now != shown or late:
                say(
                    f"{elapsed:4.0f} s  engine: {now}"
                    + (f"  ({str(status['line'])[:90]})" if late and status.get("line") else "")
                )
                shown, told_at = now, time.monotonic()
            if elapsed > settings.start_seconds:
                raise StartError(_failure(settings, "vllm", f"not ready after {elapsed:.0f} s (UP_SECONDS)"))
            if pressed.wait(0.5):
                raise KeyboardInterrupt


@contextmanager
def interruption() -> Iterator[threading.Event]:
    """Ctrl-C as an event: Python loses a `KeyboardInterrupt` that happens to be raised inside a destructor."""
    pressed = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def engine_words(status: dict[str, Any]) -> str:
    """The supervisor's `/status` in a few words."""
    words = [str(status[part]) for part in ("state", "phase", "reason") if status.get(part)]
    return ", ".join(words) or "starting"


def _check_restarts(settings: LocalSettings) -> None:
    found = running.running(settings.places)
    if found is None:
        return
    for name, restarts in found.restarts().items():
        if restarts >= 3 and name != "prometheus":
            raise StartError(_failure(settings, name, f"{name} keeps ending (exit {found.last_exit(name)})"))


def _edge_answers(settings: LocalSettings) -> bool:
    return get(f"http://127.0.0.1:{settings.ports.edge_status}/health")[0] == 200


def _engine_status(settings: LocalSettings) -> dict[str, Any]:
    status, body = get(f"http://127.0.0.1:{settings.ports.engine_status}/status")
    try:
        told = json.loads(body) if body else {}
    except ValueError:
        return {}
    return told if status in {200, 503} and isinstance(told, dict) else {}


def get(url: str) -> tuple[int, bytes]:
    """Status and body of a GET on this machine; status 0 when nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=3) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read()
    except OSError:
        return 0, b""


def _failure(settings: LocalSettings, name: str, what: str) -> str:
    log = settings.places.logs / f"{name}.log"
    try:
        tail = _last_lines(log.read_text(errors="replace"), 15)
    except OSError:
        tail = ""
    return f"{what}\n  from {log}:\n{tail}" if tail else what


def _last_lines(text: str, count: int) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(f"  {line}"[:400] for line in lines[-count:])


def cleaned(
    places: Places, supervisor: subprocess.Popen[str] | None = None, then: Callable[[], None] | None = None
) -> None:
    """Leave nothing of a start that failed, also when its supervisor has told nothing yet."""
    if supervisor is not None and supervisor.poll() is None:
        supervisor.terminate()
        with suppress(subprocess.TimeoutExpired):
            supervisor.wait(60)
    running.stop(places)
    if then is not None:
        then()

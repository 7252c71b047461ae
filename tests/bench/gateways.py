"""The contestants: how each is installed (in an environment of its own), started, and when it is ready.

`BENCH_PYTHON` names another interpreter, one that has the gateway's requirements, for our two and for peers that are
installed from then on: how CPython was built is worth a quarter of a call's instructions, and the images' one is built
with optimisation (docs/profile.md).

All get the same upstream and one core. Feature sets differ: ours and "plain Quart" run with keys, limits, a usage
ledger, metrics, logs and 10 % of traces; LiteLLM with a master key; the routers relay without keys; nginx only relays.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench import machine

PYTHON = os.environ.get("BENCH_PYTHON", sys.executable)
SOURCES = f"{machine.ROOT / 'services/gateway/src'}:{machine.ROOT}"
KEY = "sk-bench-0123456789abcdef"
PATH = "/v1/chat/completions"
VERSIONS = {"vllm-router": "vllm-router==0.1.17", "smg": "smg==1.13.0", "litellm": "litellm[proxy]==1.106.2"}


@dataclass
class Gateway:
    """One contestant. `exact`: it relays bytes, so that every byte can be compared."""

    name: str
    label: str
    start: Callable[[int, int, Path], tuple[list[str], dict[str, str]]]  # port, upstream port, folder -> argv, env
    health: str = "/health"
    exact: bool = True
    program: str | None = None  # of VERSIONS
    needs: str | None = None  # an executable from the system
    scheme: str = "http"
    extra: dict[str, str] = field(default_factory=dict)

    def missing(self) -> str | None:
        """Why it cannot run here, or None. Installs it if it can be installed."""
        if self.needs and shutil.which(self.needs) is None:
            return f"{self.needs} is not installed (Debian: apt-get install {self.needs})"
        if self.program and not installed(self.program):
            return f"{VERSIONS[self.program]} could not be installed (see {machine.STATE}/peers/{self.program}.log)"
        return None


def installed(program: str) -> bool:
    """Whether the peer is there, installing it the first time."""
    folder = machine.STATE / "peers" / program
    if (folder / "bin" / program).exists():
        return True
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"bench: installing {VERSIONS[program]}", flush=True)
    with (folder.parent / f"{program}.log").open("wb") as log:
        done = subprocess.run([PYTHON, "-m", "venv", folder], stdout=log, stderr=log, check=False).returncode
        pip = [folder / "bin/pip", "install", "-q", "--disable-pip-version-check", VERSIONS[program]]
        return done == 0 and subprocess.run(pip, stdout=log, stderr=log, check=False).returncode == 0


def _peer(program: str) -> str:
    return str(machine.STATE / "peers" / program / "bin" / program)


def ours(port: int, upstream: int, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Everything on; limits are high, so that each is computed and none refuses."""
    return [PYTHON, "-m", "gateway", "serve"], {
        "PYTHONPATH": SOURCES,
        "GATEWAY_PORT": str(port),
        "VLLM_URL": f"http://127.0.0.1:{upstream}",
        "GATEWAY_API_KEYS": f"bench={KEY}",
        "DATABASE_URL": f"sqlite:///{folder}/gateway.sqlite3",
        "DEFAULT_DAILY_TOKENS": "1000000000000",
        "DEFAULT_REQUESTS_PER_MINUTE": "100000000",
        "DEFAULT_TOKENS_PER_MINUTE": "1000000000000",
        "DEFAULT_CONCURRENCY": "100000",
        "IP_REQUESTS_PER_MINUTE": "100000000",
        "ENGINE_CONCURRENCY": "8192",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{upstream}",
        "TRACE_RATIO": "0.1",
        "KEEP_ALIVE_SECONDS": "0",  # comments of ours would count as changed bytes in slow streams
        "DRAIN_SECONDS": "0",
    }


def _ours_stock(port: int, upstream: int, folder: Path) -> tuple[list[str], dict[str, str]]:
    argv, environment = ours(port, upstream, folder)
    return argv, {**environment, "GATEWAY_SERVER": "stock"}


def _plain(port: int, upstream: int, folder: Path) -> tuple[list[str], dict[str, str]]:
    argv = [PYTHON, "-m", "tests.bench.plain_quart", str(port), str(upstream), str(folder)]
    return argv, {"PYTHONPATH": SOURCES, "BENCH_KEY": KEY}


def _nginx(port: int, upstream: int, folder: Path) -> tuple[list[str], dict[str, str]]:
    configuration = folder / "nginx.conf"
    configuration.write_text(f"""daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
worker_rlimit_nofile 16384;
events {{ worker_connections 8192; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  keepalive_requests 1000000;
  upstream double {{ server 127.0.0.1:{upstream}; keepalive 1024; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{ proxy_pass http://double; proxy_http_version 1.1; proxy_set_header Connection "";
                  proxy_buffering off; proxy_read_timeout 600s; }}
  }}
}}
""")
    return ["nginx", "-c", str(configuration), "-p", str(folder)], {}


def _vllm_router(port: int, upstream: int, folder: Path) -> tuple[list[str], dict[str, str]]:
    return [
        _peer("vllm-router"), "--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin",
        "--worker-urls", f"http://127.0.0.1:{upstream}", "--log-level", "warning",
        "--prometheus-port", str(machine.free_port()),
    ], {}  # fmt: skip


def _smg(port: int, upstream: int, folder: Path) -> tuple[list[str], dict[str, str]]:
    return [
        _peer("smg"), "launch", "--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin",
        "--worker-urls", f"http://127.0.0.1:{upstream}", "--log-level", "warn",
        "--prometheus-port", str(machine.free_port()),
    ], {}  # fmt: skip


def _litellm(port: int, upstream: int, folder: Path) -> tuple[list[str], dict[str, str]]:
    configuration = folder / "litellm.yaml"
    configuration.write_text(f"""model_list:
  - model_name: bench
    litellm_params: {{model: hosted_vllm/bench, api_base: "http://127.0.0.1:{upstream}/v1", api_key: none}}
general_settings: {{master_key: {KEY}}}
litellm_settings: {{telemetry: false, drop_params: false}}
""")
    argv = [_peer("litellm"), "--config", str(configuration), "--host", "127.0.0.1", "--port", str(port)]
    return argv, {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "OTEL_SDK_DISABLED": "true"}


ALL = {
    gateway.name: gateway
    for gateway in (
        Gateway("nginx", "nginx `proxy_pass` (the limit)", _nginx, needs="nginx"),
        Gateway("vllm-router", "vllm-router 0.1.17 (Rust)", _vllm_router, program="vllm-router"),
        Gateway("smg", "smg 1.13.0 (Rust)", _smg, program="smg"),
        Gateway("ours", "**this gateway, everything on**", ours, health="/ready"),
        Gateway("ours-stock", "this gateway on stock Hypercorn", _ours_stock, health="/ready"),
        Gateway("plain", "Quart on stock Hypercorn, features done the usual way", _plain),
        Gateway("litellm", "LiteLLM proxy 1.106.2 (Python)", _litellm, "/health/liveliness", False, "litellm"),
    )
}

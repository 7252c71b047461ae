"""Local mode's processes: the same path as in Compose, written down as argv and environment. No process starts here."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .places import ROOT, program
from .settings import LocalSettings
from .supervisor import Plan, Service
from .variables import SECRETS

BIN = ROOT / ".venv" / "bin"


def _without_secrets(settings: LocalSettings) -> dict[str, str]:
    """Whose variables they are not, they shall not see."""
    hidden = {*SECRETS, *(f"{name}_FILE" for name in SECRETS)}
    kept = {name: value for name, value in settings.environment.items() if name not in hidden}
    return {**kept, "PYTHONUNBUFFERED": "1"}


def _given(settings: LocalSettings, *names: str) -> dict[str, str]:
    both = [variant for name in names for variant in (name, f"{name}_FILE")]
    return {name: settings.environment[name] for name in both if settings.environment.get(name, "").strip()}


def gateway_environment(settings: LocalSettings, secrets: bool = True) -> dict[str, str]:
    """The gateway's environment; without `secrets` it can be checked before those exist."""
    ports, places = settings.ports, settings.places
    ours = {
        "GATEWAY_HOST": "127.0.0.1",
        "GATEWAY_PORT": str(ports.gateway),
        "VLLM_URL": f"http://127.0.0.1:{ports.vllm}",
        "GPU_EXPORTER_URL": f"http://127.0.0.1:{ports.gpu_exporter}",
    }
    given = _given(settings, "GATEWAY_API_KEYS", "DATABASE_URL", "BACKENDS")
    if not {"DATABASE_URL", "DATABASE_URL_FILE"} & set(given):
        ours["DATABASE_URL"] = f"sqlite:///{places.gateway_data / 'gateway.sqlite3'}"
    if secrets:
        ours |= {
            "VLLM_API_KEY_FILE": str(places.gateway_secrets / "vllm_api_key"),
            "GATEWAY_ADMIN_KEY_FILE": str(places.gateway_secrets / "gateway_admin_key"),
        }
    return {**_without_secrets(settings), **ours, **given}


def engine_environment(settings: LocalSettings) -> dict[str, str]:
    """The engine's environment: CPU build, offline, on the loopback."""
    ports, places = settings.ports, settings.places
    ours = {
        "MODEL_NAME": settings.model,
        "MODEL_CACHE_DIR": str(models(settings)),
        "ENGINE_VENV": str(engine_venv(settings)),
        "TP_SIZE": settings.environment.get("TP_SIZE", "").strip() or "1",
        "VLLM_HOST": "127.0.0.1",
        "VLLM_PORT": str(ports.vllm),
        "ENGINE_STATUS_HOST": "127.0.0.1",
        "ENGINE_STATUS_PORT": str(ports.engine_status),
        "VLLM_API_KEY_FILE": str(places.engine_secrets / "vllm_api_key"),
        "ENGINE_STATE_DIR": str(places.engine_cache),
    }
    # On a CPU compiling takes longer than a small model's whole day of answers would give back.
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "ENGINE_EAGER": "true"}
    chosen = {name: settings.environment.get(name, "").strip() or value for name, value in defaults.items()}
    return {**_without_secrets(settings), **ours, **chosen}


def models(settings: LocalSettings) -> Path:
    """Where models lie. Compose's default is a volume's name and no folder, hence the test for a path."""
    given = settings.environment.get("MODEL_CACHE_DIR", "").strip()
    return Path(given).expanduser().absolute() if "/" in given else settings.places.state / "models"


def engine_venv(settings: LocalSettings) -> Path:
    """Where vLLM's CPU build lies."""
    given = settings.environment.get("ENGINE_VENV", "").strip()
    return Path(given).expanduser().absolute() if given else settings.places.state / "engine-venv"


def edge_fields(settings: LocalSettings, run: str) -> dict[str, object]:
    """`nginx_conf.Edge` for local mode."""
    edge, ports, places = settings.edge, settings.ports, settings.places
    return {
        "gateway": f"127.0.0.1:{ports.gateway}",
        "resolver": None,
        "run": run,
        "access_log": str(places.logs / "edge-access.log"),
        "https_listen": f"{settings.edge_address}:{ports.https}",
        "http_listen": f"{settings.edge_address}:{ports.http}",
        "status_listen": f"127.0.0.1:{ports.edge_status}",
        "https_port": ports.https,
        "chain": str(places.certificates / "fullchain.pem"),
        "key": str(places.certificates / "privkey.pem"),
        "max_body_bytes": edge.max_body_bytes,
        "requests_per_second": edge.requests_per_second,
        "connections": edge.connections,
        "shutdown_seconds": 30,
        "workers": min(4, os.cpu_count() or 1),
        "hsts": edge.hsts,
    }


def edge_arguments(settings: LocalSettings, nginx: Path, run: str) -> dict[str, object]:
    """The arguments of `edge_local.refresh`."""
    return {
        "nginx": str(nginx),
        "own": str(settings.own_certificate),
        "served": str(settings.places.certificates),
        "config": str(settings.places.edge_config),
        "hosts": list(settings.edge.hosts),
        "edge": edge_fields(settings, run),
    }


def nginx_folder(settings: LocalSettings) -> tuple[Path, bool]:
    """Where nginx keeps bodies on their way; whether that lies outside the state folder.

    Started by root its workers are another user, who need not be able to reach the state folder.
    """
    if os.getuid() != 0:
        folder = settings.places.run / "nginx"
        folder.mkdir(parents=True, exist_ok=True)
        return folder, False
    folder = Path(tempfile.mkdtemp(prefix="appliance-edge-"))
    folder.chmod(0o711)
    return folder, True


def prometheus(settings: LocalSettings) -> Service | None:
    """Prometheus, where its program is; its configuration has been rendered by then."""
    path = program("prometheus")
    if path is None:
        return None
    return Service(
        "prometheus",
        [
            str(path),
            f"--config.file={settings.places.state / 'prometheus-config' / 'prometheus.yml'}",
            f"--storage.tsdb.path={settings.places.prometheus_data}",
            "--storage.tsdb.retention.size=2GB",
            f"--web.listen-address=127.0.0.1:{settings.ports.prometheus}",
            "--enable-feature=exemplar-storage",
        ],
        _without_secrets(settings),
    )


def whole(settings: LocalSettings, nginx: Path) -> Plan:
    """The whole path, in the order in which it starts."""
    run, outside = nginx_folder(settings)
    plain = _without_secrets(settings)
    services = [
        Service(
            "gpu-exporter",
            [str(BIN / "gpu-exporter")],
            {**plain, "GPU_EXPORTER_HOST": "127.0.0.1", "GPU_EXPORTER_PORT": str(settings.ports.gpu_exporter)},
            stop_seconds=10,
        ),
        Service("vllm", [str(BIN / "engine"), "serve"], engine_environment(settings), stop_seconds=60),
        Service("gateway", [str(BIN / "gateway"), "serve"], gateway_environment(settings), stop_seconds=45),
        Service(
            "nginx",
            [str(nginx), "-c", str(settings.places.edge_config / "nginx.conf"), "-p", str(run)],
            plain,
            stop_signal="SIGQUIT",
        ),
    ]
    watching = prometheus(settings)
    if watching is not None:
        services.insert(0, watching)  # stops last, so that it sees the end of the others
    return Plan(
        state=str(settings.places.state),
        services=services,
        edge=edge_arguments(settings, nginx, str(run)),
        ports=settings.ports.by_variable(),
        remove=[str(run)] if outside else [],
    )

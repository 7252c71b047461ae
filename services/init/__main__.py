"""`python -m services.init prepare`: make what is missing, once. `keep`: keep the certificate fresh.

Folders come by name: /own is the user's certificate folder (read only), all else is a volume under /volumes.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

from . import certificate, nginx_conf, secret_files, volumes
from .certificate import CertificateError
from .settings import EdgeSettings, SettingsError, read

VOLUMES = Path(os.environ.get("INIT_VOLUMES", "/volumes"))
OWN = Path(os.environ.get("INIT_OWN_CERTIFICATE", "/own"))
NGINX_UID = 101
GATEWAY_UID = 10001
ENGINE_UID = int(os.environ.get("ENGINE_UID", "10001"))
# Who writes each data volume: uid and gid as the images have them.
DATA_OWNERS = {
    "gateway-data": (GATEWAY_UID, GATEWAY_UID),
    "models": (ENGINE_UID, ENGINE_UID),
    "engine-cache": (ENGINE_UID, ENGINE_UID),
    "prometheus-data": (65534, 65534),
    "alertmanager-data": (65534, 65534),
    "grafana-data": (472, 0),
    "jaeger-data": (10001, 10001),
    "loki-data": (10001, 10001),
    "promtail-data": (0, 0),
    "edge-acme": (NGINX_UID, NGINX_UID),
}
# volume, file, variable that gives a value, uid that reads it
SECRETS = (
    ("gateway-secrets", "vllm_api_key", "VLLM_API_KEY", GATEWAY_UID),
    ("gateway-secrets", "gateway_admin_key", "GATEWAY_ADMIN_KEY", GATEWAY_UID),
    ("grafana-secrets", "admin_password", "GRAFANA_ADMIN_PASSWORD", 472),
)
RENEWAL_CHECK_SECONDS = 60.0


def say(event: str, **data: object) -> None:
    """One JSON line."""
    print(json.dumps({"service": "init", "event": event, **data}, default=str), flush=True)


def prepare(settings: EdgeSettings) -> None:
    """Everything that must be there before the other services start."""
    for name, (uid, gid) in DATA_OWNERS.items():
        if (VOLUMES / name).is_dir():
            volumes.own(VOLUMES / name, uid, gid)
    for volume, name, variable, uid in SECRETS:
        path = VOLUMES / volume / name
        made = secret_files.ensure(path, os.environ.get(variable))
        os.chown(path, uid, uid)
        (VOLUMES / volume).chmod(0o755)
        say("secret_kept" if not made else "secret_written", name=name)
    # The engine gets a copy of the one secret it shares with the gateway, and nothing else.
    shared = (VOLUMES / "gateway-secrets" / "vllm_api_key").read_text()
    secret_files.ensure(VOLUMES / "engine-secrets" / "vllm_api_key", shared)
    os.chown(VOLUMES / "engine-secrets" / "vllm_api_key", ENGINE_UID, ENGINE_UID)
    (VOLUMES / "engine-secrets").chmod(0o755)
    refresh(settings)


def refresh(settings: EdgeSettings) -> None:
    """The user's certificate or ours, where nginx reads it, and nginx's configuration to it."""
    served = VOLUMES / "edge-certificates"
    installed = certificate.install(OWN, served, settings.hosts)
    for name in (certificate.CHAIN, certificate.KEY):
        os.chown(served / name, NGINX_UID, NGINX_UID)
    volumes.own(served, NGINX_UID, NGINX_UID, 0o755)
    if installed.changed:
        say("certificate_installed", origin=installed.origin, ends=installed.ends.isoformat())
    ends = certificate.acme_ends(VOLUMES / "edge-acme") if settings.acme_email else installed.ends
    render_edge(settings, ends.timestamp() if ends is not None else None)


def render_edge(settings: EdgeSettings, certificate_ends: float | None) -> None:
    """nginx's configuration, one rendering for each range of versions; nginx/start.sh takes the right one."""
    edge = nginx_conf.Edge(
        https_port=settings.https_port,
        max_body_bytes=settings.max_body_bytes,
        requests_per_second=settings.requests_per_second,
        connections=settings.connections,
        hsts=settings.hsts,
        grafana="grafana:3000" if settings.grafana else None,
        grafana_metrics=f"grafana:3000{'/grafana' if settings.grafana else ''}/metrics",
        certificate_ends=certificate_ends,
        acme_email=settings.acme_email,
        acme_hosts=settings.hosts,
    )
    folder = VOLUMES / "edge-config"
    folder.mkdir(parents=True, exist_ok=True)
    for version in nginx_conf.RENDERED_FOR:
        if settings.acme_email and version < nginx_conf.UPSTREAM_RESOLVE:
            continue
        path = folder / f"nginx-{'.'.join(map(str, version))}.conf"
        text = nginx_conf.render(edge, version)
        if not path.exists() or path.read_text() != text:
            fresh = path.with_suffix(".new")
            fresh.write_text(text)
            fresh.replace(path)
            say("edge_rendered", nginx=".".join(map(str, version)))
    folder.chmod(0o755)


def keep(settings: EdgeSettings) -> None:
    """Take over a certificate that the user drops or replaces, and renew ours, for as long as we run."""
    waiting = threading.Event()
    told = ""
    while not waiting.wait(RENEWAL_CHECK_SECONDS):
        try:
            refresh(settings)
            told = ""
        except (CertificateError, OSError) as problem:
            if str(problem) != told:  # what is served stays served; say it once
                told = str(problem)
                say("certificate_refused", problem=told)


def main() -> int:
    """0 when done; 2 for bad variables or an unusable certificate, each told in one line."""
    verb = sys.argv[1] if len(sys.argv) == 2 else ""
    if verb not in {"prepare", "keep"}:
        print("usage: python -m services.init prepare|keep", file=sys.stderr)
        return 2
    try:
        settings = read(os.environ)
        prepare(settings) if verb == "prepare" else keep(settings)
    except SettingsError as bad:
        for problem in bad.problems:
            say("bad_variable", problem=problem)
        return 2
    except CertificateError as bad:
        say("bad_certificate", problem=str(bad))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

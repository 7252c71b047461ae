"""The edge of local mode: the same certificate and the same template, for the nginx of this machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

from . import certificate, nginx_conf

CONFIG = "nginx.conf"


def versions(nginx: str) -> tuple[nginx_conf.Version, nginx_conf.Version]:
    """nginx's version and that of its OpenSSL, from the program itself."""
    told = subprocess.run([nginx, "-V"], capture_output=True, text=True, check=True).stderr
    return nginx_conf.parse_version(told.splitlines()[0]), nginx_conf.openssl_version(told)


def refresh(*, nginx: str, own: str, served: str, config: str, hosts: list[str], edge: dict[str, object]) -> bool:
    """Certificate and configuration as they should be now; whether nginx has to read them again.

    `edge` are fields of `nginx_conf.Edge`. Raises `CertificateError` for a certificate of the user that cannot be
    served, `ValueError` for an nginx that is too old; nothing is changed then.
    """
    installed = certificate.install(Path(own), Path(served), tuple(hosts))
    described = nginx_conf.Edge(
        **{**edge, "certificate_ends": installed.ends.timestamp()}  # type: ignore[arg-type]
    )
    text = nginx_conf.render(described, *versions(nginx))
    path = Path(config) / CONFIG
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.read_text() == text:
        return installed.changed
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(path)
    return True


def test(nginx: str, config: str) -> str | None:
    """None when nginx accepts its configuration, else its complaint in one line."""
    done = subprocess.run(
        [nginx, "-t", "-q", "-c", str(Path(config) / CONFIG)], capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return None if done.returncode == 0 else (lines[-1] if lines else f"nginx -t ended with {done.returncode}")

"""The files of this checkout that containers read where they lie.

Compose sees no change in them and leaves a service running with what it read at its start, so `up` asks here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from .places import ROOT, Places

READ_BY = {
    "nginx": ("nginx/start.sh",),
    "prometheus": ("prometheus",),
    "alertmanager": ("alertmanager",),
    "grafana": ("grafana/provisioning", "grafana/dashboards"),
    "jaeger": ("jaeger",),
    "loki": ("loki",),
    "promtail": ("promtail",),
}


def digests(root: Path = ROOT) -> dict[str, str]:
    """Service → what its files amount to: names, contents, and whether they can be executed."""
    return {service: _digest(root, paths) for service, paths in READ_BY.items()}


def stale(where: Places, now: Mapping[str, str]) -> set[str]:
    """The services among `now` whose files are not those noted last; without a note nothing is known of any."""
    noted = _noted(where)
    return {service for service, digest in now.items() if noted.get(service) != digest}


def note(where: Places, now: Mapping[str, str]) -> None:
    """Remember that these services run with these files."""
    told = {**_noted(where), **now}
    where.state.mkdir(parents=True, exist_ok=True)
    where.mounted.write_text(json.dumps(told) + "\n")


def _noted(where: Places) -> dict[str, str]:
    try:
        return dict(json.loads(where.mounted.read_text()))
    except (OSError, ValueError, TypeError):  # none yet, or half of one after a full disk
        return {}


def _digest(root: Path, paths: tuple[str, ...]) -> str:
    found = hashlib.sha256()
    for path in paths:
        for file in sorted((root / path).rglob("*")) if (root / path).is_dir() else [root / path]:
            if file.is_file():
                mode = "x" if file.stat().st_mode & 0o111 else "-"
                content = hashlib.sha256(file.read_bytes()).hexdigest()
                found.update(f"{file.relative_to(root)} {mode} {content}\n".encode())
    return found.hexdigest()

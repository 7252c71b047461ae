"""The operator's variables: `.env`, overridden by the environment; names that nobody reads are mistakes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path

from .places import ROOT

_LINE = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)")
# What `.env` may hold beside what `.env.example` names: read by programs below us.
_OTHERS = re.compile(
    r"(HTTP|HTTPS|NO|ALL)_PROXY|(COMPOSE|DOCKER|PIP|UV|HF|VLLM|NCCL|TORCH|OMP|CUDA|NVIDIA|OTEL|GF)_[A-Z0-9_]+|TZ|PYTHON"
)
# Each can also be given as NAME_FILE, to a process of this machine.
SECRETS = (
    "GATEWAY_API_KEYS", "GATEWAY_ADMIN_KEY", "VLLM_API_KEY", "DATABASE_URL", "BACKENDS", "HF_TOKEN",
    "GRAFANA_ADMIN_PASSWORD", "ALERT_SMTP_PASSWORD", "ALERT_SLACK_URL", "ALERT_WEBHOOK_URL", "ALERT_HEARTBEAT_URL",
)  # fmt: skip
# A misspelt name in the environment of a shell is only ours to judge when it begins like one of ours.
_OURS = ("EDGE_", "APPLIANCE_", "GATEWAY_", "LETSENCRYPT_", "ENGINE_", "PROMETHEUS_", "GRAFANA_")


class VariablesError(Exception):
    """Variables that cannot be meant; `problems` has one line each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def parse(text: str, origin: str = ".env") -> dict[str, str]:
    """`KEY=VALUE` lines as Compose reads them: `#` comments, quotes around a value. Raises `VariablesError`."""
    values: dict[str, str] = {}
    problems: list[str] = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            problems.append(f"{origin} line {number} is not NAME=value: {line[:40]!r}")
            continue
        name, value = found[1], found[2].strip()
        quoted = re.fullmatch(r"""(['"])(.*?)\1(\s+#.*)?""", value)
        value = quoted[2] if quoted else re.sub(r"\s+#.*", "", value)
        values[name] = value
    if problems:
        raise VariablesError(problems)
    return values


def known() -> set[str]:
    """Every name that `.env.example` explains."""
    example = (ROOT / ".env.example").read_text()
    return set(re.findall(r"^#? ?([A-Z][A-Z0-9_]*)=", example, re.MULTILINE))


def load(environment: Mapping[str, str], file: Path | None = None) -> dict[str, str]:
    """The variables that hold: those of `.env` where the environment does not say otherwise. `VariablesError` else."""
    path = file if file is not None else ROOT / ".env"
    try:
        given = parse(path.read_text()) if path.exists() else {}
    except OSError as problem:
        raise VariablesError([f"{path} cannot be read: {problem.strerror}"]) from None
    except UnicodeDecodeError:
        raise VariablesError([f"{path} is not text (UTF-8)"]) from None
    names = known()
    problems = [_unknown(name, ".env", names) for name in given if not _is_known(name, names)]
    problems += [
        _unknown(name, "the environment", names)
        for name in environment
        if name.startswith(_OURS) and not _is_known(name, names)
    ]
    merged = {**given, **environment}
    problems += [
        f"{name} and {name}_FILE are both set: keep one"
        for name in sorted(SECRETS)
        if merged.get(name, "").strip() and merged.get(f"{name}_FILE", "").strip()
    ]
    if problems:
        raise VariablesError(problems)
    return merged


def not_for_containers(environment: Mapping[str, str]) -> list[str]:
    """What Compose would not pass on: the service would silently run with its default instead of what the file says."""
    return [
        f"{name}_FILE: a container does not see this file; give {name} itself (in .env, with chmod 600 .env)"
        for name in SECRETS
        if environment.get(f"{name}_FILE", "").strip()
    ]


def _is_known(name: str, names: set[str]) -> bool:
    return name in names or name.removesuffix("_FILE") in SECRETS or _OTHERS.fullmatch(name) is not None


def _unknown(name: str, origin: str, names: set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(names), n=1)
    return f"{name} in {origin} is not known" + (f"; did you mean {near[0]}?" if near else "; see .env.example")

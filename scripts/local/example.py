"""`.env.example` and the variables that compose.yaml passes on, written from the services' settings.

`python -m scripts.local.example` writes them; `--check` only compares.
"""

from __future__ import annotations

import importlib
import re
import sys

from pydantic_core import PydanticUndefined

from .places import ROOT

EXAMPLE = ROOT / ".env.example"
COMPOSE = ROOT / "compose.yaml"
SERVICES = {"gateway": "gateway.settings", "vllm": "engine.settings", "gpu-exporter": "gpu_exporter.settings"}
PASSED_ON = "      # Passed on when set; the defaults are the service's own."
# One process beside its database; the images know their own Python and device; only the download has the hub's token.
FIXED = {"GATEWAY_WORKERS", "SPOOL_DIR", "ENGINE_DEVICE", "VLLM_PYTHON", "ENGINE_VENV", "HF_TOKEN"}
# Several machines have Compose files of their own, and scripts/hosts writes what these need.
CLUSTER = {"ENGINE_NODES", "RAY_HEAD_ADDRESS", "RAY_NODE_ADDRESS", "RAY_PORT", "RAY_TOKEN"}
FIXED |= CLUSTER
SECTIONS = {
    "##@ The gateway: limits (0 = none), queue, deadlines, telling": "gateway.settings",
    "##@ The engine": "engine.settings",
    "##@ The GPU exporter": "gpu_exporter.settings",
}
# Addresses and files that Compose and local mode decide themselves.
DECIDED = {
    "GATEWAY_HOST", "GATEWAY_PORT", "GATEWAY_WORKERS", "VLLM_URL", "TRUSTED_PROXIES", "GPU_EXPORTER_URL",
    "GPU_EXPORTER_HOST", "SPOOL_DIR", "VLLM_HOST", "ENGINE_STATUS_HOST", "ENGINE_STATE_DIR", "VLLM_PYTHON",
    "ENGINE_DEVICE", "ENGINE_VENV", *CLUSTER,
}  # fmt: skip


def fields(module: str) -> dict[str, tuple[str, str]]:
    """Variable → (default, meaning) of one service's settings; empty when that service has none yet."""
    try:
        model = importlib.import_module(module).Settings
    except ImportError:
        return {}
    found: dict[str, tuple[str, str]] = {}
    for name, field in model.model_fields.items():
        default = (
            "" if field.default in (None, PydanticUndefined) else str(getattr(field.default, "value", field.default))
        )
        found[(field.alias or name).upper()] = (default, " ".join((field.description or "").split()))
    return found


def written(text: str) -> str:
    """`text` with the services' sections as their settings are now; variables explained elsewhere are left there."""
    for title, module in SECTIONS.items():
        head, found, rest = text.partition(title + "\n")
        if not found:
            raise ValueError(f"{EXAMPLE.name} has no section {title!r}")
        end = re.search(r"^##@ ", rest, re.MULTILINE)
        tail = rest[end.start() :] if end else ""
        elsewhere = set(re.findall(r"^#? ?([A-Z][A-Z0-9_]*)=", head + tail, re.MULTILINE))
        lines = []
        for name, (default, meaning) in fields(module).items():
            if name not in DECIDED and name not in elsewhere:
                lines += [f"# {meaning}", f"# {name}={default}"]
        text = f"{head}{title}\n" + "\n".join([*lines, "", ""]) + tail
    return text


def passed_on(text: str) -> str:
    """compose.yaml's `text` with every setting of each service passed on to its container where it is set."""
    for service, module in SERVICES.items():
        names = fields(module)
        if not names:
            continue
        start = text.index(f"\n  {service}:\n")
        mark = text.index(PASSED_ON, start) + len(PASSED_ON)
        end = mark
        while found := re.compile(r"\n      [A-Z0-9_]+:(?=\n)").match(text, end):
            end = found.end()
        fixed = set(re.findall(r"^      ([A-Z0-9_]+): ", text[start:mark], re.MULTILINE))
        fixed |= {name.removesuffix("_FILE") for name in fixed} | FIXED
        text = text[:mark] + "".join(f"\n      {name}:" for name in names if name not in fixed) + text[end:]
    return text


def main() -> int:
    """0 when the files are as they should be (or have been written so)."""
    fresh = {EXAMPLE: written(EXAMPLE.read_text()), COMPOSE: passed_on(COMPOSE.read_text())}
    stale = [path for path, text in fresh.items() if path.read_text() != text]
    if "--check" not in sys.argv:
        for path in stale:
            path.write_text(fresh[path])
        return 0
    for path in stale:
        print(f"example: {path.name} is stale: run python -m scripts.local.example", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())

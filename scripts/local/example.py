"""`.env.example`: the services' part is written from their settings (`python -m scripts.local.example`)."""

from __future__ import annotations

import importlib
import re
import sys

from pydantic_core import PydanticUndefined

from .places import ROOT

EXAMPLE = ROOT / ".env.example"
SECTIONS = {
    "##@ The gateway: limits (0 = none), queue, deadlines, telling": "gateway.settings",
    "##@ The engine": "engine.settings",
    "##@ The GPU exporter": "gpu_exporter.settings",
}
# Addresses and files that Compose and local mode decide themselves.
DECIDED = {
    "GATEWAY_HOST", "GATEWAY_PORT", "GATEWAY_WORKERS", "VLLM_URL", "TRUSTED_PROXIES", "GPU_EXPORTER_URL",
    "GPU_EXPORTER_HOST", "SPOOL_DIR", "VLLM_HOST", "ENGINE_STATUS_HOST", "ENGINE_STATE_DIR", "VLLM_PYTHON",
    "ENGINE_DEVICE", "ENGINE_VENV",
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


if __name__ == "__main__":
    fresh = written(EXAMPLE.read_text())
    if "--check" in sys.argv:
        sys.exit(0 if fresh == EXAMPLE.read_text() else "example: run python -m scripts.local.example")
    EXAMPLE.write_text(fresh)

"""The Prometheus text format 0.0.4, written for speed: a machine with eight GPUs has thousands of series.

prometheus_client writes it too, but renames a counter that does not end in `_total`, as DCGM's do not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Series(NamedTuple):
    """A family ready to be written: `rows` are (label text without braces, value)."""

    name: str
    kind: str
    help: str
    rows: list[tuple[str, float]]


def labels(pairs: Iterable[tuple[str, str]]) -> str:
    """The text between the braces."""
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs)


def render(families: Iterable[Series]) -> str:
    """The page for those families that have rows."""
    lines: list[str] = []
    for family in families:
        if family.rows:
            lines.append(f"# HELP {family.name} {family.help}")
            lines.append(f"# TYPE {family.name} {family.kind}")
            lines += [
                f"{family.name}{{{text}}} {number(value)}" if text else f"{family.name} {number(value)}"
                for text, value in family.rows
            ]
    return "\n".join(lines) + "\n" if lines else ""


def number(value: float) -> str:
    """A value without the noise of binary fractions: twelve digits, whole numbers in full."""
    return str(int(value)) if value == int(value) else f"{value:.12g}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')

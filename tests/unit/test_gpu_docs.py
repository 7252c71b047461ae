"""docs/gpu-exporter.md lists what the code has. `UPDATE_GOLDEN=1` writes its tables."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from gpu_exporter.collector import Health, render_health
from gpu_exporter.dcgm import FIELDS, XID
from gpu_exporter.native import FAMILIES, MIG_FAMILIES, Family
from gpu_exporter.settings import Settings

PAGE = Path(__file__).parents[2] / "docs/gpu-exporter.md"
# Health with something in every family.
FULL = Health(gpus={"GPU-1": (0, "lost")}, xids={("GPU-1", 0, "79"): (1, 2.0)}, failures={("nvmlInit", "unknown"): 1})


def families(rows: Iterable[Family]) -> list[str]:
    return [f"| `{r.name}` | {r.kind} | {', '.join(f'`{x}`' for x in r.labels)} | {r.help} |" for r in rows]


def variables() -> list[str]:
    rows = []
    for name, field in Settings.model_fields.items():
        default = "the host's name" if field.default_factory else f"`{field.default}`" if field.default != "" else ""
        rows.append(f"| `{name.upper()}` | {default} | {field.description} |")
    return rows


def health() -> list[str]:
    page = render_health(FULL, "native", 0.0)
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", page, re.MULTILINE))
    return [
        f"| `{name}` | {kinds[name]} | {text} |"
        for name, text in re.findall(r"^# HELP (\S+) (.*)$", page, re.MULTILINE)
    ]


TABLES = {
    "variables": variables,
    "families": lambda: families(FAMILIES),
    "mig": lambda: families(MIG_FAMILIES),
    "health": health,
    "dcgm": lambda: [f"| `{r.name}` | {r.kind} | {r.help} |" for r in (*FIELDS, XID)],
}


@pytest.mark.parametrize("table", TABLES)
def test_the_page_lists_what_the_code_has(table: str) -> None:
    rows = "\n".join(TABLES[table]())
    found = re.compile(rf"(<!-- {table} -->\n\|[^\n]*\n\|[^\n]*\n)(.*?)(<!-- end -->)", re.DOTALL)
    page = PAGE.read_text()
    if os.environ.get("UPDATE_GOLDEN"):
        page = found.sub(lambda old: f"{old[1]}{rows}\n{old[3]}", page, count=1)
        PAGE.write_text(page)
    ((_, written, _),) = found.findall(page)
    assert written == rows + "\n"

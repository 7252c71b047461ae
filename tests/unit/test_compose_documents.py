"""README and the pages about running: what they name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from scripts.local import settings, variables
from services.init.settings import EdgeSettings

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "docs/edge.md", "docs/running.md", "certificates/README.md"]
every_page = pytest.mark.parametrize("page", PAGES)


def text(page: str) -> str:
    return (ROOT / page).read_text()


@every_page
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", text(page))
    missing = [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()]
    assert missing == []


@every_page
def test_verbs_are_verbs(page: str) -> None:
    verbs = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", text(page))) | set(
        re.findall(r"^make ([a-z-]+)", text(page), re.MULTILINE)
    )
    assert named <= verbs
    scripts = set(re.findall(r"`(scripts/[a-z/._-]+[a-z])", text(page)))
    assert [script for script in scripts if not (ROOT / script).exists()] == []


@every_page
def test_variables_are_variables(page: str) -> None:
    known = variables.known() | set(settings.PORT_VARIABLES)
    named = set(re.findall(r"`([A-Z][A-Z0-9]*_[A-Z0-9_]+)(?:=[^`]*)?`", text(page)))
    others = {"SSL_CERT_FILE", "DAC_OVERRIDE"}  # of a client, of the kernel
    assert named - known - others == set()


def test_the_default_model_of_the_readme_is_the_one() -> None:
    assert f'"model": "{settings.EMBEDDED_MODEL}"' in text("README.md")


def test_limits_in_the_page_are_the_defaults() -> None:
    from services.init.settings import read

    edge: EdgeSettings = read({})
    page = text("docs/edge.md")
    assert f"| `EDGE_REQUESTS_PER_SECOND` | {edge.requests_per_second} |" in page
    assert f"| `EDGE_CONNECTIONS` | {edge.connections} |" in page
    assert f"| `MAX_BODY_BYTES` | {edge.max_body_bytes >> 20} MiB |" in page

"""docs/security.md and docs/comparison.md claim; every claim names a test that exists."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "security.md").read_text()
CLAIM = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@pytest.mark.parametrize("page", ["security", "comparison"])
def test_every_test_that_a_page_names_exists(page: str) -> None:
    claims = CLAIM.findall((REPOSITORY / "docs" / f"{page}.md").read_text())
    assert len(claims) > 10
    for file, name in claims:
        source = (REPOSITORY / file).read_text()
        assert re.search(rf"^(async )?def {name}\(", source, re.MULTILINE), f"{file}::{name} does not exist"


def test_every_threat_has_a_proof() -> None:
    for section in PAGE.split("\n## ")[1:]:
        title = section.partition("\n")[0]
        assert "Proof:" in section, f"{title}: no proof"
        assert CLAIM.search(section), f"{title}: no test is named"


def test_security_md_leads_to_the_page() -> None:
    assert "(docs/security.md)" in (REPOSITORY / "SECURITY.md").read_text()

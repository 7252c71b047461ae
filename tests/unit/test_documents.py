"""What the documents list is what the code has."""

import re
import subprocess
import sys
from pathlib import Path

LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
ROOT = Path(__file__).resolve().parents[2]


def test_generated_documents_are_up_to_date():
    done = subprocess.run([sys.executable, "scripts/generate", "--check"], cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr


def test_commands_for_alertmanager_are_run_where_its_program_is():
    pages = ["docs/operations.md", *(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/runbooks/*.md"))]
    commands = [
        (page, line) for page in pages for line in (ROOT / page).read_text().splitlines() if "amtool alert" in line
    ]

    assert len(commands) >= 2
    assert [one for one in commands if "docker compose exec alertmanager amtool alert" not in one[1]] == []


def test_links_between_documents_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    links = [(page, target) for page in pages for target in LINK.findall(page.read_text(encoding="utf-8"))]
    local = [
        (page, target) for page, target in links if "://" not in target and not target.startswith(("mailto:", "/d/"))
    ]  # /d/: pages of Grafana

    broken = [f"{page.relative_to(ROOT)} -> {target}" for page, target in local if not (page.parent / target).exists()]

    assert not broken

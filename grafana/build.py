"""Write grafana/dashboards/*.json: the boards, and every runbook as a page of its own.

    python -m grafana.build [--check]

`--check` writes nothing and fails when a file is not what its source says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from grafana.boards import engine, gateway, gpus, keys, logs, overview, slos
from grafana.panels import Board, Panel

HOME = Path(__file__).parent
RUNBOOKS = HOME.parent / "docs/runbooks"
BOARDS = tuple(module.BOARD for module in (overview, gateway, engine, gpus, keys, logs, slos))


def runbooks() -> list[Board]:
    """Each runbook as a dashboard: the alert's link works where nothing but the appliance is at hand."""
    boards = []
    for path in sorted(RUNBOOKS.glob("*.md")):
        title, _, body = path.read_text().partition("\n")
        headings = body.count("\n## ")
        page = Panel("", "", kind="text", width=24, height=6 + 14 * headings, text=body.strip())
        boards.append(
            Board(
                uid=f"runbook-{path.stem}",
                title=title.removeprefix("# "),
                why=f"docs/runbooks/{path.name}",
                rows=(("", (page,)),),
                refresh="",
                tags=("runbook",),
            )
        )
    return boards


def files() -> dict[Path, str]:
    """What is to be written, by path."""
    return {
        HOME / f"dashboards/{board.uid}.json": json.dumps(board.json(), indent=1, ensure_ascii=False) + "\n"
        for board in (*BOARDS, *runbooks())
    }


def main() -> int:
    """Write the files, or with `--check` compare them."""
    wanted = files()
    present = {path: path.read_text() for path in (HOME / "dashboards").glob("*.json")}
    if "--check" in sys.argv[1:]:
        stale = sorted(path.name for path in wanted.keys() | present.keys() if wanted.get(path) != present.get(path))
        if stale:
            print(f"grafana/build: run `python -m grafana.build`; not as its source says: {', '.join(stale)}")
        return int(bool(stale))
    (HOME / "dashboards").mkdir(exist_ok=True)
    for path, text in wanted.items():
        path.write_text(text)
    for path in present.keys() - wanted.keys():
        path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())

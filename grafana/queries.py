"""Every query that a dashboard asks, with Grafana's variables filled in, for those who ask them without Grafana."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from grafana.build import BOARDS
from grafana.panels import ANNOTATIONS


@dataclass(frozen=True)
class Asked:
    """One query of one panel, ready to be asked. `panel` is a title, or the name of an annotation or variable."""

    board: str
    panel: str
    expr: str
    source: str = "prometheus"

    @property
    def name(self) -> str:
        """Board and panel, to find it again."""
        return f"{self.board}: {self.panel}"


def filled(expr: str, window: str) -> str:
    """`expr` with `window` for Grafana's intervals and everything for a board's own variables."""
    expr = re.sub(r"\$__(rate_interval|range|auto|interval)\b", window, expr)
    return re.sub(r"\$(\w+)", ".*", expr)


def asked(window: str = "1m") -> Iterator[Asked]:
    """All queries of all boards, their variables and annotations."""
    for board in BOARDS:
        for panel in board.panels():
            for query in panel.queries:
                yield Asked(board.title, panel.title, filled(query.expr, window), query.source)
        for variable in board.variables:
            if variable.query:
                family = variable.query.removeprefix("label_values(").partition(",")[0]
                yield Asked(board.title, f"variable {variable.name}", family)
    for annotation in ANNOTATIONS:
        yield Asked("Every board", f"annotation {annotation['name']}", filled(annotation["expr"], window))

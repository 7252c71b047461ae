"""The words that dashboards are written in: queries, panels, boards, and how they become Grafana's JSON (schema v1).

Grafana 13 reads this classic schema and migrates it as it loads. Data sources are named by their pinned uids.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

SOURCES = {"prometheus": "prometheus", "loki": "loki"}
GREEN, YELLOW, RED, BLUE = "green", "#EAB839", "red", "blue"
# What has a meaning has one colour everywhere.
MEANING = {
    **dict.fromkeys(("ok", "2xx"), GREEN),
    **dict.fromkeys(("failed", "lost", "5xx"), RED),
    **dict.fromkeys(("refused", "4xx"), YELLOW),
    **dict.fromkeys(("rejected", "3xx"), "orange"),
    **dict.fromkeys(("cancelled", "1xx"), BLUE),
    **dict.fromkeys(("interrupted", "revoked"), "purple"),
}
Steps = tuple[tuple[float | None, str], ...]
BAD_AT_ONE: Steps = ((None, GREEN), (1, RED))
GOOD_AT_ONE: Steps = ((None, RED), (1, GREEN))


@dataclass(frozen=True)
class Query:
    """One query of a panel. `legend` is Grafana's legend format; `instant` asks for the newest value only."""

    expr: str
    legend: str = ""
    source: str = "prometheus"
    instant: bool = False
    exemplar: bool = False
    heatmap: bool = False

    def json(self, index: int) -> dict[str, Any]:
        """As Grafana's target."""
        target: dict[str, Any] = {
            "refId": chr(ord("A") + index),
            "datasource": {"type": self.source, "uid": SOURCES[self.source]},
            "expr": self.expr,
            "legendFormat": self.legend,
        }
        if self.source == "loki":
            return {**target, "queryType": "instant" if self.instant else "range"}
        return {
            **target,
            "instant": self.instant,
            "range": not self.instant,
            "exemplar": self.exemplar,
            "format": "heatmap" if self.heatmap else ("table" if self.instant and not self.legend else "time_series"),
        }


@dataclass(frozen=True)
class Panel:
    """One panel. `why` says what a reader learns from it; units are Grafana's unit ids."""

    title: str
    why: str
    queries: tuple[Query, ...] = ()
    kind: str = "timeseries"
    unit: str = "short"
    width: int = 8
    height: int = 8
    steps: Steps = ()
    stacked: bool = False
    minimum: float | None = 0
    maximum: float | None = None
    decimals: int | None = None
    words: dict[str, tuple[str, str]] = field(default_factory=dict)  # value to (text, colour)
    link: tuple[str, str] | None = None  # title and address
    text: str = ""
    calculation: str = "lastNotNull"
    options: dict[str, Any] = field(default_factory=dict)

    def json(self, number: int, x: int, y: int) -> dict[str, Any]:
        """As Grafana's panel at a place of the 24-column grid."""
        panel: dict[str, Any] = {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.why,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "targets": [query.json(index) for index, query in enumerate(self.queries)],
            "fieldConfig": {"defaults": self._field(), "overrides": self._colours()},
            "options": {**self._options(), **self.options},
        }
        if self.queries:
            panel["datasource"] = {"type": self.queries[0].source, "uid": SOURCES[self.queries[0].source]}
        if self.link is not None:
            panel["links"] = [{"title": self.link[0], "url": self.link[1]}]
        if self.kind == "table":
            hidden = dict.fromkeys(("Time", "__name__", "instance", "job"), True)
            panel["transformations"] = [{"id": "organize", "options": {"excludeByName": hidden}}]
        return panel

    def _colours(self) -> list[dict[str, Any]]:
        if not any(query.legend in ("{{outcome}}", "{{class}}") for query in self.queries):
            return []
        return [
            {
                "matcher": {"id": "byName", "options": name},
                "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}],
            }
            for name, colour in MEANING.items()
        ]

    def _field(self) -> dict[str, Any]:
        defaults: dict[str, Any] = {"unit": self.unit, "mappings": [], "color": {"mode": "palette-classic"}}
        if self.minimum is not None:
            defaults["min"] = self.minimum
        if self.maximum is not None:
            defaults["max"] = self.maximum
        if self.decimals is not None:
            defaults["decimals"] = self.decimals
        if self.words:
            options = {
                value: {"text": text, "color": colour, "index": index}
                for index, (value, (text, colour)) in enumerate(self.words.items())
            }
            defaults["mappings"] = [{"type": "value", "options": options}]
        steps = self.steps or ((None, GREEN if self.kind == "timeseries" else BLUE),)
        defaults["thresholds"] = {
            "mode": "absolute",
            "steps": [{"value": value, "color": colour} for value, colour in steps],
        }
        if self.kind == "timeseries":
            defaults["custom"] = {
                "lineWidth": 2,
                "fillOpacity": 30 if self.stacked else 8,
                "showPoints": "never",
                "spanNulls": False,
                "stacking": {"mode": "normal" if self.stacked else "none"},
                "thresholdsStyle": {"mode": "dashed" if self.steps else "off"},
            }
        elif self.steps or self.words:
            defaults["color"] = {"mode": "thresholds"}
        if self.kind == "state-timeline":
            defaults["custom"] = {"lineWidth": 0, "fillOpacity": 80}
        return defaults

    def _options(self) -> dict[str, Any]:
        match self.kind:
            case "timeseries":
                return {
                    "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
                    "tooltip": {"mode": "multi", "sort": "desc"},
                }
            case "stat":
                return {
                    "colorMode": "background" if self.steps or self.words else "value",
                    "graphMode": "area" if not self.words else "none",
                    "textMode": "auto",
                    "wideLayout": True,
                    "reduceOptions": {"calcs": [self.calculation], "fields": "", "values": False},
                }
            case "bargauge" | "gauge":
                return {
                    "orientation": "horizontal",
                    "displayMode": "gradient",
                    "reduceOptions": {"calcs": [self.calculation], "fields": "", "values": False},
                }
            case "logs":
                return {"showTime": True, "wrapLogMessage": True, "enableLogDetails": True, "sortOrder": "Descending"}
            case "text":
                return {"mode": "markdown", "content": self.text}
            case "heatmap":
                return {
                    "calculate": False,
                    "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
                    "yAxis": {"unit": self.unit},
                    "exemplars": {"color": "rgba(255,0,255,0.7)"},
                    "tooltip": {"mode": "single", "yHistogram": True},
                }
            case "state-timeline":
                return {"mergeValues": True, "showValue": "auto", "rowHeight": 0.85}
            case "alertlist":
                return {
                    "viewMode": "list",
                    "groupMode": "default",
                    "maxItems": 20,
                    "sortOrder": 3,
                    "stateFilter": {"firing": True, "pending": True, "normal": False, "noData": False, "error": True},
                    "alertInstanceLabelFilter": '{severity!="heartbeat"}',  # that one always fires
                    "datasource": "Prometheus",
                }
        return {}


@dataclass(frozen=True)
class Variable:
    """A choice at the top of a board, filled from a label's values or typed in."""

    name: str
    label: str
    query: str = ""  # label_values(...); empty: a text box

    def json(self) -> dict[str, Any]:
        """As Grafana's template variable."""
        if not self.query:
            return {
                "name": self.name,
                "label": self.label,
                "type": "textbox",
                "query": "",
                "current": {"text": "", "value": ""},
                "options": [{"selected": True, "text": "", "value": ""}],
            }
        return {
            "name": self.name,
            "label": self.label,
            "type": "query",
            "datasource": {"type": "prometheus", "uid": "prometheus"},
            "query": {"query": self.query, "refId": self.name},
            "definition": self.query,
            "refresh": 2,
            "includeAll": True,
            "allValue": ".*",
            "multi": True,
            "current": {"text": ["All"], "value": ["$__all"]},
            "sort": 1,
        }


@dataclass(frozen=True)
class Board:
    """One dashboard: rows of panels under headings."""

    uid: str
    title: str
    why: str
    rows: tuple[tuple[str, tuple[Panel, ...]], ...]
    variables: tuple[Variable, ...] = ()
    range: str = "now-1h"
    refresh: str = "15s"
    tags: tuple[str, ...] = ("appliance",)

    def panels(self) -> list[Panel]:
        """All panels, in reading order."""
        return [panel for _, panels in self.rows for panel in panels]

    def json(self) -> dict[str, Any]:
        """As Grafana's dashboard."""
        panels: list[dict[str, Any]] = []
        y = 0
        for heading, row in self.rows:
            if heading:
                grid = {"x": 0, "y": y, "w": 24, "h": 1}
                panels.append({"id": len(panels) + 1, "type": "row", "title": heading, "gridPos": grid, "panels": []})
                y += 1
            x = line = 0
            for panel in row:
                if x + panel.width > 24:
                    x, y, line = 0, y + line, 0
                panels.append(panel.json(len(panels) + 1, x, y))
                x, line = x + panel.width, max(line, panel.height)
            y += line
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.why,
            "tags": list(self.tags),
            "schemaVersion": 39,
            "version": 1,
            "editable": False,
            "graphTooltip": 1,
            "timezone": "browser",
            "time": {"from": self.range, "to": "now"},
            "refresh": self.refresh,
            "templating": {"list": [variable.json() for variable in self.variables]},
            "annotations": {"list": [*ANNOTATIONS]},
            "links": [
                {
                    "type": "dashboards",
                    "title": "Dashboards",
                    "tags": ["appliance"],
                    "asDropdown": True,
                    "keepTime": True,
                },
                {"type": "dashboards", "title": "Runbooks", "tags": ["runbook"], "asDropdown": True},
                {"type": "link", "title": "Traces", "url": "http://127.0.0.1:16686", "targetBlank": True},
            ],
            "panels": panels,
        }


def _annotation(name: str, expr: str, title: str, colour: str) -> dict[str, Any]:
    return {
        "name": name,
        "datasource": {"type": "prometheus", "uid": "prometheus"},
        "enable": True,
        "iconColor": colour,
        "expr": expr,
        "step": "30s",
        "titleFormat": title,
    }


# What changed, on every graph: a spike that begins at one of these lines has its cause there.
ANNOTATIONS = (
    _annotation("Restarts", "changes(process_start_time_seconds[1m]) > 0", "{{job}} restarted", BLUE),
    _annotation(
        "Deploys", "gateway_build_info unless gateway_build_info offset 2m", "gateway {{version}} deployed", "purple"
    ),
    _annotation(
        "Engine restarts", "sum by (reason) (increase(engine_restarts_total[1m])) > 0", "engine: {{reason}}", RED
    ),
    _annotation("Pages", 'ALERTS{alertstate="firing",severity="page"}', "{{alertname}}", "orange"),
)


def stat(title: str, why: str, expr: str, **options: Any) -> Panel:
    """One number, six of them in a line."""
    return Panel(title, why, (Query(expr),), kind="stat", **{"width": 4, "height": 4, **options})


def lines(title: str, why: str, *queries: Query, **options: Any) -> Panel:
    """Lines over time."""
    return Panel(title, why, queries, **options)


def quantiles(title: str, why: str, family: str, by: str = "", **options: Any) -> Panel:
    """p50, p95 and p99 of a histogram family, with exemplars; `by` restricts it (a label matcher)."""
    bucket = f"{family}_bucket{{{by}}}" if by else f"{family}_bucket"
    queries = tuple(
        Query(
            f"histogram_quantile({q}, sum by (le) (rate({bucket}[$__rate_interval])))",
            f"p{q * 100:.0f}",
            exemplar=q == 0.95,
        )
        for q in (0.5, 0.95, 0.99)
    )
    return Panel(title, why, queries, **{"unit": "s", **options})


def heatmap(title: str, why: str, family: str, **options: Any) -> Panel:
    """A histogram family over time, bucket by bucket."""
    query = Query(f"sum by (le) (rate({family}_bucket[$__rate_interval]))", "{{le}}", exemplar=True, heatmap=True)
    return Panel(title, why, (query,), kind="heatmap", **{"unit": "s", **options})


def logs(expr: str, legend: str = "", **options: Any) -> Query:
    """A query to Loki."""
    return replace(Query(expr, legend, source="loki"), **options)

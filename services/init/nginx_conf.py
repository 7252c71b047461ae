"""Renders `nginx/nginx.conf.in` for the nginx at hand. Pure: settings and a version in, text out.

One template serves the pinned image and older packaged nginx in local mode. What differs by version is decided
here: `http2 on` exists since 1.25.1 (before: a word of `listen`), `server … resolve` in open source since 1.27.3.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

TEMPLATE = Path(__file__).resolve().parents[2] / "nginx" / "nginx.conf.in"
HTTP2_DIRECTIVE = (1, 25, 1)
UPSTREAM_RESOLVE = (1, 27, 3)
# Each starts a range of versions with one rendering; nginx/start.sh takes the last that its nginx has reached.
RENDERED_FOR = ((1, 22, 0), HTTP2_DIRECTIVE, UPSTREAM_RESOLVE)
OLDEST = RENDERED_FOR[0]
OPTIONAL_CURVES_OPENSSL = (3, 3)  # knows `?name`: take it if it is there; the hybrid itself came with 3.5
READ_SECONDS = 3600

Version = tuple[int, ...]

# status → (type, code, message) of answers that nginx makes itself, in OpenAI's shape.
ERRORS: dict[int, tuple[str, str, str]] = {
    400: ("invalid_request_error", "invalid_request", "The request could not be read as HTTP."),
    403: ("invalid_request_error", "unknown_route", "This route is not served here."),
    404: ("invalid_request_error", "unknown_route", "There is no such route. The API lives under /v1/."),
    405: ("invalid_request_error", "invalid_request", "This method is not allowed here."),
    408: ("invalid_request_error", "invalid_request", "The request did not arrive in time."),
    413: (
        "invalid_request_error",
        "request_too_large",
        "The request body is larger than {max_body_bytes} bytes.",
    ),
    414: ("invalid_request_error", "invalid_request", "The request line is too long."),
    429: ("rate_limit_error", "rate_limit_exceeded", "Too many requests or connections from this address."),
    431: ("invalid_request_error", "invalid_request", "The request headers are too large."),
    500: ("server_error", "upstream_error", "The edge could not handle the request."),
    502: ("server_error", "upstream_error", "The gateway cannot be reached; it may be restarting."),
    503: ("server_error", "shutting_down", "The service is not available now."),
    504: ("server_error", "upstream_timeout", "The gateway did not answer in time."),
}
# nginx's private codes: 494 header too large, 497 plain HTTP on the TLS port.
PRIVATE_CODES = {431: (494,), 400: (497,)}


@dataclass(frozen=True, slots=True)
class Edge:
    """What the edge's configuration depends on. Folders must exist and be writable."""

    gateway: str = "gateway:8080"
    resolver: str | None = "127.0.0.11"  # None: the gateway's address is an IP and needs no look-up
    run: str = "/tmp"  # noqa: S108 - in the container /tmp is its own small tmpfs
    access_log: str = "/dev/stdout"
    log_level: str = "warn"
    https_listen: str = "8443"
    http_listen: str = "8080"
    status_listen: str = "8081"
    https_port: int = 443  # as clients see it, for the redirect
    chain: str = "/etc/edge/certificates/fullchain.pem"
    key: str = "/etc/edge/certificates/privkey.pem"
    max_body_bytes: int = 20_971_520
    requests_per_second: int = 100  # per client address; 0 = none
    connections: int = 512  # per client address; with HTTP/2 each running call counts; 0 = none
    shutdown_seconds: int = 3600  # an answer that runs when a certificate is replaced may take this long
    upstream_keepalive_seconds: int = 60  # below the gateway's 75
    hsts: bool = False
    grafana: str | None = None  # host:port to show under /grafana/, None: not at the edge
    grafana_metrics: str | None = None  # host:port/path where Grafana's metrics are, for Prometheus
    certificate_ends: float | None = None  # Unix seconds, for the metric; None: not known here
    acme_email: str | None = None
    acme_hosts: tuple[str, ...] = ()
    acme_state: str = "/var/lib/edge-acme"
    acme_directory: str = "https://acme-v02.api.letsencrypt.org/directory"
    foreground: bool = True
    workers: int = 4  # enough to saturate a gateway; one a core would cost memory on large machines


def parse_version(text: str) -> Version:
    """The version in `nginx -v`'s line, in an image's tag or plain; `ValueError` when there is none."""
    found = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    if found is None:
        raise ValueError(f"no version in {text!r}")
    return tuple(int(part or 0) for part in found.groups())


def openssl_version(text: str) -> Version:
    """OpenSSL's version as `nginx -V` tells it, the running one where both are told; (0, 0) when unknown."""
    found = re.findall(r"OpenSSL (\d+)\.(\d+)", text)
    return (int(found[-1][0]), int(found[-1][1])) if found else (0, 0)


def render(edge: Edge, version: Version, openssl: Version | None = None) -> str:
    """The whole configuration. `openssl` unknown (None): as the official image of that version has it."""
    if version < OLDEST:
        raise ValueError(f"nginx {'.'.join(map(str, version))} is too old; 1.22 or newer is needed")
    hybrid = openssl >= OPTIONAL_CURVES_OPENSSL if openssl is not None else version >= UPSTREAM_RESOLVE
    acme = bool(edge.acme_email and edge.acme_hosts)
    if acme and version < UPSTREAM_RESOLVE:
        raise ValueError("certificates from Let's Encrypt need the pinned nginx image (its ACME module)")
    values = {
        "modules": "load_module modules/ngx_http_acme_module.so;" if acme else "",
        "daemon": "daemon off;" if edge.foreground else "",
        "run": edge.run,
        "workers": str(edge.workers),
        "log_level": edge.log_level,
        "access_log": edge.access_log,
        "shutdown_seconds": str(edge.shutdown_seconds),
        "max_body_bytes": str(edge.max_body_bytes),
        "limit_zones": _limit_zones(edge),
        "limits": _limits(edge),
        "curves": ("?X25519MLKEM768:" if hybrid else "") + "X25519:prime256v1:secp384r1",
        "gateway_server": _gateway_server(edge, version),
        "upstream_keepalive_seconds": str(edge.upstream_keepalive_seconds),
        "acme": _acme_issuer(edge) if acme else "",
        "metrics": _metrics(edge),
        "status_listen": edge.status_listen,
        "http_listen": edge.http_listen,
        "https_port_suffix": "" if edge.https_port == 443 else f":{edge.https_port}",
        "https_listen": _https_listen(edge, version),
        "certificate": _acme_certificate(edge) if acme else _certificate(edge),
        "strict_transport": (
            "        add_header Strict-Transport-Security max-age=63072000 always;" if edge.hsts else ""
        ),
        "error_pages": _error_pages(edge),
        "grafana": _grafana(edge),
        "grafana_metrics": _grafana_metrics(edge),
        "read_seconds": str(READ_SECONDS),
    }
    text = re.sub(r"@\{([a-z0-9_]+)\}", lambda name: values[name[1]], TEMPLATE.read_text())
    return re.sub(r"\n{3,}", "\n\n", text)


def _limit_zones(edge: Edge) -> str:
    lines = []
    if edge.requests_per_second:
        rate = edge.requests_per_second
        lines.append(f"limit_req_zone $binary_remote_addr zone=edge_requests:10m rate={rate}r/s;")
    if edge.connections:
        lines.append("limit_conn_zone $binary_remote_addr zone=edge_connections:10m;")
    return _indented(lines, 4)


def _limits(edge: Edge) -> str:
    lines = []
    if edge.requests_per_second:
        lines.append(f"limit_req zone=edge_requests burst={2 * edge.requests_per_second} nodelay;")
    if edge.connections:
        lines.append(f"limit_conn edge_connections {edge.connections};")
    return _indented(lines, 8)


def _gateway_server(edge: Edge, version: Version) -> str:
    # One server only, so a failure must not take it out of rotation: max_fails=0.
    if edge.resolver is None or version < UPSTREAM_RESOLVE:
        # An older nginx looks the name up when it (re)loads; start.sh reloads it when the address changes.
        return _indented([f"server {edge.gateway} max_fails=0;"], 8)
    return _indented(
        [
            "zone gateway 64k;",
            f"resolver {edge.resolver} valid=5s ipv6=off;",
            f"server {edge.gateway} resolve max_fails=0;",
        ],
        8,
    )


def _https_listen(edge: Edge, version: Version) -> str:
    if version < HTTP2_DIRECTIVE:
        return _indented([f"listen {edge.https_listen} ssl http2 default_server;"], 8)
    return _indented([f"listen {edge.https_listen} ssl default_server;", "http2 on;"], 8)


def _certificate(edge: Edge) -> str:
    return _indented([f"ssl_certificate {edge.chain};", f"ssl_certificate_key {edge.key};"], 8)


def _acme_issuer(edge: Edge) -> str:
    return _indented(
        [
            f"resolver {edge.resolver or '127.0.0.11'} ipv6=off;",
            "acme_shared_zone zone=acme:1m;",
            "acme_issuer letsencrypt {",
            f"    uri {edge.acme_directory};",
            f"    contact mailto:{edge.acme_email};",
            f"    state_path {edge.acme_state};",
            "    accept_terms_of_service;",
            "}",
        ],
        4,
    )


def _acme_certificate(edge: Edge) -> str:
    return _indented(
        [
            f"acme_certificate letsencrypt {' '.join(edge.acme_hosts)};",
            "ssl_certificate $acme_certificate;",
            "ssl_certificate_key $acme_certificate_key;",
            "ssl_certificate_cache max=2;",
        ],
        8,
    )


def _error_pages(edge: Edge) -> str:
    # Not named locations: those need a URI, and what could not even be parsed has none.
    lines = []
    for status, (kind, code, message) in ERRORS.items():
        text = message.format(max_body_bytes=edge.max_body_bytes)
        body = json.dumps({"error": {"message": text, "type": kind, "code": code, "param": None}})
        quoted = body.replace("'", "\\'")
        lines += [
            f"error_page {status} /edge-error/{status};",
            *(f"error_page {private} ={status} /edge-error/{status};" for private in PRIVATE_CODES.get(status, ())),
            f"location = /edge-error/{status} {{",
            "    internal;",
            f"    return {status} '{quoted}';",
            "}",
        ]
    return _indented(lines, 8)


def _metrics(edge: Edge) -> str:
    """Prometheus text that nginx fills in itself; `\\n` is nginx's own escape."""
    lines = ["# HELP edge_connections Client connections at nginx by state.", "# TYPE edge_connections gauge"]
    states = ("active", "reading", "writing", "waiting")
    lines += [f'edge_connections{{state="{state}"}} $connections_{state}' for state in states]
    if edge.certificate_ends is not None:
        name = "edge_certificate_not_after_timestamp_seconds"
        lines += [f"# HELP {name} When the certificate ends, Unix seconds.", f"# TYPE {name} gauge"]
        lines.append(f"{name} {edge.certificate_ends:.0f}")
    return "".join(f"{line}\\n" for line in lines)


def _grafana(edge: Edge) -> str:
    if edge.grafana is None:
        return ""
    lines = ["location = /grafana/metrics {", "    return 404;", "}"]  # Grafana shows them to everybody
    lines += ["location /grafana/ {", *_pass_to(edge, edge.grafana)]
    # Its own set of headers replaces the server's, so the client's address has to be said again.
    headers = {
        "Host": "$host",
        "X-Forwarded-For": "$remote_addr",
        "X-Forwarded-Proto": "https",
        "Connection": '""',
    }
    lines += [f"    proxy_set_header {name} {value};" for name, value in headers.items()] + ["}"]
    return _indented(lines, 8)


def _grafana_metrics(edge: Edge) -> str:
    """Grafana under a path redirects whoever asks for `/metrics` to its public address; Prometheus asks here."""
    if edge.grafana_metrics is None:
        return ""
    return _indented(["location = /grafana-metrics {", *_pass_to(edge, edge.grafana_metrics), "}"], 8)


def _pass_to(edge: Edge, address: str) -> list[str]:
    # A variable makes nginx look the name up at each call, so that the edge starts without Grafana.
    if edge.resolver is None:
        return [f"    proxy_pass http://{address};"]
    return [
        f"    resolver {edge.resolver} valid=5s ipv6=off;",
        f"    set $edge_grafana {address};",
        "    proxy_pass http://$edge_grafana;",
    ]


def _indented(lines: list[str], columns: int) -> str:
    return "\n".join(" " * columns + line for line in lines)

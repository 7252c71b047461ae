"""`make doctor` against a local appliance whose state, settings and answers are given: what it finds, what it mends."""

import datetime as dt
import http.server
import json
import os
import socket
import sqlite3
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tests.doubles.ports import free_ports

REPOSITORY = Path(__file__).resolve().parents[2]
Doctor = Callable[..., tuple[int, dict[str, list[dict[str, str]]]]]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The state of a local appliance that has run once."""
    state = tmp_path / "state"
    for name in ("gateway-data", "gateway-secrets"):
        (state / name).mkdir(parents=True)
    secret = state / "gateway-secrets" / "vllm_api_key"
    secret.write_text("a secret")
    secret.chmod(0o600)
    with sqlite3.connect(state / "gateway-data" / "gateway.sqlite3") as ledger:
        ledger.execute("CREATE TABLE usage_records (request_id TEXT, filler TEXT)")
        ledger.executemany("INSERT INTO usage_records VALUES (?, ?)", [(str(n), "x" * 200) for n in range(500)])
    ledger.close()
    return state


@pytest.fixture
def doctor(state: Path) -> Doctor:
    """Runs the verb; its status, and its findings by area."""

    def examine(**environment: str) -> tuple[int, dict[str, list[dict[str, str]]]]:
        ports = dict(zip(("HTTPS_PORT", "HTTP_PORT", "PROMETHEUS_PORT"), map(str, free_ports(3)), strict=True))
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("GATEWAY_", "VLLM_"))}
        done = subprocess.run(
            [REPOSITORY / "scripts" / "doctor", "--json"],
            env={**clean, "MODE": "local", "APPLIANCE_STATE": str(state), **ports, **environment},
            capture_output=True,
            text=True,
            timeout=240,
        )
        found: dict[str, list[dict[str, str]]] = {}
        for line in done.stdout.splitlines():
            finding = json.loads(line)
            found.setdefault(finding["area"], []).append(finding)
        return done.returncode, found

    return examine


def test_a_sound_stopped_appliance_has_nothing_wrong(doctor: Doctor) -> None:
    status, found = doctor()
    assert [one for findings in found.values() for one in findings if one["verdict"] == "wrong"] == []
    assert status == 0
    assert found["ledger"][0]["what"] == "whole, 500 records"
    assert found["service"][0]["mend"] == "make up"


def test_it_changes_nothing(doctor: Doctor, state: Path) -> None:
    def picture() -> dict[str, tuple[int, bytes]]:
        files = [path for path in state.rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    def tree() -> set[str]:
        told = subprocess.run(
            ["git", "status", "--porcelain", "--ignored"], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout
        return {line for line in told.splitlines() if not line.endswith("__pycache__/")}  # Python's, on the first run

    before = picture(), tree()
    doctor()
    assert (picture(), tree()) == before


def test_a_mistyped_variable_is_named_with_the_right_one(doctor: Doctor) -> None:
    status, found = doctor(GATEWAY_PROT="8080")
    assert status == 1
    assert found["settings"][0]["verdict"] == "wrong"
    assert "GATEWAY_PORT" in found["settings"][0]["what"]


def test_a_secret_that_others_can_read_is_wrong_and_mended_by_the_command_it_gives(doctor: Doctor, state: Path) -> None:
    (state / "gateway-secrets" / "vllm_api_key").chmod(0o644)
    status, found = doctor()
    assert status == 1
    assert "vllm_api_key" in found["secrets"][0]["what"]
    subprocess.run(found["secrets"][0]["mend"], shell=True, check=True)
    assert doctor()[0] == 0


def test_a_port_that_somebody_else_has_is_told(doctor: Doctor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, found = doctor(HTTPS_PORT=str(port))
    assert status == 1
    assert f"port {port} is taken" in found["ports"][0]["what"]
    assert "HTTPS_PORT" in found["ports"][0]["mend"]


def test_a_damaged_ledger_points_to_restore(doctor: Doctor, state: Path) -> None:
    ledger = state / "gateway-data" / "gateway.sqlite3"
    content = bytearray(ledger.read_bytes())
    content[8192:40960] = b"\xff" * 32768
    ledger.write_bytes(content)
    status, found = doctor()
    assert status == 1
    assert found["ledger"][0]["verdict"] == "wrong"
    assert found["ledger"][0]["mend"].startswith("make restore")


def certificate(folder: Path, ends: dt.datetime, host: str) -> Path:
    """A self-signed pair in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    leaf = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(ends - dt.timedelta(days=90))
        .not_valid_after(ends)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / "pair.pem"
    path.write_bytes(leaf.public_bytes(serialization.Encoding.PEM) + private)
    return path


class Ready(http.server.BaseHTTPRequestHandler):
    """An edge that says the engine is away."""

    def do_GET(self) -> None:
        body = b'{"ready": false, "cause": "no_backend"}'
        self.send_response(503)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def edge(state: Path, tmp_path: Path) -> Iterator[Callable[[dt.datetime], int]]:
    """Starts an edge with a certificate that ends when it is told; the ledger is open, as a gateway has it."""
    servers: list[http.server.ThreadingHTTPServer] = []
    ledger = sqlite3.connect(state / "gateway-data" / "gateway.sqlite3")
    ledger.execute("SELECT count(*) FROM usage_records").fetchone()

    def start(ends: dt.datetime) -> int:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate(tmp_path, ends, "llm.example"))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ready)
        # The handshake belongs to the connection's own thread: a bare probe of the port must not stop the server.
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return int(server.server_address[1])

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
    ledger.close()


def test_a_running_appliance_that_is_not_ready_tells_its_cause(
    doctor: Doctor, edge: Callable[[dt.datetime], int]
) -> None:
    port = edge(dt.datetime.now(dt.UTC) + dt.timedelta(days=60))
    _, found = doctor(HTTPS_PORT=str(port), APPLIANCE_HOSTS="llm.example")
    assert "no_backend" in found["service"][0]["what"]
    assert found["certificate"][0]["verdict"] == "ok"


@pytest.mark.parametrize(("days", "hosts", "told"), [(-1, "", "ended"), (5, "", "ends"), (60, "other.example", "name")])
def test_a_certificate_that_will_not_do_is_wrong(
    doctor: Doctor, edge: Callable[[dt.datetime], int], days: int, hosts: str, told: str
) -> None:
    port = edge(dt.datetime.now(dt.UTC) + dt.timedelta(days=days))
    status, found = doctor(HTTPS_PORT=str(port), APPLIANCE_HOSTS=hosts)
    assert status == 1
    assert found["certificate"][0]["verdict"] == "wrong"
    assert told in found["certificate"][0]["what"]
    assert "certificates/" in found["certificate"][0]["mend"]


def test_a_ledger_that_cannot_be_opened_is_not_called_damaged(doctor: Doctor, state: Path) -> None:
    """Whoever may not read it must not be sent to restore a sound one."""
    ledger = state / "gateway-data" / "gateway.sqlite3"
    ledger.unlink()
    ledger.mkdir()  # as unreadable as a file of somebody else, also for root
    status, found = doctor()
    assert status == 1
    assert found["ledger"][0]["what"].startswith("cannot be looked at: ")
    assert "restore" not in found["ledger"][0]["mend"]


@pytest.mark.parametrize(("said", "told"), [
    ("Cannot connect to the Docker daemon at unix:///var/run/docker.sock.", "does not answer: Cannot connect"),
    ("permission denied while trying to connect to the Docker daemon socket", "refuses this user"),
])  # fmt: skip
def test_where_docker_is_silent_nothing_is_said_of_what_it_holds(
    doctor: Doctor, tmp_path: Path, said: str, told: str
) -> None:
    """Data of local mode that happens to lie here is not the appliance's."""
    program = tmp_path / "bin" / "docker"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    program.chmod(0o755)
    status, found = doctor(MODE="cpu", PATH=f"{program.parent}:{os.environ['PATH']}")
    assert status == 1
    assert told in found["docker"][0]["what"]
    assert "cannot be asked" in found["service"][0]["what"]
    assert found["ledger"][0]["what"] == "not looked at: no appliance found"

"""The appliance itself: settings, containers, its answer, its certificate, its ledger, its backups."""

import datetime as dt
import getpass
import http.client
import json
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from scripts.daytwo.doctor.finding import Finding, note, ok, wrong
from scripts.daytwo.doctor.situation import Situation
from scripts.daytwo.place import restarts, run, service_of
from scripts.local import variables

SECRET_FOLDERS = ("gateway-secrets", "engine-secrets", "grafana-secrets")
SECRET_NAMES = ("KEY", "TOKEN", "PASSWORD", "SECRET")
SOON = dt.timedelta(days=14)
OLD_BACKUP = dt.timedelta(days=7)
LEDGER_QUERY = """
import json, sqlite3, sys
count = lambda query: book.execute(query).fetchone()[0]
try:
    book = sqlite3.connect("file:" + sys.argv[1] + "?mode=ro", uri=True, timeout=30)
    found = {"verdict": count("PRAGMA quick_check(1)"), "records": count("SELECT count(*) FROM usage_records")}
except sqlite3.OperationalError as problem:  # nothing is known of the file itself: no permission, locked
    found = {"unread": str(problem)}
except sqlite3.DatabaseError as problem:
    found = {"verdict": str(problem)}
print(json.dumps(found))
"""


def settings(situation: Situation) -> Iterator[Finding]:
    """What the gateway itself says of its variables."""
    if situation.unread:
        mend = f"make it readable for {getpass.getuser()}, or run this as its owner"
        yield wrong("settings", f"{situation.repository / '.env'} cannot be read: {situation.unread}", mend)
    for line in [] if situation.local else variables.not_for_containers(situation.settings):
        yield wrong("settings", line, "correct .env")
    program = Path(sys.executable).with_name("gateway")
    if not program.exists():
        yield note("settings", "not checked: the Python environment is missing", "make setup")
        return
    done = subprocess.run([program, "check"], env=situation.settings, capture_output=True, text=True, timeout=60)
    if done.returncode == 2:
        for line in (done.stderr or done.stdout).strip().splitlines():
            yield wrong("settings", line, "correct .env")
    elif done.returncode == 0:
        yield ok("settings", "every variable is known and valid")
    else:
        yield note("settings", f"`gateway check` ended with status {done.returncode}", "gateway check")


def secrets(situation: Situation) -> Iterator[Finding]:
    """Who can read secrets."""
    files = [path for name in SECRET_FOLDERS for path in (situation.state / name).glob("*") if path.is_file()]
    files += list((situation.state / "backups").glob("*.tar"))
    dotenv = situation.repository / ".env"
    given = dotenv.read_text(errors="replace") if dotenv.is_file() and not situation.unread else ""
    if any(word in given for word in SECRET_NAMES):
        files.append(dotenv)
    open_files = [path for path in files if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)]
    for path in open_files:
        yield wrong("secrets", f"{path} can be read by other users", f"chmod 600 {path}")
    if not open_files:
        yield ok("secrets", f"{len(files)} files, each readable by its owner alone")


def containers(situation: Situation) -> Iterator[Finding]:
    """Every container that should run: does it, and since when without a restart."""
    if situation.compose is None:
        return
    for one in situation.compose.containers():
        name, state = service_of(one), one["State"]
        if not restarts(one):
            if state["Status"] == "exited" and state["ExitCode"]:  # type: ignore[index]
                yield wrong("services", f"{name} failed with status {state['ExitCode']}", f"docker compose logs {name}")  # type: ignore[index]
            continue
        health = state.get("Health", {}).get("Status", "no health check")  # type: ignore[attr-defined]
        told = f"{name}: {state['Status']}, {health}, {one['RestartCount']} restarts"  # type: ignore[index]
        if state.get("OOMKilled"):  # type: ignore[attr-defined]
            yield wrong("services", f"{told}; it ran out of memory", f"raise the memory limit of {name} in .env")
        elif state["Status"] != "running" or health == "unhealthy":  # type: ignore[index]
            yield wrong("services", told, f"docker compose logs --tail 50 {name}; make up")
        elif int(str(one["RestartCount"])) > 3:
            yield note("services", told, f"docker compose logs --tail 200 {name}")
        else:
            yield ok("services", told)


def answer(situation: Situation) -> Iterator[Finding]:
    """Whether a call would be admitted, asked through the edge; and the certificate it shows."""
    if situation.place is None:
        yield note("service", f"not asked: {situation.missing}")
        return
    if not situation.place.running():
        yield note("service", "the appliance does not run", "make up")
        return
    port = situation.port("HTTPS_PORT")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # it is examined below, not trusted
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=10, context=context)
    try:
        connection.request("GET", "/ready")
        shown = connection.sock.getpeercert(binary_form=True)
        reply = connection.getresponse()
        body = reply.read(4096).decode(errors="replace")
    except (OSError, http.client.HTTPException) as problem:
        yield wrong("service", f"https://127.0.0.1:{port}/ready does not answer: {problem}", "make logs; make up")
        return
    finally:
        connection.close()
    if reply.status == 200:
        yield ok("service", f"https://127.0.0.1:{port}/ready: a call would be admitted")
    else:
        yield wrong("service", f"not ready ({reply.status}): {body.strip()[:200]}", "make logs; see docs/runbooks")
    if shown:
        yield certificate(shown, situation.settings.get("APPLIANCE_HOSTS", ""))


def certificate(shown: bytes, hosts: str) -> Finding:
    """Its end and its names."""
    from cryptography import x509

    leaf = x509.load_der_x509_certificate(shown)
    ends = leaf.not_valid_after_utc
    names = {str(name.value) for name in leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value}
    missing = [host.strip() for host in hosts.split(",") if host.strip() and host.strip() not in names]
    left = ends - dt.datetime.now(dt.UTC)
    mend = "put fullchain.pem and privkey.pem into certificates/"
    if left < dt.timedelta():
        return wrong("certificate", f"ended on {ends:%Y-%m-%d}", mend)
    if left < SOON:
        return wrong("certificate", f"ends on {ends:%Y-%m-%d}", mend)
    if missing:
        return wrong("certificate", f"does not name {', '.join(missing)}", mend)
    return ok("certificate", f"valid until {ends:%Y-%m-%d} for {', '.join(sorted(names))}")


def ledger(situation: Situation) -> Iterator[Finding]:
    """The ledger's file: whole, and how large."""
    if situation.settings.get("DATABASE_URL", "").startswith("postgresql"):
        yield note("ledger", "in PostgreSQL; its own tools look after it")
        return
    try:
        if situation.compose:
            gateway = [one for one in situation.compose.containers(False) if service_of(one) == "gateway"]
            if not gateway:
                yield note("ledger", "not looked at: the gateway does not run")
                return
            told = run("docker", "exec", str(gateway[0]["Id"]), "python3", "-c", LEDGER_QUERY, "/data/gateway.sqlite3")
        elif situation.place is None and not situation.local:
            yield note("ledger", "not looked at: no appliance found")
            return
        else:
            book = situation.state / "gateway-data" / "gateway.sqlite3"
            if not book.exists():
                yield note("ledger", "none yet")
                return
            told = run(sys.executable, "-c", LEDGER_QUERY, book)
    except Exception as problem:
        yield wrong("ledger", f"cannot be looked at: {problem}", "make logs")
        return
    facts = json.loads(told)
    if "unread" in facts:
        mend = "run this as the appliance's user; if that does not help: make logs"
        yield wrong("ledger", f"cannot be looked at: {facts['unread']}", mend)
    elif facts["verdict"] == "ok":
        yield ok("ledger", f"whole, {facts['records']} records")
    else:
        yield wrong("ledger", f"damaged: {facts['verdict']}", "make restore FROM=<newest backup>")


def backups(situation: Situation) -> Iterator[Finding]:
    """How old the newest backup is."""
    files = sorted((situation.state / "backups").glob("*.tar"), key=lambda path: path.stat().st_mtime)
    if not files:
        yield note("backup", "there is none under .state/backups", "make backup")
        return
    age = dt.timedelta(seconds=dt.datetime.now(dt.UTC).timestamp() - files[-1].stat().st_mtime)
    told = f"newest is {files[-1].name}, {age.days} days old"
    yield note("backup", told, "make backup") if age > OLD_BACKUP else ok("backup", told)

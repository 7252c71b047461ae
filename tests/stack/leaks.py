"""What must not be anywhere: secrets, their digests, and what callers and the model said; and where to look for it."""

import base64
import hashlib
import json
import urllib.parse
from collections.abc import Iterable

from tests.stack.alarms import page
from tests.stack.appliance import Appliance
from tests.stack.load import CANARY, Call

READ_SECRETS = """
from pathlib import Path
for path in sorted(Path("/run/secrets").iterdir()):
    print(path.name, path.read_text().strip())
"""
# Raw bytes of everything that the gateway keeps: database, journals, spool. Needles come by standard input.
SEARCH_DATA = """
import json, sys
from pathlib import Path
needles = {what: bytes.fromhex(text) for what, text in json.load(sys.stdin).items()}
files = [path for path in Path("/data").rglob("*") if path.is_file()]
assert any(path.suffix == ".sqlite3" for path in files), files
for path in files:
    data = path.read_bytes()
    for what, needle in needles.items():
        if needle in data:
            print(f"{what} in {path}")
"""


def secrets(appliance: Appliance) -> dict[str, str]:
    """Every secret of the running appliance by name."""
    found = {"the caller's key": appliance.key}
    for line in appliance.exec("gateway", "python3", "-c", READ_SECRETS).splitlines():
        name, _, value = line.partition(" ")
        found[name] = value
    volume = f"{appliance.project}_grafana-secrets:/secrets:ro"
    image = str(appliance.inspect("gateway")["Image"])
    words = ("run", "--rm", "--network", "none", "--user", "0:0", "--volume", volume, "--entrypoint", "cat", image)
    found["Grafana's password"] = appliance.docker(*words, "/secrets/admin_password").strip()
    pem = appliance.exec("nginx", "cat", "/etc/edge/certificates/privkey.pem").strip().splitlines()
    found["the certificate's key"] = pem[1]
    assert {"vllm_api_key", "gateway_admin_key"} <= found.keys()
    assert all(len(value) >= 12 for value in found.values()), found.keys()
    return found


def digests(of: dict[str, str]) -> dict[str, str]:
    """What could be taken for the secrets: their SHA-256, as hexadecimal digits and in base 64."""
    found = {}
    for what, secret in of.items():
        digest = hashlib.sha256(secret.encode()).digest()
        found[f"the digest of {what}"] = digest.hex()
        found[f"the digest of {what} in base 64"] = base64.b64encode(digest).decode().rstrip("=")
    return found


def said(calls: Iterable[Call]) -> dict[str, str]:
    """A word that is in every prompt of the load, and some of what the model answered."""
    answers = [call.answer.text.strip() for call in calls if call.whole]
    long = [text for text in answers if len(text) >= 24 and "\n" not in text and '"' not in text]
    return {"a prompt": CANARY, **({"an answer": long[0]} if long else {})}


def leaks(appliance: Appliance, calls: Iterable[Call]) -> list[str]:
    """Where something was found that must not be there: all logs, all series with their exemplars, all of /data."""
    known = secrets(appliance)
    forbidden = {**known, **digests(known), **said(calls)}
    places = {f"the log of {name}": appliance.logs(name) for name in appliance.services()}
    assert any(places.values()), "no log at all: nothing was searched"
    places["a series of Prometheus"] = _series(appliance)
    found = [
        f"{what} in {place}" for place, text in places.items() for what, needle in forbidden.items() if needle in text
    ]
    needles = {what: needle.encode().hex() for what, needle in forbidden.items()}
    for what, secret in known.items():
        # A caller's key is stored as its digest, and as nothing else; no other secret's digest is kept.
        if what != "the caller's key":
            needles[f"the bare digest of {what}"] = hashlib.sha256(secret.encode()).hexdigest()
    words = ("exec", "-i", appliance.container("gateway"), "python3", "-c", SEARCH_DATA)
    return found + appliance.docker(*words, input=json.dumps(needles)).splitlines()


def _series(appliance: Appliance) -> str:
    port = int(appliance.settings["PROMETHEUS_PORT"])
    every = urllib.parse.urlencode({"match[]": '{__name__=~".+"}'})
    series = page(port, f"/api/v1/series?{every}")
    assert "gateway_requests_total" in series, "Prometheus was not read"
    asked = urllib.parse.urlencode({"query": '{__name__=~"gateway_.+"}', "start": "0", "end": "4102444800"})
    return series + page(port, f"/api/v1/query_exemplars?{asked}")

"""What `make up` prints at the end: URLs, the first key (once), and a curl that works as it stands."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from cryptography import x509

QUESTION = "What is the capital of France? Answer in one sentence."
Keys = Callable[[list[str]], "subprocess.CompletedProcess[str]"]


class FirstKeyError(Exception):
    """The first key could not be made; the message says why."""


def first_key(keys: Keys) -> str | None:
    """The secret of a new key when there is none yet, else None. `keys` runs `gateway keys …`.

    A secret is told by the gateway at this moment only; it is stored nowhere.
    """
    listed = keys(["list", "--json"])
    if listed.returncode != 0:
        raise FirstKeyError(f"the keys cannot be listed: {_last(listed.stderr)}")
    if json.loads(listed.stdout)["data"]:
        return None
    made = keys(["create", "--name", "first", "--json"])
    if made.returncode != 0:
        raise FirstKeyError(f"the first key cannot be made: {_last(made.stderr)}")
    secret = json.loads(made.stdout)["secret"]
    assert isinstance(secret, str)
    return secret


def curl(https_port: int, certificate: Path, model: str, key: str | None) -> str:
    """A chat request for a shell; with the key where it is new, else with a place for it."""
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    host, resolve = _name(certificate, https_port)
    port = "" if https_port == 443 else f":{https_port}"
    return (
        f"curl --cacert {certificate} {resolve}https://{host}{port}/v1/chat/completions \\\n"
        f"  -H 'Authorization: Bearer {key or '$KEY'}' -H 'Content-Type: application/json' \\\n"
        f"  -d '{json.dumps(body)}'"
    )


def text(https_port: int, certificate: Path, model: str, key: str | None, more: dict[str, str]) -> str:
    """The whole farewell of `make up`."""
    host, _ = _name(certificate, https_port)
    port = "" if https_port == 443 else f":{https_port}"
    lines = ["", f"  API      https://{host}{port}/v1    (certificate: {certificate})"]
    lines += [f"  {name:<8} {url}" for name, url in more.items()]
    if key is not None:
        lines += ["", f"  First API key, shown this once:  {key}"]
    else:
        lines += ["", "  Keys exist already; another one:  scripts/keys create --name NAME"]
    request = curl(https_port, certificate, model, key)
    return "\n".join([*lines, "", "  Try:", *(f"  {line}" for line in request.splitlines()), ""])


def _name(certificate: Path, https_port: int) -> tuple[str, str]:
    """A host that the certificate is for, and what curl needs to find it here."""
    leaf = x509.load_pem_x509_certificates(certificate.read_bytes())[0]
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return "127.0.0.1", ""
    if "127.0.0.1" in {str(address) for address in names.get_values_for_type(x509.IPAddress)}:
        return "127.0.0.1", ""
    hosts = [host.replace("*.", "llm.", 1) for host in names.get_values_for_type(x509.DNSName)]
    return (hosts[0], f"--resolve {hosts[0]}:{https_port}:127.0.0.1 ") if hosts else ("127.0.0.1", "")


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"

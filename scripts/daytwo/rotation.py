"""`make rotate-secrets`: new internal secrets, in use when it returns; the old ones come back if it cannot succeed.

Internal are the key between gateway and engine, the admin key, and Grafana's password. Callers' keys are rotated one by
one, with a grace period: `gateway keys rotate ID --grace-seconds N`.
"""

import io
import os
import secrets
import signal
import subprocess
import sys
import tarfile
import time

from scripts.daytwo.place import ComposePlace, LocalPlace, Place, PlaceError, find, told
from scripts.daytwo.settings import REPOSITORY, dotenv

ROTATED = ("vllm_api_key", "gateway_admin_key", "admin_password")
FOLDERS = ("gateway-secrets", "engine-secrets", "grafana-secrets")
FIXED_BY = {
    "vllm_api_key": "VLLM_API_KEY",
    "gateway_admin_key": "GATEWAY_ADMIN_KEY",
    "admin_password": "GRAFANA_ADMIN_PASSWORD",
}
# Grafana reads its password file at the very first start only; after that its database has it. Words for Compose.
NEW_PASSWORD = ("exec", "-T", "grafana", "grafana", "cli", "admin", "reset-admin-password", "--password-from-stdin")
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, `kill`, a connection that breaks


def renewed(stream: bytes, fresh: dict[str, str]) -> bytes:
    """The same tar with new content in the files named by `fresh`; owners and modes stay.

    Their time is now: by it `make up` finds who still has the old ones, should the power fail in between.
    """
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(stream)) as old, tarfile.open(fileobj=out, mode="w") as new:
        for entry in old:
            content = old.extractfile(entry)
            data = content.read() if content else b""
            name = entry.name.rpartition("/")[2]
            if entry.isfile() and name in fresh:
                data = fresh[name].encode()
                entry.size, entry.mtime, entry.pax_headers = len(data), time.time(), {}  # else those hold the old time
            new.addfile(entry, io.BytesIO(data) if entry.isfile() else None)
    return out.getvalue()


def put(place: Place, stream: bytes) -> None:
    """Writes the folders of a tar back."""
    with tarfile.open(fileobj=io.BytesIO(stream)) as archive:
        names = sorted({name.partition("/")[0] for name in archive.getnames()})
    with os.fdopen(os.memfd_create("secrets"), "w+b") as file:  # never on a disk
        file.write(stream)
        file.seek(0)
        place.replace(file, names)


def take_up(place: Place, password: str) -> None:
    """Makes every service that runs use what is in the folders now."""
    place.restart("vllm", "gateway")
    if isinstance(place, ComposePlace) and "grafana" in place.running():
        words = ["docker", "compose", "-p", place.project, *NEW_PASSWORD]
        subprocess.run(words, input=password.encode(), check=True, stdout=subprocess.DEVNULL)


def rotate(place: Place) -> list[str]:
    """Names of the secrets that are new and in use. Raises `PlaceError`; then the old ones are back.

    So they are when it is interrupted: secrets that are written and not taken up would part gateway and engine at the
    next restart of one of them.
    """
    settings = {**dotenv(REPOSITORY / ".env"), **os.environ}
    fixed = [variable for variable in FIXED_BY.values() if settings.get(variable)]
    if fixed:
        way = "`make down` and `make up`" if isinstance(place, LocalPlace) else "`make up`"
        raise PlaceError(f"{', '.join(fixed)} is set in .env or the environment: change it there, then {way}")
    carrier = place.export(FOLDERS)
    old = carrier.communicate()[0]
    if carrier.returncode:
        raise PlaceError("the present secrets cannot be read")
    fresh = {name: secrets.token_urlsafe(32) for name in ROTATED}
    try:
        put(place, renewed(old, fresh))
        take_up(place, fresh["admin_password"])
    except (PlaceError, subprocess.CalledProcessError, OSError, KeyboardInterrupt) as problem:
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)  # the way back is gone to its end
        put(place, old)
        place.restart("vllm", "gateway")
        raise PlaceError(f"the old secrets are back in use: {str(problem) or 'interrupted'}") from None
    with tarfile.open(fileobj=io.BytesIO(old)) as archive:
        there = {name.rpartition("/")[2] for name in archive.getnames()}
    return [name for name in ROTATED if name in there]


def main() -> int:
    """Rotates and says what."""
    place = find()
    for number in ENDING:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` is heeded
            signal.signal(number, signal.default_int_handler)
    print("rotate-secrets: the engine restarts once; calls get 503 with Retry-After meanwhile", flush=True)
    print(f"rotate-secrets: new and in use: {', '.join(rotate(place))}")
    return 0


if __name__ == "__main__":
    sys.exit(told(main))

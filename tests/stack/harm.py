"""Ways to hurt a running appliance as its worst days do: by signals, cut networks, full disks."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.stack.appliance import STANDIN, Appliance
from tests.stack.waiting import until


def processes(appliance: Appliance, service: str) -> list[int]:
    """All processes of a service, as this machine numbers them."""
    listed = appliance.docker("top", appliance.container(service), "-o", "pid").split()[1:]
    return [int(pid) for pid in listed]


def kill(appliance: Appliance, service: str) -> float:
    """kill -9 of everything in a container, behind Docker's back: `docker kill` would count as the operator's wish.

    The moment of the first signal (`time.monotonic()`).
    """
    victims = processes(appliance, service)
    struck = time.monotonic()
    for pid in victims:
        end(pid)
    return struck


def end(pid: int) -> None:
    """SIGKILL; one that has just gone is as dead."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def cut(appliance: Appliance, service: str, network: str) -> None:
    """Takes a service off a network."""
    appliance.docker("network", "disconnect", f"{appliance.project}_{network}", appliance.container(service))


def join(appliance: Appliance, service: str, network: str) -> None:
    """Puts it back under its name."""
    name = f"{appliance.project}_{network}"
    appliance.docker("network", "connect", "--alias", service, name, appliance.container(service))


# It also takes what becomes free later: whoever closes a file may give back the blocks that its next record needs.
FILL = """
import os, time
place = os.statvfs("/volume")
assert place.f_blocks * place.f_frsize < 1e9, "this would fill the machine's own disk"
full = False
with open("/volume/filler", "wb", buffering=0) as filler:
    while True:
        for size in (65536, 1):
            try:
                while True:
                    filler.write(bytes(size))
            except OSError:
                pass
        full = full or print("full", flush=True) or True
        time.sleep(0.01)
"""


def fill(appliance: Appliance, volume: str) -> None:
    """Writes until the volume's file system is full, and keeps it so; refuses to do it to a disk that others use."""
    name = _filler(appliance)
    _in_volume(appliance, volume, FILL, "--detach", "--name", name)
    until("the disk is full", lambda: "full" in appliance.docker("logs", name), 120)


def free(appliance: Appliance, volume: str) -> None:
    """Takes the filler away, if there is one."""
    appliance.docker("rm", "--force", _filler(appliance))
    _in_volume(appliance, volume, "import pathlib\npathlib.Path('/volume/filler').unlink(missing_ok=True)", "--rm")


USE_LOG = """
import os, sqlite3
book = sqlite3.connect("/volume/gateway.sqlite3", timeout=60, isolation_level=None)
for first in ("PRAGMA synchronous = off", "PRAGMA wal_autocheckpoint = 0", "CREATE TABLE busy AS SELECT 0 AS turn"):
    book.execute(first)
for turn in range(2_500):
    book.execute("UPDATE busy SET turn = turn + 1")
book.execute("DROP TABLE busy")
book.execute("PRAGMA wal_checkpoint")
print(os.path.getsize("/volume/gateway.sqlite3-wal"))
"""


def use_log(appliance: Appliance) -> None:
    """Makes the ledger's log (SQLite's WAL) as long as it ever gets; it is written back, and used again from its start."""
    assert int(_in_volume(appliance, "gateway-data", USE_LOG, "--rm")) > 2_000 * 4_096


def _filler(appliance: Appliance) -> str:
    return f"{appliance.project}-filler"


def _in_volume(appliance: Appliance, volume: str, script: str, *options: str) -> str:
    image = str(appliance.inspect("gateway")["Image"])
    mounted = f"{appliance.project}_{volume}:/volume"
    return appliance.docker(
        "run", *options, "--network", "none", "--user", "0:0", "--volume", mounted, "--entrypoint", "python3", image, "-c", script
    )  # fmt: skip


def starve(appliance: Appliance, service: str) -> None:
    """Takes a container's memory until the kernel kills in it, and makes sure that it is not us who are chosen."""
    for pid in processes(appliance, service):
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")
    hog = "b = []\nwhile True: b.append(bytearray(b'x') * (1 << 26))"
    appliance.exec(service, "python3", "-c", hog, check=False, seconds=120)


def replace_certificate(folder: Path, days: int) -> None:
    """Puts a new pair where the operator's own belongs, the key first as an operator would; `days` it is valid."""
    fresh = folder / "fresh"
    fresh.mkdir()
    words = "req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -subj /CN=proof"
    more = ("-addext", "subjectAltName=IP:127.0.0.1", "-days", str(days))
    files = ("-keyout", str(fresh / "privkey.pem"), "-out", str(fresh / "fullchain.pem"))
    subprocess.run(["openssl", *words.split(), *more, *files], check=True, capture_output=True)
    for name in ("privkey.pem", "fullchain.pem"):
        os.replace(fresh / name, folder / name)
    fresh.rmdir()


def silence_names(turns: list[Callable[[], object]]) -> float:
    """Docker's daemon, which answers the containers' names, stands still during each turn, and breathes between them.

    The moment at which it began (`time.monotonic()`).
    """
    daemon = engine_processes()[0]
    struck = time.monotonic()
    for turn in turns:
        os.kill(daemon, signal.SIGSTOP)
        try:
            turn()
        finally:
            os.kill(daemon, signal.SIGCONT)
    return struck


def engine_is_ours() -> bool:
    """Whether Docker is the stand-in's: the machine's own is nobody's to stop."""
    try:
        engine_processes()
    except OSError:
        return False
    return True


def engine_processes() -> list[int]:
    """The private Docker Engine: dockerd, containerd and their shims."""
    runtime = Path(
        subprocess.run(
            ["bash", "-c", '. scripts/standin/cache.sh; printf %s "$runtime"'],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    found = [int((runtime / name).read_text()) for name in ("docker.pid", "exec/containerd/containerd.pid")]
    shims = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return found + [int(line.split()[0]) for line in shims.splitlines() if str(runtime) in line and "shim" in line]


def restart_docker() -> None:
    """As `systemctl restart docker`."""
    daemon = engine_processes()[0]
    os.kill(daemon, signal.SIGTERM)
    # It waits for its containers, which may take their whole `stop_grace_period`.
    until("the daemon ends", lambda: not Path(f"/proc/{daemon}").exists(), 180)
    subprocess.run([STANDIN, "start"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=300)


def cut_power(appliance: Appliance) -> float:
    """Everything at once, no one is told; then the machine comes up again."""
    described = json.loads(appliance.docker("inspect", *appliance.docker("ps", "-q").split()))
    victims = engine_processes()
    for one in described:
        victims += [int(one["State"]["Pid"])]
    struck = time.monotonic()
    for pid in victims:
        end(pid)
    subprocess.run([STANDIN, "start"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=300)
    return struck

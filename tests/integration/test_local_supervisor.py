"""Local mode's supervisor: it brings back what dies, stops in order, and leaves nothing, even when it is killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from scripts.local import running, start, supervisor
from scripts.local.places import Places
from scripts.local.supervisor import Keeper, Plan, Service
from tests.doubles.ports import accepts, free_ports
from tests.doubles.waiting import until, wait_until

LISTEN = """
import signal, socket, subprocess, sys, time
name, port, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
def end(*_):
    print("ended", name, time.monotonic(), flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if how == "deaf" else end)  # before anybody can see us listen
if how == "child":  # one that would outlive us, in our group
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
server = socket.create_server(("127.0.0.1", port), reuse_port=False)
print("started", name, flush=True)
while True:
    server.accept()[0].close()
"""


def service(name: str, port: int, how: str = "plain", stop_seconds: float = 60) -> Service:
    return Service(
        name, [sys.executable, "-c", LISTEN, name, str(port), how], dict(os.environ), stop_seconds=stop_seconds
    )


LAUNCHED: list[subprocess.Popen[str]] = []


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Places]:
    place = Places(tmp_path)
    place.logs.mkdir()
    yield place
    running.stop(place)
    while LAUNCHED:
        LAUNCHED.pop().wait(60)


def launched(places: Places, *services: Service) -> None:
    LAUNCHED.append(start.launch(places, Plan(str(places.state), list(services))))


def started(places: Places, *services: Service) -> running.Running:
    launched(places, *services)

    def all_there() -> running.Running | None:
        found = running.running(places)
        return found if found is not None and set(found.alive()) == {one.name for one in services} else None

    return wait_until("all services run", all_there)


def test_what_dies_comes_back(places: Places) -> None:
    port, other = free_ports(2)
    found = started(places, service("a", port), service("b", other))
    wait_until("both listen", lambda: accepts(port) and accepts(other))
    first, second = found.alive()["a"].pid, found.alive()["b"].pid
    os.kill(first, signal.SIGKILL)

    def another() -> bool:
        now = running.running(places)
        process = now.alive().get("a") if now is not None else None
        return process is not None and process.pid != first

    wait_until("another process for a", another)
    wait_until("it listens", lambda: accepts(port))
    now = running.running(places)
    assert now is not None
    assert now.restarts() == {"a": 1, "b": 0}
    assert now.last_exit("a") == -signal.SIGKILL
    assert now.alive()["b"].pid == second


def test_down_stops_in_reverse_order_and_frees_the_ports(places: Places) -> None:
    ports = free_ports(3)
    found = started(places, *(service(name, port) for name, port in zip("abc", ports, strict=True)))
    wait_until("all listen", lambda: all(accepts(port) for port in ports))
    processes = list(found.alive().values())
    assert running.stop(places) == []
    assert not any(accepts(port) for port in ports)
    assert not any(process.is_running() for process in processes)
    assert running.running(places) is None
    ends = [(places.logs / f"{name}.log").read_text().split()[-1] for name in "cba"]
    assert [float(moment) for moment in ends] == sorted(float(moment) for moment in ends)


def test_one_that_ignores_the_signal_is_killed_with_its_children(places: Places) -> None:
    port, other = free_ports(2)
    found = started(places, service("deaf", port, "deaf", stop_seconds=0.5), service("parent", other, "child"))
    wait_until("both listen", lambda: accepts(port) and accepts(other))
    children = wait_until("the child", lambda: found.alive()["parent"].children())
    assert running.stop(places) == []
    assert not accepts(port)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


def test_down_after_a_killed_supervisor_ends_its_orphans(places: Places) -> None:
    port = free_ports(1)[0]
    found = started(places, service("orphan", port))
    wait_until("it listens", lambda: accepts(port))
    supervisor = found.supervisor
    assert supervisor is not None
    supervisor.kill()
    supervisor.wait(60)
    assert accepts(port)
    assert running.stop(places) == ["orphan"]
    assert not accepts(port)


def test_a_pid_that_was_given_again_is_left_alone(places: Places) -> None:
    """The file names this very test process, with another start time: it must not be touched."""
    places.run.mkdir()
    (places.run / "appliance.json").write_text(
        f'{{"supervisor": {{"pid": {os.getpid()}, "created": 1.0}}, "services": '
        f'{{"x": {{"pid": {os.getpid()}, "created": 1.0, "restarts": 0}}}}}}'
    )
    assert running.stop(places) == []
    assert running.running(places) is None


def test_a_service_that_cannot_start_waits_longer_each_time(places: Places) -> None:
    broken = Service("broken", [sys.executable, "-c", "raise SystemExit(7)"], dict(os.environ))
    launched(places, broken)

    def three_times() -> running.Running | None:
        found = running.running(places)
        return found if found is not None and found.restarts().get("broken", 0) >= 2 else None

    found = wait_until("two restarts", three_times)
    assert found.last_exit("broken") == 7


class Quiet:
    """A process that runs and may be told to read its files again."""

    returncode = None

    def __init__(self) -> None:
        self.signals: list[int] = []

    def send_signal(self, number: int) -> None:
        self.signals.append(number)


async def test_every_log_that_is_written_for_a_plan_is_bounded_and_no_other(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "LOG_BYTES", 1000)
    monkeypatch.setattr(supervisor, "WATCH_SECONDS", 0.01)
    edge = {"edge": {"access_log": str(places.logs / "edge-access.log")}}
    keeper = Keeper("appliance", Plan(str(places.state), [service("gateway", 1)], edge))
    ours = [places.logs / f"{name}.log" for name in ("gateway", "appliance-supervisor", "edge-access")]
    other = (
        places.logs / "monitoring-supervisor.log"
    )  # has a supervisor of its own: two would cut it off under each other
    for log in (*ours, other):
        log.write_text("a line\n" * 1000)
    watching = asyncio.create_task(keeper.watch())
    await until("all are short", lambda: all(log.stat().st_size == 0 for log in ours))
    watching.cancel()
    assert {log.with_name(f"{log.name}.1").read_text() for log in ours} == {"a line\n" * 1000}
    assert other.stat().st_size == 7000


async def test_a_certificate_that_stays_bad_is_told_once(
    places: Places, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervisor, "WATCH_SECONDS", 0.001)
    answers = ["bad key"] * 20 + ["expired"] * 20 + [True, False] + ["expired"] * 20

    def refresh(**_: object) -> bool:
        answer = answers.pop(0) if answers else "expired"
        if isinstance(answer, str):
            raise ValueError(answer)
        return answer

    monkeypatch.setattr(supervisor.edge_local, "refresh", refresh)
    edge = {"edge": {"access_log": str(places.logs / "edge-access.log")}}
    keeper = Keeper("appliance", Plan(str(places.state), [], edge))
    nginx = Quiet()
    keeper.processes["nginx"] = nginx  # type: ignore[assignment]
    watching = asyncio.create_task(keeper.watch())
    await until("all answers were given", lambda: not answers)
    watching.cancel()
    told = [json.loads(line)["problem"] for line in capsys.readouterr().out.splitlines()]
    assert told == ["bad key", "expired", "expired"], "each problem once, and again after it was gone"
    assert nginx.signals == [signal.SIGHUP]


def test_no_secret_of_an_environment_is_written_down(places: Places) -> None:
    port = free_ports(1)[0]
    secret = "sk-only-in-an-environment"
    one = service("a", port)
    started(places, Service(one.name, one.argv, {**one.environment, "SECRET": secret}))
    wait_until("it listens", lambda: accepts(port))
    for path in places.state.rglob("*"):
        assert not path.is_file() or secret not in path.read_text(errors="replace")

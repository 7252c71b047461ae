"""The keeper's decisions, with probes that are told what to do and a clock that is moved by hand."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import pytest

from gpu_exporter.keeper import MOST_STUCK, QUARANTINE_SECONDS, CollectFailed, Keeper
from gpu_exporter.readings import Driver, Gpu, Identity, Sample, encode


class Process:
    """A process that ends when it is told to, or never."""

    def __init__(self) -> None:
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self.returncode


class ScriptedProbe:
    """Answers `opened`, then what `Machine` says; hangs by letting the clock run out."""

    def __init__(self, machine: Machine, options: Mapping[str, Any]) -> None:
        self.machine, self.process = machine, Process()
        self._hangs_at: int | None = None
        self._read, self._write = os.pipe()
        os.write(self._write, b"x")  # always readable
        self.census, self.skip = bool(options["census"]), options.get("skip")
        self._messages: list[dict[str, Any]] = [] if machine.hangs_on_open or self.census else [{"opened": True}]

    def fileno(self) -> int:
        return self._read

    def ask(self, skip: list[int]) -> None:
        self.machine.skipped.append(sorted(skip))
        self._hangs_at = next((gpu for gpu in sorted(self.machine.hanging) if gpu not in skip), None)
        if self._hangs_at is None:
            self._messages.append({"sample": encode(self.machine.sample(skip))})

    def messages(self) -> list[dict[str, Any]]:
        if not self._messages:
            self.machine.now += 1.0
        found, self._messages = self._messages, []
        return found

    def in_progress(self) -> tuple[str, int | None]:
        return ("nvmlInit", None) if self.machine.hangs_on_open else ("nvmlDeviceGetPowerUsage", self._hangs_at)

    def kill(self) -> bool:
        os.close(self._read)
        os.close(self._write)
        if self.machine.killable:
            self.process.returncode = -9
        return self.machine.killable


class Machine:
    """Three GPUs and what is wrong with them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.hanging: set[int] = set()
        self.hangs_on_open = False
        self.killable = True
        self.probes: list[ScriptedProbe] = []
        self.skipped: list[list[int]] = []

    def start(self, options: Mapping[str, Any]) -> Any:
        self.probes.append(ScriptedProbe(self, options))
        return self.probes[-1]

    def sample(self, skip: list[int]) -> Sample:
        gpus = (Gpu(Identity(i, f"GPU-{i}"), unreadable="hung" if i in skip else "") for i in range(3))
        return Sample(Driver("1", "2", "3"), tuple(gpus))


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def wake() -> Any:
    read, write = os.pipe()
    yield read
    os.close(read)
    os.close(write)


@pytest.fixture
def discover() -> float:
    return 0


@pytest.fixture
def keeper(machine: Machine, discover: float) -> Any:
    keeper = Keeper(
        deadline=5,
        open_deadline=60,
        discover=discover,
        options={},
        on_xids=lambda events: None,
        start=machine.start,
        clock=lambda: machine.now,
    )
    yield keeper
    keeper.close()


def failure(keeper: Keeper, wake: int) -> CollectFailed:
    with pytest.raises(CollectFailed) as caught:
        keeper.sample(wake)
    return caught.value


def test_one_probe_serves_many_samples(keeper: Keeper, machine: Machine, wake: int) -> None:
    for _ in range(5):
        assert len(keeper.sample(wake).gpus) == 3
    assert len(machine.probes) == 1
    assert keeper.replacements == 0


def test_a_gpu_that_hangs_is_isolated_for_longer_each_time(keeper: Keeper, machine: Machine, wake: int) -> None:
    machine.hanging = {1}
    pauses = []
    for _ in range(6):
        hung = failure(keeper, wake)
        assert (hung.call, hung.error, hung.gpu) == ("nvmlDeviceGetPowerUsage", "hung", 1)
        start = machine.now
        while keeper.sample(wake).gpus[1].unreadable:
            assert machine.skipped[-1] == [1]
            machine.now += 15
            if machine.now - start > 3600:
                pytest.fail("never asked again")
            if machine.now >= start + _longest(len(pauses)):
                break
        pauses.append(machine.now - start)
    assert pauses == [60, 120, 240, 480, 960, 960]


def _longest(times: int) -> float:
    return min(QUARANTINE_SECONDS[0] * 2**times, QUARANTINE_SECONDS[1])


def test_a_gpu_that_answers_again_is_forgiven(keeper: Keeper, machine: Machine, wake: int) -> None:
    machine.hanging = {0}
    failure(keeper, wake)
    machine.hanging = set()
    machine.now += QUARANTINE_SECONDS[0]
    assert not keeper.sample(wake).gpus[0].unreadable
    machine.hanging = {0}
    before = failure(keeper, wake) and machine.now
    keeper.sample(wake)
    machine.now = before + QUARANTINE_SECONDS[0]  # the short pause again
    assert failure(keeper, wake).gpu == 0


def test_a_hang_on_open_isolates_nobody(keeper: Keeper, machine: Machine, wake: int) -> None:
    machine.hangs_on_open = True
    hung = failure(keeper, wake)
    assert (hung.call, hung.error, hung.gpu) == ("nvmlInit", "hung", None)
    assert machine.now == 60
    machine.hangs_on_open = False
    keeper.sample(wake)
    assert machine.skipped[-1] == []
    assert keeper.replacements == 1


def test_probes_that_cannot_be_killed_are_not_piled_up(keeper: Keeper, machine: Machine, wake: int) -> None:
    machine.hangs_on_open, machine.killable = True, False
    for _ in range(MOST_STUCK):
        assert failure(keeper, wake).error == "hung"
    for _ in range(10):
        assert failure(keeper, wake).error == "too_many_stuck_probes"
    assert (len(machine.probes), keeper.stuck) == (MOST_STUCK, MOST_STUCK)

    machine.hangs_on_open, machine.killable = False, True
    machine.probes[0].process.returncode = -9  # the driver lets one go
    assert len(keeper.sample(wake).gpus) == 3
    assert keeper.stuck == MOST_STUCK - 1


def readable(keeper: Keeper, machine: Machine, wake: int, seconds: float) -> set[int]:
    """The GPUs that the last sample read, after sampling every five seconds for so long."""
    until, found = machine.now + seconds, set()
    while machine.now < until:
        machine.now += 5
        try:
            found = {gpu.identity.index for gpu in keeper.sample(wake).gpus if not gpu.unreadable}
        except CollectFailed:
            found = set()
    return found


def test_gpus_that_hold_their_probe_for_ever_do_not_hide_the_healthy_one(
    keeper: Keeper, machine: Machine, wake: int
) -> None:
    machine.hanging, machine.killable = {1}, False
    assert readable(keeper, machine, wake, 7200) == {0, 2}
    assert keeper.stuck == 1  # while it holds one, asking it again would only lose another
    machine.hanging = {1, 2}
    assert readable(keeper, machine, wake, 7200) == {0}
    assert keeper.stuck == 2


def test_a_gpu_that_lets_its_probe_go_is_asked_again(keeper: Keeper, machine: Machine, wake: int) -> None:
    machine.hanging, machine.killable = {1}, False
    assert readable(keeper, machine, wake, 600) == {0, 2}
    machine.hanging = set()
    assert readable(keeper, machine, wake, 600) == {0, 2}
    machine.probes[0].process.returncode = -9
    assert readable(keeper, machine, wake, 5) == {0, 1, 2}


def test_the_last_place_is_kept_for_a_probe_that_leaves_out_what_hung(
    keeper: Keeper, machine: Machine, wake: int
) -> None:
    machine.hangs_on_open, machine.killable = True, False
    for _ in range(MOST_STUCK - 1):
        assert failure(keeper, wake).error == "hung"
    machine.hangs_on_open, machine.killable, machine.hanging = False, True, {1}
    assert readable(keeper, machine, wake, 7200) == {0, 2}
    assert len(machine.probes) == MOST_STUCK + 1  # one hung, and the one after it was never risked


@pytest.mark.parametrize("discover", [30.0])
def test_looking_for_new_gpus_does_not_take_the_last_place(keeper: Keeper, machine: Machine, wake: int) -> None:
    keeper.sample(wake)
    machine.killable = False
    for _ in range(2 * MOST_STUCK):
        machine.now += 61
        keeper.idle(0.1, wake)
    assert keeper.stuck == MOST_STUCK - 1
    machine.killable = True
    assert len(keeper.sample(wake).gpus) == 3


@pytest.mark.parametrize("discover", [30.0])
def test_looking_for_new_gpus_leaves_out_those_that_hang(keeper: Keeper, machine: Machine, wake: int) -> None:
    machine.hanging = {1}
    assert readable(keeper, machine, wake, 20) == {0, 2}
    machine.now += 30
    keeper.idle(0.1, wake)
    assert [probe.skip for probe in machine.probes if probe.census] == [[1]]


def test_nonsense_on_the_pipe_is_a_failure(keeper: Keeper, machine: Machine, wake: int, monkeypatch: Any) -> None:
    keeper.sample(wake)
    monkeypatch.setattr(machine.probes[0], "messages", lambda: [{"sample": {"gpus": "none"}}])
    assert failure(keeper, wake).error == "talks_nonsense"
    assert len(keeper.sample(wake).gpus) == 3


def test_a_stop_interrupts_a_hang_at_once(keeper: Keeper, machine: Machine) -> None:
    machine.hangs_on_open = True
    read, write = os.pipe()
    os.write(write, b"x")
    assert failure(keeper, read).error == "interrupted"
    assert machine.now == 0
    os.close(read)
    os.close(write)

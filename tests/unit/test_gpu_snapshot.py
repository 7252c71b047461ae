"""Nothing stale is served, whatever happens to the sampler; the demo's figures hang together."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from gpu_exporter.collector import Health
from gpu_exporter.containers import container_of
from gpu_exporter.demo import MODELS, Demo, DemoPlan
from gpu_exporter.readings import Driver, Gpu, Identity, MigInstance, Sample, decode, encode
from gpu_exporter.sampler import Sampler, Snapshot
from gpu_exporter.server import Pages

GOOD = Health(state="ok", success=True, visible=1, expected=1, succeeded_at=1.0, gpus={"GPU-1": (0, "")})


def pages(snapshot: Snapshot, alive: bool = True) -> Pages:
    return Pages(lambda: snapshot, lambda: alive, "native")


def test_data_of_a_sampler_that_stopped_disappears() -> None:
    fresh = Snapshot(GOOD, "gpu_power_watts 1\n", {"GPU-1": 2.0}, time.monotonic() + 60)
    old = Snapshot(GOOD, "gpu_power_watts 1\n", {"GPU-1": 2.0}, time.monotonic() - 1)

    assert b"gpu_power_watts 1" in pages(fresh).answer("/metrics")[2]
    page = pages(old).answer("/metrics")[2]
    assert b"gpu_power_watts" not in page
    assert b"gpu_exporter_last_collect_success 0\n" in page
    assert b"gpu_visible 0\n" in page
    assert pages(fresh).answer("/energy")[0] == 200
    assert pages(old).answer("/energy")[0] == 503


def test_a_dead_sampler_is_unhealthy_and_a_failed_sample_is_not() -> None:
    assert pages(Snapshot(Health(state="hung"))).answer("/health")[0] == 200
    status, _, body = pages(Snapshot(GOOD), alive=False).answer("/health")
    assert (status, json.loads(body)["status"]) == (503, "broken")


def test_a_sample_survives_the_pipe() -> None:
    sample = Sample(
        Driver("580", "13.0", "13"),
        (
            Gpu(
                Identity(0, "GPU-1", name="é", minor_number=3),
                {"power": ((1.5, ()),), "clock": ((1.0, ("sm",)), (2.0, ("memory",)))},
                (MigInstance("MIG-1", "1", "0", "1g.10gb", {"memory_used": ((0.0, ()),)}),),
            ),
            Gpu(Identity(1, ""), unreadable="lost"),
        ),
        {("nvmlInit", "unknown"): 2},
        7,
        0.25,
    )
    assert decode(json.loads(json.dumps(encode(sample)))) == sample


def test_the_demos_energy_is_the_integral_of_its_power() -> None:
    now = [0.0]
    demo = Demo(DemoPlan(2, MODELS["H100"]), lambda: now[0])
    step, joules = 0.05, 0.0
    for tick in range(8000):
        now[0] = (tick + 0.5) * step
        joules += demo.sample(-1).gpus[1].readings["power"][0][0] * step
    now[0] = 8000 * step
    assert demo.sample(-1).gpus[1].readings["energy"][0][0] == pytest.approx(joules, rel=1e-3)


@pytest.mark.parametrize(
    ("group", "container"),
    [
        ("0::/system.slice/docker-" + "ab12" * 16 + ".scope\n", "ab12ab12ab12"),
        ("12:pids:/docker/" + "0f" * 32 + "\n", "0f0f0f0f0f0f"),
        ("0::/user.slice/user-1000.slice\n", "host"),
        (None, "unknown"),
    ],
)
def test_a_process_is_told_by_its_container(group: str | None, container: str, tmp_path: Path) -> None:
    if group is not None:
        (tmp_path / "77").mkdir()
        (tmp_path / "77" / "cgroup").write_text(group)
    assert container_of(77, tmp_path) == container


def test_a_sampler_that_fails_ends_the_program() -> None:
    """A bug must not leave a program behind that stands there without data."""

    class Broken(Demo):
        def sample(self, wake: int) -> Sample:
            raise RuntimeError("a bug")

    died = threading.Event()
    sampler = Sampler(
        Broken(DemoPlan(1, MODELS["L4"])),
        interval=1,
        retry=1,
        allowance=1,
        expected=0,
        names="native",
        hostname="",
        demo=True,
        on_access_lost=lambda: None,
        on_death=died.set,
    )
    sampler.start()
    assert died.wait(60)
    sampler.thread.join(60)
    assert not sampler.thread.is_alive()

"""A model over two machines, as far as one machine can show it: two network namespaces, the real Ray, a double of vLLM.

vLLM's CPU build refuses Ray, so the exchange between two machines' GPUs is not seen here (docs/engine.md says how to).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.doubles.engine_hosts import TOKEN, Hosts
from tests.doubles.engine_running import ROOT
from tests.doubles.waiting import wait_until

CAN = os.geteuid() == 0 and shutil.which("ip") is not None
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not CAN, reason="network namespaces need root and the program `ip`"),
]
# What vLLM does with Ray: a bundle for each GPU, a worker in each; here they say where they are.
PLACED = """
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as In
ray.init(log_to_driver=False)
group = ray.util.placement_group([{"GPU": 1.0}] * 2, strategy="PACK")
ray.get(group.ready(), timeout=60)
where = ray.remote(num_gpus=1, num_cpus=0)(lambda: ray.util.get_node_ip_address())
print("placed on", sorted(ray.get([
    where.options(scheduling_strategy=In(group, placement_group_bundle_index=n)).remote() for n in range(2)
])))
"""


@pytest.fixture(scope="module")
def ray_python() -> Path:
    """A Python that has the locked Ray: $RAY_VENV, made if it is not there."""
    venv = Path(os.environ.get("RAY_VENV") or ROOT / ".state" / "ray-venv")
    venv.parent.mkdir(parents=True, exist_ok=True)
    with venv.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (venv / ".built").is_file():
            subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
            pip = [venv / "bin" / "python", "-m", "pip", "install", "-q", "--no-input", "--disable-pip-version-check"]
            subprocess.run([*pip, "--require-hashes", "-r", ROOT / "requirements" / "ray.txt"], check=True)
            (venv / ".built").touch()
    return venv / "bin" / "python"


@pytest.fixture
def hosts(ray_python: Path, tmp_path: Path) -> Iterator[Hosts]:
    program = tmp_path / "python"
    double = f"exec {sys.executable} {ROOT}/tests/doubles/engine_double.py"
    program.write_text(f'#!/bin/sh\ncase "$2" in vllm.*) {double} "$@" ;; esac\nexec {ray_python} "$@"\n')
    program.chmod(0o755)
    model = tmp_path / "models" / "double"
    model.mkdir(parents=True)
    (model / ".complete").write_text("")
    (model / "config.json").write_text(
        '{"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "vocab_size": 128}'
    )
    places = {"MODEL_NAME": "double", "MODEL_CACHE_DIR": str(tmp_path / "models"), "ENGINE_HANG_SECONDS": "60"}
    with Hosts(tmp_path / "hosts", program, places) as both:
        yield both


def test_two_machines_make_one_cluster_and_make_it_again(hosts: Hosts, ray_python: Path) -> None:
    head, other = hosts.head, hosts.other
    head.start("serve")
    head.wait("waits for the second machine", lambda status: "1 of 2 machines" in status["line"])
    assert head.ask("/ready")[0] == 503

    other.start("node", RAY_TOKEN="another-token-that-nobody-else-knows-012")
    other.wait("is refused", lambda status: status["restarts"] >= 1)
    assert other.ask("/ready")[0] == 503
    assert other.stop() == 0
    wait_until("nobody to be left of the refused one", lambda: not other.pids())
    assert head.status()["state"] == "starting"

    joined = time.monotonic()
    other.start("node")
    other.wait("is in", lambda status: status["state"] == "ready")
    head.wait("serves", lambda status: status["state"] == "ready")
    print(f"\nready {time.monotonic() - joined:.0f} s after the second machine came")
    where = {"RAY_ADDRESS": "10.213.7.1:6379", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    assert head.command(str(ray_python), "-W", "ignore", "-c", PLACED, **where).wait(240) == 0
    assert "placed on ['10.213.7.1', '10.213.7.2']" in head.log.read_text()

    killed = time.monotonic()
    head.kill("engine_double.py core")  # the run ends, and its cluster with it
    head.wait("began again", lambda status: status["restarts"] == 1)
    other.wait("lost the old cluster", lambda status: status["restarts"] >= 1)
    other.wait("is in the new one", lambda status: status["state"] == "ready")
    head.wait("serves again", lambda status: status["state"] == "ready")
    print(f"back {time.monotonic() - killed:.0f} s after vLLM was killed")

    before = other.status()["restarts"]
    other.kill("raylet/raylet")
    other.wait("began again", lambda status: status["restarts"] > before)
    other.wait("is in again", lambda status: status["state"] == "ready")

    other.process.kill()  # type: ignore[union-attr]
    other.process.wait()  # type: ignore[union-attr]
    wait_until("nobody to be left on the second machine", lambda: not other.pids())
    assert head.stop() == 0
    wait_until("nobody to be left on the first machine", lambda: not head.pids())


def test_each_machine_says_what_it_lacks(hosts: Hosts) -> None:
    cases = {
        ("serve", "RAY_NODE_ADDRESS", "10.213.7.2"): "run `engine node` here",
        ("serve", "RAY_NODE_ADDRESS", "10.213.7.9"): "no interface of this machine has 10.213.7.9",
        ("serve", "RAY_TOKEN", "short"): "32 characters",
        ("serve", "PP_SIZE", "3"): "multiple of ENGINE_NODES",
        ("serve", "TP_SIZE", "2"): "needs 2 GPUs on each of 2 machines, this machine has 1",
        ("node", "RAY_NODE_ADDRESS", "10.213.7.1"): "run `engine serve` here",
        ("node", "MODEL_NAME", "absent"): "absent is not here: `engine fetch`",
    }
    for (verb, variable, value), words in cases.items():
        hosts.head.log.write_text("")
        hosts.head.start(verb, **{variable: value})
        assert hosts.head.process is not None
        assert hosts.head.process.wait(120) == 2
        assert words in hosts.head.log.read_text()

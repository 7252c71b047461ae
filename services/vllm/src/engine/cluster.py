"""A model over several machines: one Ray node on each, and vLLM on the first.

Here is what is started on each machine, and how the first gathers the others. A cluster lives for one run of vLLM:
when that ends, the head ends with all its processes, the nodes of the other machines lose it, end too, and join the
next one (`node.py`). So nothing of a hung run is left on any machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import socket
import struct
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from engine import family
from engine.child import Child
from engine.command import Place
from engine.settings import Settings

JOINED = "Ray runtime started"
# vLLM hands its whole environment to its workers on other machines: these stay where they are. Secrets are none of the
# workers' business, and each machine's interface has a name of its own.
STAYS_HERE = ("VLLM_API_KEY", "ENGINE_PROGRESS_TOKEN", "RAY_AUTH_TOKEN", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
_STORE_BYTES = 512 << 20  # vLLM exchanges through other channels; unset, Ray takes a third of the machine
_LOOK_SECONDS = 2.0
_ASK_SECONDS = 30.0
_ASK = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
alive = [node for node in ray.nodes() if node["Alive"]]
print(len(alive), int(sum(node["Resources"].get("GPU", 0) for node in alive)))
"""
_SIOCGIFADDR = 0x8915


def gpus_each(settings: Settings, tp: int) -> int:
    """GPUs that the model takes on each machine."""
    return tp * settings.pp_size // settings.engine_nodes


def is_head(settings: Settings) -> bool:
    """Whether this machine is the first one."""
    return settings.ray_node_address == settings.ray_head_address


def argv(settings: Settings, place: Place) -> list[str]:
    """The command that makes this machine a node of the cluster, in the foreground."""
    words = [place.python, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    gpus = gpus_each(settings, place.tp)
    # vLLM's workers ask for GPUs alone; for every CPU that it is told of, Ray keeps an idle process.
    words += [f"--node-ip-address={settings.ray_node_address}", f"--num-gpus={gpus}", f"--num-cpus={gpus}"]
    words.append(f"--object-store-memory={_STORE_BYTES}")
    if is_head(settings):
        return [*words, "--head", f"--port={settings.ray_port}", "--include-dashboard=false"]
    return [*words, f"--address={settings.ray_head_address}:{settings.ray_port}"]


def environment(settings: Settings, base: Mapping[str, str]) -> dict[str, str]:
    """A node's environment: `base`, which is vLLM's, without what a node has no use for."""
    return {name: value for name, value in base.items() if name not in ("VLLM_API_KEY", "ENGINE_PROGRESS_TOKEN")}


def keep_here(state: Path) -> None:
    """Write the list of variables that vLLM must not hand to other machines, where vLLM reads it."""
    folder = state / "config"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ray_non_carry_over_env_vars.json").write_text(json.dumps(list(STAYS_HERE)) + "\n")


def interface_of(address: str) -> str | None:
    """The name of this machine's network interface that has the IPv4 `address`, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def problems(settings: Settings, place: Place) -> list[str]:
    """What this machine lacks for its part, one line each."""
    found = []
    if place.interface is None:
        found.append(f"RAY_NODE_ADDRESS: no interface of this machine has {settings.ray_node_address}")
    asked = "import importlib.util, sys; sys.exit(importlib.util.find_spec('ray') is None)"
    done = subprocess.run([place.python, "-c", asked], check=False, capture_output=True, timeout=60)
    if done.returncode != 0:
        found.append(
            f"DISTRIBUTED_EXECUTOR: {place.python} has no Ray: build the image with WITH_RAY=1 (docs/engine.md)"
        )
    return found


class Cluster:
    """The head on this machine and those who joined it, for one run of vLLM. An async context manager."""

    def __init__(
        self, settings: Settings, place: Place, env: Mapping[str, str], on_line: Callable[[str], None]
    ) -> None:
        """`env` is vLLM's; `on_line` hears what Ray prints, and how many have joined."""
        self._settings, self._place, self._on_line = settings, place, on_line
        self._env = environment(settings, env)

    async def __aenter__(self) -> Self:
        """Start the head; it need not answer yet."""
        self._child = await Child.start(argv(self._settings, self._place), self._env, self._on_line)
        self._ended = asyncio.create_task(self._child.ended())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it and all its processes."""
        await self._child.sweep()
        self._ended.cancel()

    def members(self) -> list[family.Process]:
        """Its processes on this machine; vLLM's workers are among them."""
        return self._child.members()

    async def gather(self) -> str | None:
        """Wait until all machines are here with their GPUs, however long; why that cannot be any more, or None."""
        nodes = self._settings.engine_nodes
        gpus = nodes * gpus_each(self._settings, self._place.tp)
        said = ""
        while not self._ended.done():
            here = await self._count()
            if here is not None:
                if here[0] >= nodes and here[1] >= gpus:
                    return None
                words = (
                    f"{here[0]} of {nodes} machines and {here[1]} of {gpus} GPUs are here: waiting for `engine node`"
                )
                if words != said:
                    self._on_line(said := words)
            await asyncio.wait({self._ended}, timeout=_LOOK_SECONDS)
        last = self._child.lines[-1] if self._child.lines else "it printed nothing"
        return f"Ray's head ended with code {self._ended.result()}: {last}"

    async def _count(self) -> tuple[int, int] | None:
        """Machines and GPUs in the cluster; None while the head does not answer."""
        address = f"{self._settings.ray_head_address}:{self._settings.ray_port}"
        process = await asyncio.create_subprocess_exec(
            *(self._place.python, "-W", "ignore", "-c", _ASK, address),
            env=self._env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            said, _ = await asyncio.wait_for(process.communicate(), _ASK_SECONDS)
        except TimeoutError:
            return None
        finally:
            if process.returncode is None:
                await asyncio.to_thread(family.kill, process.pid)
                await process.wait()
        numbers = said.split()[-2:]
        return (int(numbers[0]), int(numbers[1])) if process.returncode == 0 and len(numbers) == 2 else None

"""Simulated GPUs, plausible enough to design dashboards and to try alerts without hardware.

Load rises and falls over minutes, each GPU a little out of step; power, temperature, clocks and energy follow from
it. Names end in `(demo)` so that nobody takes them for real.
"""

from __future__ import annotations

import math
import re
import select
import time
from collections.abc import Callable
from dataclasses import dataclass

from gpu_exporter.readings import Driver, Gpu, Identity, Reading, Sample

GIB = 1024.0**3
LINK_RATE = 2e9  # bytes a second that a GPU moves over its links


@dataclass(frozen=True, slots=True)
class Model:
    """Data-sheet figures of one product: bytes, watts, hertz; `links` are its NVLinks."""

    name: str
    memory: float
    idle_power: float
    power_limit: float
    clock: float
    memory_clock: float
    links: int
    architecture: str
    compute_capability: str
    performance_counters: bool


MODELS = {
    "H100": Model("NVIDIA H100 80GB HBM3", 80 * GIB, 70, 700, 1.98e9, 2.619e9, 18, "Hopper", "9.0", True),
    "H200": Model("NVIDIA H200", 141 * GIB, 75, 700, 1.98e9, 3.201e9, 18, "Hopper", "9.0", True),
    "A100": Model("NVIDIA A100-SXM4-80GB", 80 * GIB, 55, 400, 1.41e9, 1.593e9, 12, "Ampere", "8.0", False),
    "L40S": Model("NVIDIA L40S", 48 * GIB, 32, 350, 2.52e9, 9.001e9, 0, "Ada Lovelace", "8.9", False),
    "L4": Model("NVIDIA L4", 24 * GIB, 16, 72, 2.04e9, 6.251e9, 0, "Ada Lovelace", "8.9", False),
}
PLAN = re.compile(r"([1-9]\d?)x([A-Za-z0-9]+)")
PERIOD_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """How many of which model to simulate."""

    count: int
    model: Model


def parse_plan(text: str) -> DemoPlan | None:
    """`2xH100` as a plan, or None when it is not one."""
    found = PLAN.fullmatch(text)
    if not found or int(found[1]) > 16 or found[2].upper() not in MODELS:
        return None
    return DemoPlan(int(found[1]), MODELS[found[2].upper()])


class Demo:
    """Stands where the keeper stands, and never fails."""

    replacements = 0
    stuck = 0

    def __init__(self, plan: DemoPlan, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan, self._clock, self._started = plan, clock, clock()

    def sample(self, wake: int) -> Sample:
        """The GPUs as they would be now."""
        elapsed = self._clock() - self._started
        gpus = tuple(_gpu(self._plan.model, index, elapsed) for index in range(self._plan.count))
        return Sample(Driver("580.95.05", "13.0", "13.580.95.05"), gpus)

    def idle(self, seconds: float, wake: int) -> None:
        """Wait, or until the descriptor `wake` is readable."""
        select.select([wake], [], [], seconds)

    def renew(self) -> None:
        """There is nothing to renew."""

    def close(self) -> None:
        """There is nothing to close."""


def _load(index: int, elapsed: float) -> float:
    """Utilisation 0…1 at a time."""
    slow = math.sin(2 * math.pi * elapsed / PERIOD_SECONDS - math.pi / 2)
    fast = math.sin(2 * math.pi * elapsed / 17 + index)
    return min(1.0, max(0.0, 0.5 + 0.45 * slow + 0.05 * fast))


def _energy(model: Model, index: int, elapsed: float) -> float:
    """The integral of the power below, without the clipping at its ends, which never takes effect."""
    slow, fast = 2 * math.pi / PERIOD_SECONDS, 2 * math.pi / 17
    integral = (
        0.5 * elapsed
        - 0.45 / slow * (math.cos(slow * elapsed - math.pi / 2) - math.cos(-math.pi / 2))
        - 0.05 / fast * (math.cos(fast * elapsed + index) - math.cos(index))
    )
    return model.idle_power * elapsed + (0.9 * model.power_limit - model.idle_power) * integral


def _gpu(model: Model, index: int, elapsed: float) -> Gpu:
    load = _load(index, elapsed)
    power = model.idle_power + (0.9 * model.power_limit - model.idle_power) * load
    used = model.memory * (0.02 if elapsed < 1 else 0.9)
    moved = LINK_RATE * elapsed
    plain = {
        "utilization": load,
        "memory_utilization": load * 0.6,
        "encoder_utilization": 0.0,
        "decoder_utilization": 0.0,
        "jpeg_utilization": 0.0,
        "ofa_utilization": 0.0,
        "memory_total": model.memory,
        "memory_used": used,
        "memory_free": model.memory * 0.99 - used,
        "memory_reserved": model.memory * 0.01,
        "temperature": 32 + 38 * load,
        "memory_temperature": 38 + 40 * load,
        "temperature_margin": 55 - 38 * load,
        "power": power,
        "power_instant": power,
        "power_average": power,
        "energy": _energy(model, index, elapsed),
        "performance_state": 0.0,
        "persistence_mode": 1.0,
        "compute_mode": 0.0,
        "ecc_mode": 1.0,
        "row_remap_pending": 0.0,
        "row_remap_failure": 0.0,
        "recovery_action": 0.0,
        "pcie_generation": 5.0,
        "pcie_generation_maximum": 5.0,
        "pcie_width": 16.0,
        "pcie_width_maximum": 16.0,
        "pcie_replays": 0.0,
        "mig_mode": 0.0,
    }
    if model.performance_counters:
        shares = {"graphics": 1.0, "sm": 0.9, "tensor": 0.55, "dram": 0.7, "fp16": 0.1, "fp32": 0.15, "fp64": 0.0}
        plain |= {f"{name}_active": load * share for name, share in shares.items()}
        plain |= {"sm_occupancy": load * 0.4, "integer_active": load * 0.2}
        plain |= {"pcie_transmit_rate": LINK_RATE / 8, "pcie_receive_rate": LINK_RATE / 4}
        plain |= {"pcie_transmitted": moved / 8, "pcie_received": moved / 4}
    readings: dict[str, list[Reading]] = {quantity: [(value, ())] for quantity, value in plain.items()}
    readings["power_limit"] = [(model.power_limit, (kind,)) for kind in ("enforced", "default", "maximum")]
    readings["clock"] = [
        (model.clock * (0.35 + 0.6 * load), ("sm",)),
        (model.clock * (0.35 + 0.6 * load), ("graphics",)),
        (model.memory_clock, ("memory",)),
    ]
    readings["clock_maximum"] = [
        (model.clock, ("sm",)),
        (model.clock, ("graphics",)),
        (model.memory_clock, ("memory",)),
    ]
    readings["clock_event"] = [
        (float(load < 0.03), ("gpu_idle",)),
        (0.0, ("sw_power_cap",)),
        (0.0, ("hw_thermal_slowdown",)),
        (0.0, ("sw_thermal_slowdown",)),
        (0.0, ("hw_power_brake_slowdown",)),
    ]
    readings["ecc_errors"] = [(0.0, (kind, "volatile")) for kind in ("corrected", "uncorrected")]
    readings["remapped_rows"] = [(0.0, (cause,)) for cause in ("correctable", "uncorrectable")]
    for quantity, value in (("nvlink_state", 1.0), ("nvlink_transmitted", moved), ("nvlink_received", moved)):
        readings[quantity] = [(value, (str(link),)) for link in range(model.links)]
    readings["nvlink_errors"] = [(0.0, (str(link), kind)) for link in range(model.links) for kind in ("replay", "crc")]
    identity = Identity(
        index,
        f"GPU-00000000-0000-4000-8000-{index:012d}",
        name=f"{model.name} (demo)",
        pci_bus_id=f"00000000:{0x10 + index:02X}:00.0",
        serial=f"demo-{index}",
        vbios_version="96.00.00.00.00",
        architecture=model.architecture,
        compute_capability=model.compute_capability,
        minor_number=index,
    )
    return Gpu(identity, readings)

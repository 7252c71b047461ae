"""What a sample is made of, and how it crosses the pipe between the probe and the exporter.

A reading is one number in base units with the values of its extra labels (a link, a fan, a reason). Its name is a
quantity: the tables of metric names (`native.py`, `dcgm.py`) say what a quantity is called outside.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Reading = tuple[float, tuple[str, ...]]
Readings = Mapping[str, Sequence[Reading]]


def add(found: dict[str, list[Reading]], quantity: str, value: float, *labels: str) -> None:
    """Put one reading to the others, unless it is no number: a share of no time at all."""
    if math.isfinite(value):
        found.setdefault(quantity, []).append((float(value), labels))


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a GPU is. `uuid` never changes; `index` is NVML's order at the time of the sample."""

    index: int
    uuid: str
    name: str = ""
    pci_bus_id: str = ""
    serial: str = ""
    vbios_version: str = ""
    architecture: str = ""
    compute_capability: str = ""
    minor_number: int | None = None


@dataclass(frozen=True, slots=True)
class MigInstance:
    """One MIG device of a GPU: its own memory and, where the driver measures it, its own activity."""

    uuid: str
    gpu_instance: str
    compute_instance: str
    profile: str
    readings: Readings = field(default_factory=dict)

    @property
    def gpu_profile(self) -> str:
        """The profile of its GPU instance: without the compute instance's share of it (`1c.3g.40gb`)."""
        return self.profile.rpartition("c.")[2]


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as one sample saw it. `unreadable` names why it gave no data (`lost`, `hung`), else it is empty."""

    identity: Identity
    readings: Readings = field(default_factory=dict)
    mig: tuple[MigInstance, ...] = ()
    unreadable: str = ""


@dataclass(frozen=True, slots=True)
class Driver:
    """Versions of the driver's parts; CUDA's is the newest that the driver supports."""

    version: str = ""
    cuda_version: str = ""
    nvml_version: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """Everything one pass over the GPUs gave.

    `failures` counts failed calls by (call, error) since the last sample; `calls` is the number of calls into the
    driver; `duration` is in seconds.
    """

    driver: Driver
    gpus: tuple[Gpu, ...]
    failures: Mapping[tuple[str, str], int] = field(default_factory=dict)
    calls: int = 0
    duration: float = 0.0


def encode(sample: Sample) -> dict[str, Any]:
    """The sample as JSON-ready data."""
    return {
        "driver": [sample.driver.version, sample.driver.cuda_version, sample.driver.nvml_version],
        "gpus": [
            {
                "identity": [getattr(gpu.identity, name) for name in Identity.__slots__],
                "readings": gpu.readings,
                "mig": [[m.uuid, m.gpu_instance, m.compute_instance, m.profile, m.readings] for m in gpu.mig],
                "unreadable": gpu.unreadable,
            }
            for gpu in sample.gpus
        ],
        "failures": [[call, error, count] for (call, error), count in sample.failures.items()],
        "calls": sample.calls,
        "duration": sample.duration,
    }


def decode(data: Mapping[str, Any]) -> Sample:
    """The inverse of `encode` after a trip through JSON. Raises KeyError, TypeError or ValueError on other data."""
    return Sample(
        driver=Driver(*data["driver"]),
        gpus=tuple(
            Gpu(
                identity=Identity(*gpu["identity"]),
                readings=_readings(gpu["readings"]),
                mig=tuple(MigInstance(u, g, c, p, _readings(r)) for u, g, c, p, r in gpu["mig"]),
                unreadable=gpu["unreadable"],
            )
            for gpu in data["gpus"]
        ),
        failures={(call, error): count for call, error, count in data["failures"]},
        calls=data["calls"],
        duration=data["duration"],
    )


def _readings(data: Mapping[str, Any]) -> dict[str, tuple[Reading, ...]]:
    return {quantity: tuple((float(value), tuple(labels)) for value, labels in rows) for quantity, rows in data.items()}


def line(message: Mapping[str, Any]) -> bytes:
    """One message on the pipe."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"

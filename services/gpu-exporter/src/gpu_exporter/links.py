"""Bytes a second over all NVLinks of a GPU, from the bytes of each: DCGM's names need them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from gpu_exporter.readings import Sample

Moved = dict[tuple[str, tuple[str, ...]], float]  # bytes by direction and link


class LinkRates:
    """Compares each sample with the one before."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: dict[str, tuple[float, Moved]] = {}  # by uuid, when and what

    def added(self, sample: Sample) -> Sample:
        """The sample with `nvlink_data_rate`.

        There is none over a time in which a link came, went or began anew: its bytes were not moved in that time.
        """
        now, gpus = self._clock(), []
        for gpu in sample.gpus:
            moved = {
                (quantity, link): value
                for quantity in ("nvlink_transmitted", "nvlink_received")
                for value, link in gpu.readings.get(quantity, ())
            }
            since, before = self._last.get(gpu.identity.uuid, (now, {}))
            if moved:
                self._last[gpu.identity.uuid] = (now, moved)
            same = moved.keys() == before.keys() and all(value >= before[link] for link, value in moved.items())
            if moved and same and now > since:
                rate = sum(value - before[link] for link, value in moved.items()) / (now - since)
                gpu = replace(gpu, readings={**gpu.readings, "nvlink_data_rate": ((rate, ()),)})
            gpus.append(gpu)
        return replace(sample, gpus=tuple(gpus))

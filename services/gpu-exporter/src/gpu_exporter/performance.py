"""Performance monitoring (GPM): what a GPU, or a part of it, did between two samples."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from typing import Any

import pynvml

from gpu_exporter import calls
from gpu_exporter.asking import Asking, Device
from gpu_exporter.readings import Identity, Reading, add


class MonitoredDevice(Device):
    """A GPU with what it did. Keys are GPU instances, None the whole GPU."""

    def __init__(self, handle: Any, identity: Identity) -> None:
        super().__init__(handle, identity)
        self._samples: dict[int | None, list[Any]] = {}  # two buffers; the first holds the last sample
        self._sampled_at: dict[int | None, float] = {}  # monotonic seconds of that last sample
        self._moved: dict[str, float] = {}  # bytes, by quantity of `calls.TOTALS`

    def activity(
        self,
        ask: Asking,
        found: dict[str, list[Reading]],
        metrics: tuple[tuple[str, str, float], ...],
        instance: int | None,
    ) -> None:
        """Add activity between this sample and the one before: the first sample of a probe has none."""
        refused = ("performance", instance)  # an instance that is destroyed while it is asked ends nothing else
        if "performance" in self.unsupported or refused in self.unsupported:
            return
        support = ask.optional(self, "nvmlGpmQueryDeviceSupport")
        if support is None or not support.isSupportedDevice:
            self.unsupported.add("performance")
            return
        try:
            if instance not in self._samples:
                self._samples[instance] = [ask.call("nvmlGpmSampleAlloc") for _ in range(2)]
            older, newer = self._samples[instance]
            if instance is None:
                ask.call("nvmlGpmSampleGet", self.handle, newer)
            else:
                ask.call("nvmlGpmMigSampleGet", self.handle, instance, newer)
            self._samples[instance] = [newer, older]
            then, now = self._sampled_at.get(instance), time.monotonic()
            self._sampled_at[instance] = now
            if then is None:
                return
            request = pynvml.c_nvmlGpmMetricsGet_t(version=pynvml.NVML_GPM_METRICS_GET_VERSION)
            request.numMetrics, request.sample1, request.sample2 = len(metrics), older, newer
            for slot, (name, _, _) in enumerate(metrics):
                request.metrics[slot].metricId = getattr(pynvml, f"NVML_GPM_METRIC_{name}")
            ask.call("nvmlGpmMetricsGet", request)
        except pynvml.NVMLError as error:
            ask.classify(self.unsupported, refused, ask.last_call, error)
            return
        for slot, (_, quantity, factor) in enumerate(metrics):
            if request.metrics[slot].nvmlReturn == 0:
                value = request.metrics[slot].value * factor
                add(found, quantity, value)
                if (total := calls.TOTALS.get(quantity)) and math.isfinite(value):
                    self._moved[total] = self._moved.get(total, 0.0) + value * (now - then)
                    add(found, total, self._moved[total])

    def forget_all_but(self, instances: Collection[int]) -> None:
        """Begin anew with instances that are not there now: the next of that number is another one."""
        for instance in [one for one in self._samples if one is not None and one not in instances]:
            self._sampled_at.pop(instance, None)
            self.unsupported.discard(("performance", instance))

"""NVML through pynvml: the only file that imports it. It runs inside the probe process, where a call may hang.

Every call is announced through `note` before it is made, so that the exporter can name the one that never returned.
What a GPU does not support is asked once and then left out until the probe is replaced or MIG mode changes.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import pynvml

from gpu_exporter import calls
from gpu_exporter.containers import container_of
from gpu_exporter.readings import Driver, Gpu, Identity, MigInstance, Reading, Sample

ERROR_NAMES = {
    value: name.removeprefix("NVML_ERROR_").lower()
    for name, value in vars(pynvml).items()
    if name.startswith("NVML_ERROR_")
}
UNSUPPORTED = {"not_supported", "function_not_found", "invalid_argument", "argument_version_mismatch", "deprecated"}
# Refused for good, but by the machine's set-up and not by the GPU: counted once, so that somebody can see it.
REFUSED = {"no_permission"}
UNREADABLE = {"gpu_is_lost": "lost", "gpu_not_found": "lost", "reset_required": "reset_required"}
DRIVER_GONE = {"uninitialized", "driver_not_loaded", "lib_rm_version_mismatch", "library_not_found"}
NOT_AVAILABLE = 2**64 - 1


class DriverFailed(Exception):
    """The driver as a whole does not answer. `call` and `error` are NVML's names."""

    def __init__(self, call: str, error: str) -> None:
        super().__init__(f"{call}: {error}")
        self.call, self.error = call, error


class _Unreadable(Exception):
    """This GPU gives no data; the others may."""


class _Device:
    """One GPU as the probe knows it between samples."""

    def __init__(self, handle: Any, identity: Identity) -> None:
        self.handle, self.identity = handle, identity
        self.unsupported: set[object] = set()
        self.renamed: set[str] = set()  # calls that the driver's library does not know by their new name
        self.mig_enabled: bool | None = None
        # Two buffers for performance samples by GPU instance (None: the whole GPU); the first holds the last sample.
        self.performance: dict[int | None, list[Any]] = {}
        self.sampled_at: dict[int | None, float] = {}  # monotonic seconds of that last sample
        self.moved: dict[str, float] = {}  # bytes, by quantity of `calls.TOTALS`


class Nvml:
    """One session with the driver. `sample` is called by one thread, `next_event` by another."""

    def __init__(self, note: Callable[[str], None], *, processes: bool, pcie_throughput: bool) -> None:
        self._note, self._processes, self._pcie_throughput = note, processes, pcie_throughput
        self._devices: dict[str, _Device] = {}
        self._failures: Counter[tuple[str, str]] = Counter()
        self._calls = 0
        self._index: int | str = "-"
        self._uuids: dict[int, str] = {}
        self._events: Any = None
        self.driver = Driver()

    def open(self) -> None:
        """Initialise NVML. Raises DriverFailed."""
        try:
            self._call("nvmlInit")
            version, nvml = self._version("nvmlSystemGetDriverVersion"), self._version("nvmlSystemGetNVMLVersion")
            cuda = self._version("nvmlSystemGetCudaDriverVersion_v2")
        except pynvml.NVMLError as error:
            raise DriverFailed(self._last_call, _name(error)) from error
        self.driver = Driver(version or "", f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else "", nvml or "")

    def _version(self, call: str) -> Any:
        """A version, or None from a driver that does not offer this call: no reason to go without its readings."""
        try:
            return self._call(call)
        except pynvml.NVMLError as error:
            if _name(error) in UNSUPPORTED:
                return None
            raise

    def sample(self, skip: Collection[int] = ()) -> Sample:
        """Read every GPU but those with an index in `skip`. Raises DriverFailed."""
        started = time.monotonic()
        self._calls = 0
        self._failures.clear()
        self._index = "-"
        gpus: list[Gpu] = []
        try:
            for index in range(self._call("nvmlDeviceGetCount")):
                self._index = index
                if index in skip:
                    gpus.append(Gpu(self._known(index), unreadable="hung"))
                    continue
                try:
                    gpus.append(self._read(self._device(index)))
                except _Unreadable as error:
                    gpus.append(Gpu(self._known(index), unreadable=str(error)))
        except pynvml.NVMLError as error:  # the count itself failed
            raise DriverFailed(self._last_call, _name(error)) from error
        return Sample(self.driver, tuple(gpus), dict(self._failures), self._calls, time.monotonic() - started)

    def census(self) -> list[str]:
        """The uuids of the GPUs that answer now. Raises DriverFailed."""
        try:
            found = []
            for index in range(self._call("nvmlDeviceGetCount")):
                try:
                    found.append(self._call("nvmlDeviceGetUUID", self._call("nvmlDeviceGetHandleByIndex", index)))
                except pynvml.NVMLError:
                    continue  # not readable now: the next census asks again
            return found
        except pynvml.NVMLError as error:
            raise DriverFailed(self._last_call, _name(error)) from error

    def listen(self) -> None:
        """Register for XID events of every readable GPU. Raises DriverFailed; may be called again after a failure."""
        try:
            if self._events is not None:
                pynvml.nvmlEventSetFree(self._events)
            self._events, self._uuids = None, {}
            events = pynvml.nvmlEventSetCreate()
            for index in range(pynvml.nvmlDeviceGetCount()):
                try:
                    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                    uuid = pynvml.nvmlDeviceGetUUID(handle)
                    pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, events)
                except pynvml.NVMLError as error:
                    if _name(error) in DRIVER_GONE:
                        raise
                    continue  # a GPU that cannot report events must not silence the others
                self._uuids[_address(handle)] = uuid
            self._events = events
        except pynvml.NVMLError as error:
            raise DriverFailed("nvmlDeviceRegisterEvents", _name(error)) from error

    def next_event(self, timeout_ms: int) -> tuple[str, int] | None:
        """The next XID as (GPU's uuid, XID), or None after `timeout_ms`. Raises DriverFailed."""
        try:
            event = pynvml.nvmlEventSetWait_v2(self._events, timeout_ms)
        except pynvml.NVMLError_Timeout:
            return None
        except pynvml.NVMLError as error:
            raise DriverFailed("nvmlEventSetWait_v2", _name(error)) from error
        return self._uuids.get(_address(event.device), ""), int(event.eventData)

    # --- one GPU -----------------------------------------------------------------------------------------------

    def _device(self, index: int) -> _Device:
        try:
            handle = self._call("nvmlDeviceGetHandleByIndex", index)
            uuid = self._call("nvmlDeviceGetUUID", handle)
        except pynvml.NVMLError as error:
            self._classify(set(), None, self._last_call, error)
            raise _Unreadable("failing") from error
        known = self._devices.get(uuid)
        if known and known.identity.index == index:
            return known
        self._devices = {other: old for other, old in self._devices.items() if old.identity.index != index}
        device = self._devices[uuid] = _Device(handle, Identity(index, uuid))
        capability = self._optional(device, "nvmlDeviceGetCudaComputeCapability")
        pci = self._optional(device, "nvmlDeviceGetPciInfo_v3")
        device.identity = Identity(
            index,
            uuid,
            name=self._optional(device, "nvmlDeviceGetName") or "",
            pci_bus_id=pci.busId if pci else "",
            serial=self._optional(device, "nvmlDeviceGetSerial") or "",
            vbios_version=self._optional(device, "nvmlDeviceGetVbiosVersion") or "",
            architecture=calls.ARCHITECTURES.get(self._optional(device, "nvmlDeviceGetArchitecture") or 0, ""),
            compute_capability=".".join(map(str, capability)) if capability else "",
            minor_number=self._optional(device, "nvmlDeviceGetMinorNumber"),
        )
        return device

    def _known(self, index: int) -> Identity:
        for device in self._devices.values():
            if device.identity.index == index:
                return device.identity
        return Identity(index, "")

    def _read(self, device: _Device) -> Gpu:
        found: dict[str, list[Reading]] = {}
        mig_mode = self._optional(device, "nvmlDeviceGetMigMode")
        enabled = bool(mig_mode and mig_mode[0])
        if device.mig_enabled is not None and enabled != device.mig_enabled:
            device.unsupported.clear()  # MIG mode changes what a GPU supports
        device.mig_enabled = enabled
        if mig_mode:
            _add(found, "mig_mode", mig_mode[0])
            _add(found, "mig_mode_pending", mig_mode[1])
        for call, arguments, quantity, factor, labels in calls.NUMBERS:
            value = self._optional(device, call, *arguments)
            if value is not None:
                _add(found, quantity, value * factor, *labels)
        for call, arguments, members in calls.GROUPS:
            group = self._optional(device, call, *arguments)
            if group is not None:
                for member, quantity, factor, labels in members:
                    value = getattr(group, member) if isinstance(member, str) else group[member]
                    _add(found, quantity, value * factor, *labels)
        self._memory(device, device.handle, found)
        self._clock_events(device, found)
        self._fields(device, found, calls.FIELDS, ())
        for link in range(int(found.get("nvlink_links", [(0.0, ())])[0][0])):
            self._fields(device, found, calls.LINK_FIELDS, (link,))
        for fan in range(self._optional(device, "nvmlDeviceGetNumFans") or 0):
            speed = self._optional(device, "nvmlDeviceGetFanSpeed_v2", fan)
            if speed is not None:
                _add(found, "fan_speed", speed * calls.PERCENT, str(fan))
        self._performance(device, found, calls.PERFORMANCE, None)
        if self._pcie_throughput:
            for counter, direction in enumerate(("transmit", "receive")):
                kib = self._optional(device, "nvmlDeviceGetPcieThroughput", counter)
                if kib is not None:
                    _add(found, "pcie_throughput", kib * calls.KIB, direction)
        if self._processes:
            self._process_memory(device, found)
        return Gpu(device.identity, found, self._mig(device) if enabled else ())

    def _memory(self, device: _Device, handle: Any, found: dict[str, list[Reading]]) -> None:
        memory = self._optional(device, "nvmlDeviceGetMemoryInfo", pynvml.nvmlMemory_v2, handle=handle)
        if memory is None:  # drivers before 510 know only the first version, where used includes reserved
            memory = self._optional(device, "nvmlDeviceGetMemoryInfo", handle=handle)
        if memory is not None:
            for name in ("total", "used", "free", "reserved"):
                if hasattr(memory, name):
                    _add(found, f"memory_{name}", getattr(memory, name))

    def _clock_events(self, device: _Device, found: dict[str, list[Reading]]) -> None:
        current = self._optional(device, "nvmlDeviceGetCurrentClocksEventReasons")
        supported = self._optional(device, "nvmlDeviceGetSupportedClocksEventReasons")
        if current is not None:
            for bit, reason in calls.CLOCK_EVENT_REASONS:
                if supported is None or supported & bit:
                    _add(found, "clock_event", bool(current & bit), reason)

    def _fields(
        self,
        device: _Device,
        found: dict[str, list[Reading]],
        fields: tuple[tuple[str, str, float, tuple[str, ...]], ...],
        scope: tuple[int, ...],
    ) -> None:
        wanted = [row for row in fields if (row[0], scope) not in device.unsupported]
        if not wanted:
            return
        ids = [(getattr(pynvml, f"NVML_FI_DEV_{row[0]}"), *(scope or (0,))) for row in wanted]
        values = self._optional(device, "nvmlDeviceGetFieldValues", ids)
        for row, value in zip(wanted, values or (), strict=False):
            name, quantity, factor, labels = row
            if value.nvmlReturn:
                error = pynvml.NVMLError(value.nvmlReturn)
                self._classify(device.unsupported, (name, scope), f"field_{name.lower()}", error)
                continue
            number = _field_value(value)
            # A memory sensor that is not there reads 0 °C on some boards.
            if number != NOT_AVAILABLE and not (quantity == "memory_temperature" and number == 0):
                _add(found, quantity, number * factor, *map(str, scope), *labels)

    def _performance(
        self,
        device: _Device,
        found: dict[str, list[Reading]],
        metrics: tuple[tuple[str, str, float], ...],
        instance: int | None,
    ) -> None:
        """Activity between this sample and the one before: the first sample of a probe has none."""
        if "performance" in device.unsupported:
            return
        support = self._optional(device, "nvmlGpmQueryDeviceSupport")
        if support is None or not support.isSupportedDevice:
            device.unsupported.add("performance")
            return
        try:
            first = instance not in device.performance
            if first:
                device.performance[instance] = [self._call("nvmlGpmSampleAlloc") for _ in range(2)]
            older, newer = device.performance[instance]
            if instance is None:
                self._call("nvmlGpmSampleGet", device.handle, newer)
            else:
                self._call("nvmlGpmMigSampleGet", device.handle, instance, newer)
            device.performance[instance] = [newer, older]
            then = device.sampled_at.get(instance, 0.0)
            device.sampled_at[instance] = time.monotonic()
            if first:
                return
            request = pynvml.c_nvmlGpmMetricsGet_t(version=pynvml.NVML_GPM_METRICS_GET_VERSION)
            request.numMetrics, request.sample1, request.sample2 = len(metrics), older, newer
            for slot, (name, _, _) in enumerate(metrics):
                request.metrics[slot].metricId = getattr(pynvml, f"NVML_GPM_METRIC_{name}")
            self._call("nvmlGpmMetricsGet", request)
        except pynvml.NVMLError as error:
            self._classify(device.unsupported, "performance", self._last_call, error)
            return
        for slot, (_, quantity, factor) in enumerate(metrics):
            if request.metrics[slot].nvmlReturn == 0:
                value = request.metrics[slot].value * factor
                _add(found, quantity, value)
                if (total := calls.TOTALS.get(quantity)) and math.isfinite(value):
                    device.moved[total] = device.moved.get(total, 0.0) + value * (device.sampled_at[instance] - then)
                    _add(found, total, device.moved[total])

    def _process_memory(self, device: _Device, found: dict[str, list[Reading]]) -> None:
        processes = self._optional(device, "nvmlDeviceGetComputeRunningProcesses_v3")
        if processes is None:
            return
        _add(found, "processes", len(processes))
        memory: Counter[str] = Counter()
        for process in processes:
            memory[container_of(process.pid)] += process.usedGpuMemory or 0
        for container, used in sorted(memory.items()):
            _add(found, "process_memory", used, container)

    def _mig(self, device: _Device) -> tuple[MigInstance, ...]:
        instances = []
        for index in range(self._optional(device, "nvmlDeviceGetMaxMigDeviceCount") or 0):
            try:
                handle = self._call("nvmlDeviceGetMigDeviceHandleByIndex", device.handle, index)
                uuid, name = self._call("nvmlDeviceGetUUID", handle), self._call("nvmlDeviceGetName", handle)
                gpu_instance = self._call("nvmlDeviceGetGpuInstanceId", handle)
                compute_instance = self._call("nvmlDeviceGetComputeInstanceId", handle)
            except pynvml.NVMLError_NotFound:
                continue  # a free slot
            except pynvml.NVMLError as error:
                self._classify(set(), None, self._last_call, error)
                continue
            found: dict[str, list[Reading]] = {}
            self._memory(device, handle, found)
            self._performance(device, found, calls.MIG_PERFORMANCE, gpu_instance)
            profile = name.rpartition(" MIG ")[2]
            instances.append(MigInstance(uuid, str(gpu_instance), str(compute_instance), profile, found))
        return tuple(instances)

    # --- calling -----------------------------------------------------------------------------------------------

    def _call(self, call: str, *arguments: Any) -> Any:
        self._last_call = call
        self._note(f"{self._index} {call}")
        self._calls += 1
        return getattr(pynvml, call)(*arguments)

    def _optional(self, device: _Device, call: str, *arguments: Any, handle: Any = None) -> Any:
        """The answer, or None when it failed. The failure is classified, and what is unsupported not asked again."""
        key = (call, str(arguments) if call != "nvmlDeviceGetFieldValues" else "", handle is not None)
        if key not in device.unsupported:
            try:
                return self._call(call, device.handle if handle is None else handle, *arguments)
            except pynvml.NVMLError as error:
                self._classify(device.unsupported, key, call, error)
                if _name(error) != "function_not_found":
                    return None
                device.renamed.add(call)
        if call in device.renamed and call in calls.OLDER:
            return self._optional(device, calls.OLDER[call], *arguments, handle=handle)
        return None

    def _classify(self, unsupported: set[Any], key: object, call: str, error: pynvml.NVMLError) -> None:
        name = _name(error)
        if name in UNREADABLE:
            raise _Unreadable(UNREADABLE[name]) from error
        if name in DRIVER_GONE:
            raise DriverFailed(call, name) from error
        if name in UNSUPPORTED | REFUSED:
            unsupported.add(key)
        if name not in UNSUPPORTED:
            self._failures[call, name] += 1


def _name(error: pynvml.NVMLError) -> str:
    name: str = ERROR_NAMES.get(error.value, "unrecognised")
    return name


def _address(handle: Any) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def _field_value(value: Any) -> float:
    """The member of the union that NVML says it filled."""
    members = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
    number: float = getattr(value.value, members[value.valueType])
    return number


def _add(found: dict[str, list[Reading]], quantity: str, value: float, *labels: str) -> None:
    if math.isfinite(value):  # a share of no time at all is no number
        found.setdefault(quantity, []).append((float(value), labels))

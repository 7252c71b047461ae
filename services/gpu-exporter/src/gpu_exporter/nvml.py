"""What NVML has about each GPU. It runs inside the probe process, where a call may hang.

Every call is announced through `note` before it is made, so that the exporter can name the one that never returned.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import pynvml

from gpu_exporter import calls
from gpu_exporter.asking import UNSUPPORTED, Asking, Device, DriverFailed, Unreadable, name_of
from gpu_exporter.containers import container_of
from gpu_exporter.events import Events
from gpu_exporter.performance import MonitoredDevice
from gpu_exporter.readings import Driver, Gpu, Identity, MigInstance, Reading, Sample, add

NOT_AVAILABLE = 2**64 - 1


class Nvml:
    """One session with the driver. All but `events.tell` belongs to one thread."""

    def __init__(self, note: Callable[[str], None], *, processes: bool, pcie_throughput: bool) -> None:
        self._ask = Asking(note)
        self._processes, self._pcie_throughput = processes, pcie_throughput
        self._devices: dict[str, MonitoredDevice] = {}
        self.events = Events(self._ask)
        self.driver = Driver()

    def open(self) -> None:
        """Initialise NVML. Raises DriverFailed."""
        try:
            self._ask.call("nvmlInit")
            version, nvml = self._version("nvmlSystemGetDriverVersion"), self._version("nvmlSystemGetNVMLVersion")
            cuda = self._version("nvmlSystemGetCudaDriverVersion_v2")
        except pynvml.NVMLError as error:
            raise DriverFailed(self._ask.last_call, name_of(error)) from error
        self.driver = Driver(version or "", f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else "", nvml or "")

    def _version(self, call: str) -> Any:
        """A version, or None from a driver that does not offer this call: no reason to go without its readings."""
        try:
            return self._ask.call(call)
        except pynvml.NVMLError as error:
            if name_of(error) in UNSUPPORTED:
                return None
            raise

    def sample(self, skip: Collection[int] = ()) -> Sample:
        """Read every GPU but those with an index in `skip`. Raises DriverFailed."""
        started = time.monotonic()
        self._ask.begin()
        gpus: list[Gpu] = []
        try:
            listed = self._ask.call("nvmlDeviceGetCount")
            self.events.begin()
            for index in range(listed):
                self._ask.index = index
                if index in skip:
                    gpus.append(Gpu(self._known(index), unreadable="hung"))
                    continue
                try:
                    device = self._device(index)
                    self.events.register(device)
                    gpus.append(self._read(device))
                except Unreadable as error:
                    gpus.append(Gpu(self._known(index), unreadable=str(error)))
        except pynvml.NVMLError as error:  # the count itself failed
            raise DriverFailed(self._ask.last_call, name_of(error)) from error
        return Sample(self.driver, tuple(gpus), dict(self._ask.failures), self._ask.count, time.monotonic() - started)

    def census(self, skip: Collection[int] = ()) -> list[str]:
        """The uuids of the GPUs that answer now, without those with an index in `skip`. Raises DriverFailed."""
        try:
            found = []
            for index in range(self._ask.call("nvmlDeviceGetCount")):
                self._ask.index = index
                if index in skip:
                    continue
                try:
                    found.append(
                        self._ask.call("nvmlDeviceGetUUID", self._ask.call("nvmlDeviceGetHandleByIndex", index))
                    )
                except pynvml.NVMLError:
                    continue  # not readable now: the next census asks again
            return found
        except pynvml.NVMLError as error:
            raise DriverFailed(self._ask.last_call, name_of(error)) from error

    # --- one GPU -----------------------------------------------------------------------------------------------

    def _device(self, index: int) -> MonitoredDevice:
        try:
            handle = self._ask.call("nvmlDeviceGetHandleByIndex", index)
            uuid = self._ask.call("nvmlDeviceGetUUID", handle)
        except pynvml.NVMLError as error:
            self._ask.classify(set(), None, self._ask.last_call, error)
            raise Unreadable("failing") from error
        device = self._devices.get(uuid)
        if device is None or device.identity.index != index:
            self._devices = {other: old for other, old in self._devices.items() if old.identity.index != index}
            device = self._devices[uuid] = MonitoredDevice(handle, Identity(index, uuid))
        if not device.identified:
            troubles = self._ask.troubles()
            device.identity = self._identity(device)
            device.identified = self._ask.troubles() == troubles
        return device

    def _identity(self, device: Device) -> Identity:
        capability = self._ask.optional(device, "nvmlDeviceGetCudaComputeCapability")
        pci = self._ask.optional(device, "nvmlDeviceGetPciInfo_v3")
        return Identity(
            device.identity.index,
            device.identity.uuid,
            name=self._ask.optional(device, "nvmlDeviceGetName") or "",
            pci_bus_id=pci.busId if pci else "",
            serial=self._ask.optional(device, "nvmlDeviceGetSerial") or "",
            vbios_version=self._ask.optional(device, "nvmlDeviceGetVbiosVersion") or "",
            architecture=calls.ARCHITECTURES.get(self._ask.optional(device, "nvmlDeviceGetArchitecture") or 0, ""),
            compute_capability=".".join(map(str, capability)) if capability else "",
            minor_number=self._ask.optional(device, "nvmlDeviceGetMinorNumber"),
        )

    def _known(self, index: int) -> Identity:
        for device in self._devices.values():
            if device.identity.index == index:
                return device.identity
        return Identity(index, "")

    def _read(self, device: MonitoredDevice) -> Gpu:
        found: dict[str, list[Reading]] = {}
        troubles = self._ask.troubles()
        mig_mode = self._ask.optional(device, "nvmlDeviceGetMigMode")
        enabled = bool(mig_mode and mig_mode[0])
        if device.mig_enabled is not None and enabled != device.mig_enabled:
            device.unsupported.clear()  # MIG mode changes what a GPU supports
            device.forget_all_but(())
        device.mig_enabled = enabled
        if mig_mode:
            add(found, "mig_mode", mig_mode[0])
            add(found, "mig_mode_pending", mig_mode[1])
        for call, arguments, quantity, factor, labels in calls.NUMBERS:
            value = self._ask.optional(device, call, *arguments)
            if value is not None:
                add(found, quantity, value * factor, *labels)
        for call, arguments, members in calls.GROUPS:
            group = self._ask.optional(device, call, *arguments)
            if group is not None:
                for member, quantity, factor, labels in members:
                    value = getattr(group, member) if isinstance(member, str) else group[member]
                    add(found, quantity, value * factor, *labels)
        self._memory(device, device.handle, found)
        self._clock_events(device, found)
        self._fields(device, found, calls.FIELDS, ())
        for link in range(int(found.get("nvlink_links", [(0.0, ())])[0][0])):
            self._fields(device, found, calls.LINK_FIELDS, (link,))
        for fan in range(self._ask.optional(device, "nvmlDeviceGetNumFans") or 0):
            speed = self._ask.optional(device, "nvmlDeviceGetFanSpeed_v2", fan)
            if speed is not None:
                add(found, "fan_speed", speed * calls.PERCENT, str(fan))
        device.activity(self._ask, found, calls.PERFORMANCE, None)
        if self._pcie_throughput:
            for counter, direction in enumerate(("transmit", "receive")):
                kib = self._ask.optional(device, "nvmlDeviceGetPcieThroughput", counter)
                if kib is not None:
                    add(found, "pcie_throughput", kib * calls.KIB, direction)
        if self._processes:
            self._process_memory(device, found)
        if not found and self._ask.troubles() > troubles:  # else it may be a GPU that supports nothing
            raise Unreadable("failing")
        return Gpu(device.identity, found, self._mig(device) if enabled else ())

    def _memory(self, device: Device, handle: Any, found: dict[str, list[Reading]]) -> None:
        memory = self._ask.optional(device, "nvmlDeviceGetMemoryInfo", pynvml.nvmlMemory_v2, handle=handle)
        if memory is None:  # drivers before 510 know only the first version, where used includes reserved
            memory = self._ask.optional(device, "nvmlDeviceGetMemoryInfo", handle=handle)
        if memory is not None:
            for name in ("total", "used", "free", "reserved"):
                if hasattr(memory, name):
                    add(found, f"memory_{name}", getattr(memory, name))

    def _clock_events(self, device: Device, found: dict[str, list[Reading]]) -> None:
        current = self._ask.optional(device, "nvmlDeviceGetCurrentClocksEventReasons")
        supported = self._ask.optional(device, "nvmlDeviceGetSupportedClocksEventReasons")
        if current is not None:
            for bit, reason in calls.CLOCK_EVENT_REASONS:
                if supported is None or supported & bit:
                    add(found, "clock_event", bool(current & bit), reason)

    def _fields(
        self,
        device: Device,
        found: dict[str, list[Reading]],
        fields: tuple[tuple[str, str, float, tuple[str, ...]], ...],
        scope: tuple[int, ...],
    ) -> None:
        wanted = [row for row in fields if (row[0], scope) not in device.unsupported]
        if not wanted:
            return
        ids = [(getattr(pynvml, f"NVML_FI_DEV_{row[0]}"), *(scope or (0,))) for row in wanted]
        values = self._ask.optional(device, "nvmlDeviceGetFieldValues", ids)
        for row, value in zip(wanted, values or (), strict=False):
            name, quantity, factor, labels = row
            if value.nvmlReturn:
                error = pynvml.NVMLError(value.nvmlReturn)
                self._ask.classify(device.unsupported, (name, scope), f"field_{name.lower()}", error)
                continue
            number = _field_value(value)
            # A memory sensor that is not there reads 0 °C on some boards.
            if number != NOT_AVAILABLE and not (quantity == "memory_temperature" and number == 0):
                add(found, quantity, number * factor, *map(str, scope), *labels)

    def _process_memory(self, device: Device, found: dict[str, list[Reading]]) -> None:
        processes = self._ask.optional(device, "nvmlDeviceGetComputeRunningProcesses_v3")
        if processes is None:
            return
        add(found, "processes", len(processes))
        memory: Counter[str] = Counter()
        for process in processes:
            memory[container_of(process.pid)] += process.usedGpuMemory or 0
        for container, used in sorted(memory.items()):
            add(found, "process_memory", used, container)

    def _mig(self, device: MonitoredDevice) -> tuple[MigInstance, ...]:
        instances = []
        active: dict[int, dict[str, list[Reading]]] = {}  # by GPU instance, which compute instances may share
        for index in range(self._ask.optional(device, "nvmlDeviceGetMaxMigDeviceCount") or 0):
            try:
                handle = self._ask.call("nvmlDeviceGetMigDeviceHandleByIndex", device.handle, index)
                uuid, name = self._ask.call("nvmlDeviceGetUUID", handle), self._ask.call("nvmlDeviceGetName", handle)
                gpu_instance = self._ask.call("nvmlDeviceGetGpuInstanceId", handle)
                compute_instance = self._ask.call("nvmlDeviceGetComputeInstanceId", handle)
            except pynvml.NVMLError_NotFound:
                continue  # a free slot
            except pynvml.NVMLError as error:
                self._ask.classify(set(), None, self._ask.last_call, error)
                continue
            found: dict[str, list[Reading]] = {}
            self._memory(device, handle, found)
            if gpu_instance not in active:
                device.activity(self._ask, active.setdefault(gpu_instance, {}), calls.MIG_PERFORMANCE, gpu_instance)
            found |= active[gpu_instance]
            profile = name.rpartition(" MIG ")[2]
            instances.append(MigInstance(uuid, str(gpu_instance), str(compute_instance), profile, found))
        device.forget_all_but(active)
        return tuple(instances)


def _field_value(value: Any) -> float:
    """The member of the union that NVML says it filled."""
    members = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
    number: float = getattr(value.value, members[value.valueType])
    return number

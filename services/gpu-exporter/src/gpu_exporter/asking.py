"""How the driver is asked: each call is announced before it is made, counted, and what fails is told apart.

What a GPU does not support is asked once and then left out until the probe is replaced or MIG mode changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pynvml

from gpu_exporter import calls
from gpu_exporter.readings import Identity

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


class DriverFailed(Exception):
    """The driver as a whole does not answer. `call` and `error` are NVML's names."""

    def __init__(self, call: str, error: str) -> None:
        super().__init__(f"{call}: {error}")
        self.call, self.error = call, error


class Unreadable(Exception):
    """This GPU gives no data; the others may."""


class Device:
    """One GPU as the probe knows it between samples."""

    def __init__(self, handle: Any, identity: Identity) -> None:
        self.handle, self.identity = handle, identity
        self.unsupported: set[object] = set()
        self.renamed: set[str] = set()  # calls that the driver's library does not know by their new name
        self.mig_enabled: bool | None = None
        self.identified = False  # until it answered who it is


class Asking:
    """One thread's calls into NVML. `index` is the GPU that they are about."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self.index: int | str = "-"
        self.last_call = ""
        self.count = 0
        self.failures: Counter[tuple[str, str]] = Counter()

    def begin(self) -> None:
        """Begin a sample."""
        self.index, self.count = "-", 0
        self.failures.clear()

    def call(self, call: str, *arguments: Any) -> Any:
        """What NVML answers. Raises `pynvml.NVMLError`."""
        self.last_call = call
        self._note(f"{self.index} {call}")
        self.count += 1
        return getattr(pynvml, call)(*arguments)

    def optional(self, device: Device, call: str, *arguments: Any, handle: Any = None) -> Any:
        """The answer, or None when it failed. The failure is classified, and what is unsupported not asked again."""
        key = (call, str(arguments) if call != "nvmlDeviceGetFieldValues" else "", handle is not None)
        if key not in device.unsupported:
            try:
                return self.call(call, device.handle if handle is None else handle, *arguments)
            except pynvml.NVMLError as error:
                self.classify(device.unsupported, key, call, error)
                if name_of(error) != "function_not_found":
                    return None
                device.renamed.add(call)
        if call in device.renamed and call in calls.OLDER:
            return self.optional(device, calls.OLDER[call], *arguments, handle=handle)
        return None

    def classify(self, unsupported: set[Any], key: object, call: str, error: pynvml.NVMLError) -> None:
        """Raise `Unreadable` or `DriverFailed`, or remember what is unsupported and count the failure."""
        name = name_of(error)
        if name in UNREADABLE:
            raise Unreadable(UNREADABLE[name]) from error
        if name in DRIVER_GONE:
            raise DriverFailed(call, name) from error
        if name in UNSUPPORTED | REFUSED:
            unsupported.add(key)
        if name not in UNSUPPORTED:
            self.failures[call, name] += 1

    def troubles(self) -> int:
        """How many calls of this sample failed otherwise than for good."""
        return sum(count for (_, error), count in self.failures.items() if error not in REFUSED)


def name_of(error: pynvml.NVMLError) -> str:
    """NVML's name for an error, in small letters."""
    name: str = ERROR_NAMES.get(error.value, "unrecognised")
    return name

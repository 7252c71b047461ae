"""XID events: the sampling thread registers for them, a thread of its own waits for them.

Registering is a call about one GPU and may hang as any other. It is made where it has a deadline, and only for GPUs
that the sample asks anyway: in the waiting thread it would make the probe deaf to all GPUs, and unkillable, unseen.
"""

from __future__ import annotations

import contextlib
import ctypes
import queue
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pynvml

from gpu_exporter.asking import Asking, Device, name_of

WAIT_MS = 1000
# Events that arrive together are counted together: an XID storm costs a few lines a second, not one an event.
BURST_SECONDS = 0.2


class Events:
    """One set of events, for every GPU that was registered. `tell` belongs to the waiting thread."""

    def __init__(self, ask: Asking) -> None:
        self._ask = ask
        self._set: Any = None
        self._refused: set[str] = set()
        self._uuids: dict[int, str] = {}  # of the registered GPUs, by address
        self._to_wait_for: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._failed = False  # the waiting thread gave the set back

    def begin(self) -> None:
        """Before the GPUs of a sample: have a set that works."""
        if self._failed:
            failed, self._set, self._failed = self._set, None, False
            self._uuids.clear()
            with contextlib.suppress(pynvml.NVMLError):  # it is given up, whatever is the matter with it
                self._ask.call("nvmlEventSetFree", failed)
        if self._set is not None or self._refused:
            return
        try:
            self._set = self._ask.call("nvmlEventSetCreate")
        except pynvml.NVMLError as error:
            self._ask.classify(self._refused, "events", self._ask.last_call, error)

    def register(self, device: Device) -> None:
        """Hear of a GPU's XIDs from now on. One that cannot tell of any is asked once, any failure tried again."""
        address = _address(device.handle)
        if address in self._uuids:
            self._uuids[address] = device.identity.uuid
            return
        if self._set is None or "events" in device.unsupported:
            return
        try:
            self._ask.call("nvmlDeviceRegisterEvents", device.handle, pynvml.nvmlEventTypeXidCriticalError, self._set)
        except pynvml.NVMLError as error:
            self._ask.classify(device.unsupported, "events", self._ask.last_call, error)
            return
        first = not self._uuids
        self._uuids[address] = device.identity.uuid
        if first:
            self._to_wait_for.put(self._set)

    def tell(self, send: Callable[[dict[str, Any]], None]) -> None:
        """Send XIDs as they come, for ever. A set that cannot be waited for is replaced at the next sample."""
        while True:
            events = self._to_wait_for.get()
            try:
                while True:
                    if burst := self._burst(events):
                        send({"xids": [[uuid, xid, count, time.time()] for (uuid, xid), count in burst.items()]})
            except pynvml.NVMLError as error:
                send({"listening_failed": {"call": "nvmlEventSetWait_v2", "error": name_of(error)}})
                self._failed = True

    def _burst(self, events: Any) -> Counter[tuple[str, int]]:
        seen: Counter[tuple[str, int]] = Counter()
        event = _next(events, WAIT_MS)
        until = time.monotonic() + BURST_SECONDS
        while event is not None:
            seen[self._uuids.get(_address(event.device), ""), int(event.eventData)] += 1
            event = _next(events, 0) if time.monotonic() < until else None
        return seen


def _next(events: Any, timeout_ms: int) -> Any:
    """The next event, or None after `timeout_ms`. Not announced: the call in progress is the sampling thread's."""
    try:
        return pynvml.nvmlEventSetWait_v2(events, timeout_ms)
    except pynvml.NVMLError_Timeout:
        return None


def _address(handle: Any) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0

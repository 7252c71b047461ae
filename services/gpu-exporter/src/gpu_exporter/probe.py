"""The probe: a child process that talks to the driver, so that a call which never returns can be left behind.

It is started as `python -m gpu_exporter.probe OPTIONS`, OPTIONS being JSON: `page` (an inherited file descriptor on
which the call in progress is written), `processes`, `pcie_throughput`, `census`, and for a census `skip`. On its
standard output it sends one JSON message a line: `opened`, `sample`, `xids`, `listening_failed`, `census` or `failed`.
Each line on its standard input asks for one sample: `{"skip": [indices]}`. End of input ends it.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import sys
import threading
from typing import Any

from gpu_exporter.asking import DriverFailed
from gpu_exporter.nvml import Nvml
from gpu_exporter.readings import encode, line

PAGE_BYTES = 128
PR_SET_PDEATHSIG = 1


class Pipe:
    """The way to the exporter, shared by the sampling and the event thread."""

    def __init__(self) -> None:
        self._out = os.dup(1)
        os.dup2(2, 1)  # what the driver's library prints must not mix with messages
        self._lock = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Write one message whole."""
        data = line(message)
        with self._lock:
            while data:
                data = data[os.write(self._out, data) :]


def die_with(parent: int) -> None:
    """Have the kernel end this process when the exporter dies, whatever the driver does to it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def main() -> None:
    """Serve samples until the exporter closes the pipe."""
    options = json.loads(sys.argv[1])
    die_with(options["parent"])
    pipe = Pipe()
    page = mmap.mmap(options["page"], PAGE_BYTES)

    def note(call: str) -> None:
        page[:] = call.encode().ljust(PAGE_BYTES, b"\0")

    nvml = Nvml(note, processes=options["processes"], pcie_throughput=options["pcie_throughput"])
    try:
        nvml.open()
        if options["census"]:
            pipe.send({"census": nvml.census(options["skip"])})
            os._exit(0)
        pipe.send({"opened": True})
        threading.Thread(target=nvml.events.tell, args=(pipe.send,), daemon=True, name="xid-events").start()
        for request in sys.stdin:
            pipe.send({"sample": encode(nvml.sample(json.loads(request)["skip"]))})
            note("- idle")
    except DriverFailed as failure:
        pipe.send({"failed": {"call": failure.call, "error": failure.error}})
    os._exit(0)  # without the driver's own clean-up, which may be what hangs


if __name__ == "__main__":
    main()

"""A time of day that can be stepped while a program runs; its monotonic clock goes on as it does."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("stepped_clock.c")
needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not there (apt-get install gcc)")


class SteppedClock:
    """The clock of every program that is started with `environment`."""

    def __init__(self, folder: Path, seen_as: Path | None = None) -> None:
        """Makes the library and its control file in `folder`, which the programs see at `seen_as` (in a container)."""
        library = folder / "clock.so"
        command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(library), str(SOURCE)]
        subprocess.run(command, check=True)
        self._file = folder / "away"
        self._file.write_bytes(bytes(8))
        seen = seen_as or folder
        self.environment = {"LD_PRELOAD": str(seen / library.name), "STEPPED_CLOCK": str(seen / self._file.name)}

    def step(self, seconds: int) -> None:
        """Sets the clock `seconds` away from the machine's; felt at the next look."""
        with self._file.open("r+b", buffering=0) as file:
            file.write(struct.pack("=q", seconds))

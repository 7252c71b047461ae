"""A time of day for chosen programs: stepped while they run, or faster than it is. Monotonic clocks and sleeps stay real."""

from __future__ import annotations

import shutil
import struct
import subprocess
import time
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_suffix(".c")
COMPILER = shutil.which("gcc") or shutil.which("cc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="a C compiler is not there (apt-get install gcc)")


class WallClock:
    """The clock of every program that is started with `environment`. A restart neither stops nor turns it."""

    def __init__(
        self, folder: Path, *, factor: int = 1, began_wall: float | None = None, seen_as: Path | None = None
    ) -> None:
        """Makes the library and its control file in `folder`, which the programs see at `seen_as` (in a container).

        The clock tells `factor` seconds a second, from `began_wall` (Unix seconds; None: the real time) on.
        """
        assert COMPILER is not None
        library = folder / "wall_clock.so"
        command = [COMPILER, "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(library), str(SOURCE)]
        subprocess.run(command, check=True)
        self.factor = factor
        self.began_real = time.time()
        self.began_wall = self.began_real if began_wall is None else began_wall
        self._away = 0
        self._file = folder / "moment"
        self._file.write_bytes(struct.pack("=3q", round(self.began_real * 1e9), self._told(), factor))
        seen = seen_as or folder
        self.environment = {"LD_PRELOAD": str(seen / library.name), "WALL_CLOCK": str(seen / self._file.name)}

    def now(self) -> float:
        """What programs under this clock read now, Unix seconds."""
        return self._told() / 1e9 + (time.time() - self.began_real) * self.factor

    def step(self, seconds: int) -> None:
        """Sets the clock `seconds` away from where it would be without any step; felt at the next look."""
        self._away = seconds
        with self._file.open("r+b", buffering=0) as file:
            file.seek(8)
            file.write(struct.pack("=q", self._told()))

    def _told(self) -> int:
        return round((self.began_wall + self._away) * 1e9)

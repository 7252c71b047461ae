"""A wall clock that runs faster for chosen processes, so that days turn while a test runs. Sleeps stay real."""

from __future__ import annotations

import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).with_name("wall.c")
COMPILER = shutil.which("cc") or shutil.which("gcc")


@dataclass(frozen=True)
class Wall:
    """A clock that told `began_wall` (Unix seconds) at the real `began_real`, and tells `factor` seconds a second."""

    factor: int
    library: Path
    began_real: float = field(default_factory=time.time)
    began_wall: float = 0.0

    def now(self) -> float:
        """What processes under this clock read now, Unix seconds."""
        return self.began_wall + (time.time() - self.began_real) * self.factor

    def environment(self) -> dict[str, str]:
        """Variables that put a process under this clock."""
        return {
            "LD_PRELOAD": str(self.library),
            "SOAK_REAL_NS": str(round(self.began_real * 1e9)),
            "SOAK_WALL_NS": str(round(self.began_wall * 1e9)),
            "SOAK_FACTOR": str(self.factor),
        }


def compiled(folder: Path, factor: int, began_wall: float) -> Wall:
    """Compile the clock into `folder`. `COMPILER` must be there."""
    assert COMPILER is not None
    library = folder / "wall.so"
    subprocess.run([COMPILER, "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, SOURCE], check=True)
    return Wall(factor, library, began_wall=began_wall)

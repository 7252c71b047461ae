"""Internal secrets as files: a value given by the operator wins, else one is made once and kept."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path


def ensure(path: Path, given: str | None, mode: int = 0o400) -> bool:
    """Make `path` hold `given`, or keep what is there, or make a new random secret; whether it changed.

    The file appears in one step and is never readable to others than its owner, not even for a moment.
    """
    try:
        present = path.read_text().strip()
    except FileNotFoundError:
        present = ""
    wanted = (given or "").strip() or present or secrets.token_urlsafe(32)
    if wanted == present:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w") as file:
        file.write(wanted)
        file.flush()
        os.fsync(file.fileno())
        os.fchmod(file.fileno(), mode)
    os.replace(temporary, path)
    return True

"""Folders in volumes get the owner who writes them: a new named volume belongs to root."""

from __future__ import annotations

import os
from pathlib import Path


def own(folder: Path, uid: int, gid: int, mode: int = 0o700) -> None:
    """Make `folder` exist and belong to `uid`:`gid`; what is in it only if it was another's."""
    folder.mkdir(parents=True, exist_ok=True)
    was = folder.stat()
    if (was.st_uid, was.st_gid) != (uid, gid):
        for root, folders, files in os.walk(folder):
            for name in (*folders, *files):
                os.chown(Path(root, name), uid, gid, follow_symlinks=False)
        os.chown(folder, uid, gid)
    if was.st_mode & 0o777 != mode:
        folder.chmod(mode)

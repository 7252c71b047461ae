"""Copies this machine's pip configuration, and the folders it names, into an image's file tree.

Folders too large for an image (`MOST_BYTES`) are left out together with their entry: an entry that the image
cannot reach would make installations fail.
"""

import configparser
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

MOST_BYTES = 1_000_000_000


def local_folder(entry: str) -> Path | None:
    """The folder an index or find-links entry names on this machine, if it names one."""
    if entry.startswith("file:"):
        return Path(unquote(urlparse(entry).path))
    return Path(entry) if entry.startswith("/") else None


def carry(option: str, entry: str, tree: Path) -> bool:
    """Whether the entry will work inside the image; copies the folder it needs.

    Local indexes stay out: their pages point at files elsewhere on this machine.
    """
    folder = local_folder(entry)
    if folder is None or option == "cert":
        return True
    if option != "find-links" or not folder.is_dir():
        return False
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > MOST_BYTES:
        print(f"standin: {folder} ({size / 1e9:.1f} GB) stays out of the images", file=sys.stderr)
        return False
    shutil.copytree(folder, tree / str(folder).lstrip("/"), dirs_exist_ok=True)
    return True


def main(tree: Path) -> None:
    """Writes /etc/pip.conf under the tree."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    options: dict[str, str] = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if section in ("global", ":env:"):
            kept = [entry for entry in value.strip("'\"").split() if carry(option, entry, tree)]
            if kept:
                options[option] = "\n".join(dict.fromkeys([*options.get(option, "").split(), *kept]))
    options["cert"] = "/etc/ssl/certs/ca-certificates.crt"
    configuration = configparser.RawConfigParser()
    configuration["global"] = options
    target = tree / "etc" / "pip.conf"
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w") as file:
        configuration.write(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

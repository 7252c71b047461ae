"""`engine fetch`: bring a model here, whole and checked. Runs where there is a network; the engine then needs none."""

from __future__ import annotations

import fcntl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine import embedded, hub, place
from engine.settings import Settings


class FetchError(Exception):
    """The model could not be brought here; the message is one line that says what to do."""


def fetch(settings: Settings, name: str, say: Callable[[str], None]) -> Path:
    """The folder of the model `name`, fetched unless that revision of it is there. Raises `FetchError`.

    Interrupted, it goes on next time where it was. Two at once: the second waits for the first.
    """
    folder = place.model_dir(settings, name)
    revision = settings.model_revision
    if place.is_present(folder) and not _of_another_revision(folder, revision):
        say(f"{name} is here: {folder}")
        return folder
    if folder == Path(name).expanduser():
        raise FetchError(f"MODEL_NAME: {name} is no folder with a model (config.json and *.safetensors)")
    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder, say):
            changed = _of_another_revision(folder, revision)
            if place.is_present(folder) and not changed:
                return folder
            if name == embedded.NAME:
                return _make_embedded(settings, folder, say)
            hub.quiet()
            model = hub.look_up(name, revision, token)
            if changed:
                say(f"{name}: here is another revision than MODEL_REVISION={revision}: fetching what differs")
                (folder / embedded.COMPLETE).unlink()
                hub.drop_others(model, folder)
            with _growing(folder, sum(file.size for file in model.files), name, say):
                hub.download(model, folder, token, say)
            (folder / embedded.COMPLETE).write_text(f"{name} {model.commit} {revision or ''}\n")
    except hub.HubError as error:
        raise FetchError(str(error)) from None
    except OSError as error:
        raise FetchError(f"MODEL_CACHE_DIR: {folder}: {error.strerror}") from None
    return folder


def _of_another_revision(folder: Path, revision: str | None) -> bool:
    """Whether what was fetched is not `revision` (commit, branch or tag); None: whatever is here will do."""
    marker = folder / embedded.COMPLETE
    return revision is not None and marker.is_file() and revision not in marker.read_text().split()[1:]


def _make_embedded(settings: Settings, folder: Path, say: Callable[[str], None]) -> Path:
    hub.need_space(folder, 700_000_000, embedded.NAME)
    say(f"{embedded.NAME}: download of 93 MB, then conversion (about a minute)")
    # As a file and isolated: that Python has libraries of its own, and none of ours may get in between.
    argv = [place.python(settings), "-I", embedded.__file__, str(folder.parent)]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise FetchError((done.stderr.strip().splitlines() or ["it said nothing"])[-1])
    return folder


@contextmanager
def _alone(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another one is fetching {folder.name}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _growing(folder: Path, total: int, name: str, say: Callable[[str], None], every: float = 10.0) -> Iterator[None]:
    """Say every `every` seconds how much has arrived, seen from the files' sizes."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(every):
            arrived = 0
            for path in folder.rglob("*"):
                try:
                    arrived += path.stat().st_size if path.is_file() else 0
                except OSError:
                    continue  # renamed while we looked
            say(f"{name}: {arrived / 1e9:.2f} of {total / 1e9:.2f} GB, {min(100, 100 * arrived // max(total, 1))} %")

    thread = threading.Thread(target=watch, daemon=True, name="fetch-progress")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()

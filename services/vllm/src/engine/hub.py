"""The model hub: what a model's files are, how big, how they get here. The only file that knows `huggingface_hub`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

MARGIN_BYTES = 1 << 30  # left free beside the model: a full disk breaks more than the download
# Weights in other formats than safetensors would be downloaded twice over and never read.
_IGNORED = (
    "*.bin",
    "*.pth",
    "*.pt",
    "*.gguf",
    "*.onnx",
    "*.h5",
    "*.msgpack",
    "*.ot",
    "original/*",
    "onnx/*",
    "*.tflite",
)


class HubError(Exception):
    """The hub cannot give the model; the message is one line that says what to do."""


@dataclass(frozen=True)
class RemoteFile:
    """One file on the hub: its path, bytes, SHA-256 (of the big ones) or Git's blob id (SHA-1, of the others)."""

    path: str
    size: int
    sha256: str | None
    blob: str | None = None


@dataclass(frozen=True)
class RemoteModel:
    """A model at one commit."""

    name: str
    commit: str
    files: tuple[RemoteFile, ...]


@contextmanager
def _readable_errors(name: str) -> Iterator[None]:
    """The library's errors as ours, one line each."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise HubError(f"{name} is gated: accept its terms on the hub, then set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{name} has no such revision: correct MODEL_REVISION") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise HubError(f"the hub has no model {name}: correct MODEL_NAME (a private one needs HF_TOKEN)") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        raise HubError(f"{name} is not here and HF_HUB_OFFLINE forbids to fetch it") from None
    except (errors.HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        words = " ".join(str(error).split())[:200]
        raise HubError(f"the hub cannot be reached for {name}: {type(error).__name__}: {words}") from None


def look_up(name: str, revision: str | None, token: str | None) -> RemoteModel:
    """What the hub has under `name`. Raises `HubError`."""
    from huggingface_hub import HfApi

    with _readable_errors(name):
        info = HfApi(token=token or False).model_info(name, revision=revision, files_metadata=True)
    siblings = info.siblings or []
    has_safetensors = any(sibling.rfilename.endswith(".safetensors") for sibling in siblings)
    if not has_safetensors:
        raise HubError(f"{name} has no safetensors weights: choose a model that does")
    files = tuple(
        RemoteFile(
            sibling.rfilename,
            int(sibling.size or 0),
            sibling.lfs.sha256 if sibling.lfs else None,
            None if sibling.lfs else sibling.blob_id,
        )
        for sibling in siblings
        if not any(fnmatch(sibling.rfilename, pattern) for pattern in _IGNORED)
    )
    return RemoteModel(name, str(info.sha), files)


def download(model: RemoteModel, target: Path, token: str | None, say: Callable[[str], None]) -> None:
    """Bring all files to `target`, going on where an earlier attempt stopped, then check them. Raises `HubError`."""
    missing = [file for file in model.files if not _is_whole(target / file.path, file)]
    need_space(target, sum(file.size for file in missing), model.name)
    total = sum(file.size for file in model.files)
    done = total - sum(file.size for file in missing)
    for number, file in enumerate(missing, 1):
        say(f"{model.name}: file {number} of {len(missing)}, {file.path}, {_size(file.size)} ({_share(done, total)})")
        with _readable_errors(model.name):
            _download_file(model, file, target, token)
        if not _is_whole(target / file.path, file):
            with _readable_errors(model.name):
                (target / file.path).unlink()
            raise HubError(f"{file.path} of {model.name} arrived damaged and was removed: fetch again")
        done += file.size
    say(f"{model.name}: {len(model.files)} files, {_size(total)}, checked")


def drop_others(model: RemoteModel, target: Path) -> None:
    """Remove what another revision of the model left in `target`: vLLM reads every weight that it finds."""
    kept = {target / file.path for file in model.files}
    for path in [path for path in target.rglob("*") if path.is_file() and path not in kept]:
        path.unlink()


def _download_file(model: RemoteModel, file: RemoteFile, target: Path, token: str | None) -> None:
    """One file, from where its `.part` ends. The library's own download begins a file anew in each process."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils._headers import build_hf_headers

    path = target / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    url = hf_hub_url(model.name, file.path, revision=model.commit)
    sent: dict[str, str] = dict(build_hf_headers(token=token or False))
    location = get_hf_file_metadata(url, token=token or False).location
    if urlsplit(location).netloc != urlsplit(url).netloc:
        sent.pop("authorization", None)  # the store behind the hub has its own, in the address
    if part.is_file() and part.stat().st_size > file.size:
        part.unlink()
    with part.open("ab") as stream:
        if stream.tell() < file.size:
            http_get(
                location,
                stream,
                resume_size=stream.tell(),
                headers=sent,
                expected_size=file.size,
                displayed_filename=file.path,
            )
    part.rename(path)


def headers(name: str, revision: str | None, token: str | None) -> tuple[dict[str, Any], int]:
    """The model's config.json and the bytes of its weights, without downloading these. Raises `HubError`."""
    from huggingface_hub import hf_hub_download

    model = look_up(name, revision, token)
    with _readable_errors(name):
        path = hf_hub_download(name, "config.json", revision=model.commit, token=token or False)
    config: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return config, sum(file.size for file in model.files if file.path.endswith(".safetensors"))


def need_space(folder: Path, size: int, what: str) -> None:
    """Refuse before the first byte when the disk cannot hold `size` more bytes. Raises `HubError`."""
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < size + MARGIN_BYTES:
        raise HubError(
            f"{what} needs {_size(size)} (and {_size(MARGIN_BYTES)} to spare) on {place}, {_size(free)} are free: "
            "free some, or set MODEL_CACHE_DIR to another disk"
        )


def _is_whole(path: Path, file: RemoteFile) -> bool:
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if file.sha256 is None:
        return file.blob is None or _blob_id(path, file.size) == file.blob
    checked = path.with_name(f".{path.name}.sha256")  # hashing 100 GB again at every start would take minutes
    mark = f"{file.sha256} {path.stat().st_mtime_ns}"
    if checked.is_file() and checked.read_text() == mark:
        return True
    with path.open("rb") as stream:
        whole = hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256
    if whole:
        checked.write_text(mark)
    return whole


def _blob_id(path: Path, size: int) -> str:
    """What Git calls the file: SHA-1 of a head and the content."""
    return hashlib.sha1(b"blob %d\0" % size + path.read_bytes(), usedforsecurity=False).hexdigest()


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _share(done: int, total: int) -> str:
    return f"{100 * done // max(total, 1)} % so far"


def quiet() -> None:
    """Bars redrawn in place are no log lines; must be set before the library is imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

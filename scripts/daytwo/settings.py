"""What the operator has set, as Compose and `make up` see it: the environment over `.env`."""

import os
import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def dotenv(path: Path) -> dict[str, str]:
    """NAME=value lines; comments and quotes as Compose has them."""
    values = {}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        name, separator, value = line.strip().partition("=")
        if separator and not name.startswith("#"):
            quoted = re.fullmatch(r"""(['"])(.*?)\1(\s+#.*)?""", value.strip())
            value = quoted[2] if quoted else re.sub(r"\s+#.*", "", value.strip())
            values[name.removeprefix("export ").strip()] = value
    return values


def setting(name: str) -> str:
    """One variable; empty when it is not set. Raises `OSError` when `.env` cannot be read: it might be there."""
    given = os.environ.get(name)
    return (dotenv(REPOSITORY / ".env").get(name, "") if given is None else given).strip()


def folder(name: str) -> Path | None:
    """A folder that a variable names, from this checkout on when it is relative; none when it names none."""
    given = setting(name)
    return REPOSITORY / os.path.expanduser(given) if given else None


def models_folder() -> Path | None:
    """The folder that MODEL_CACHE_DIR names; none where it names a volume, told apart as Compose does."""
    return folder("MODEL_CACHE_DIR") if re.match(r"[.~]|.*/", setting("MODEL_CACHE_DIR")) else None


def own_certificate() -> Path:
    """The folder of the operator's own certificate."""
    return folder("CERTIFICATES_DIR") or REPOSITORY / "certificates"


def state() -> Path:
    """Where state is kept. A `.env` that cannot be read is told by whoever asks for a setting."""
    try:
        return folder("APPLIANCE_STATE") or REPOSITORY / ".state"
    except OSError:
        return REPOSITORY / ".state"

"""What the examinations look at: this checkout, its settings, its place. Read once, never written."""

import os
from dataclasses import dataclass
from pathlib import Path

from scripts.daytwo.place import STATE, ComposePlace, LocalPlace, Place, PlaceError, find
from scripts.daytwo.settings import REPOSITORY, dotenv


@dataclass(frozen=True)
class Situation:
    """`settings` is the environment over `.env`, as Compose reads them.

    `unread` says why `.env` could not be read, `missing` why there is no `place`; both are empty when all is well.
    """

    repository: Path
    state: Path
    settings: dict[str, str]
    place: Place | None
    unread: str = ""
    missing: str = ""

    @property
    def local(self) -> bool:
        """Whether the appliance runs, or would run, as processes of this machine."""
        return isinstance(self.place, LocalPlace) or self.settings.get("MODE") == "local"

    @property
    def compose(self) -> ComposePlace | None:
        """The Compose project, if that is how the appliance runs."""
        return self.place if isinstance(self.place, ComposePlace) else None

    def port(self, name: str) -> int:
        """A published port: HTTPS_PORT or HTTP_PORT."""
        usual = {"HTTPS_PORT": (443, 8443), "HTTP_PORT": (80, 8088)}[name][self.local]
        return int(self.settings.get(name) or usual)


def look() -> Situation:
    """The situation of this checkout."""
    place: Place | None = None
    given: dict[str, str] = {}
    unread = missing = ""
    try:
        given = dotenv(REPOSITORY / ".env")
    except OSError as problem:
        unread = problem.strerror or str(problem)
    try:
        place = find()
    except (PlaceError, OSError) as problem:
        missing = str(problem)
    return Situation(REPOSITORY, STATE, {**given, **os.environ}, place, unread, missing)

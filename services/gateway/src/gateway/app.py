"""The composition root: everything is made here once, started in order, drained and stopped in reverse."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

"""Old usage records go, in small pieces: nobody waits long for the write lock. Totals stay.

Records lie in the order in which they ended, which is nearly that of their age: so the oldest are looked for at the
front. A clock that was ahead for a while leaves records there that are young for long; what lies behind them is found
by walking through the table, a little at a time. (An index on their age would cost every record a page.)
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.store.connection import Database

PIECE = 500
_WALK_PIECES = 4  # at a time: 5,000,000 records are walked through in less than two days


@dataclass(slots=True)
class _Looked:
    seen: int
    gone: int
    last: int


class Retention:
    """Where it is looked next. Used by the writer's thread alone."""

    def __init__(self) -> None:
        self._front = 0
        self._walked = 0

    def forget(self, database: Database, before: float) -> bool:
        """Delete a piece of what started before `before` (Unix seconds); True: there may be more, go on soon."""
        looked = _look(database, before, self._front)
        if looked.gone and looked.seen == PIECE:
            self._front = looked.last
            return True
        self._front = 0
        for _ in range(_WALK_PIECES):
            looked = _look(database, before, self._walked)
            self._walked = looked.last if looked.seen == PIECE else 0
            if looked.gone:
                return True
            if not self._walked:
                break
        return False


def _look(database: Database, before: float, after: int) -> _Looked:
    """Delete what is old among the next `PIECE` records behind the id `after`."""
    found = database.rows(
        "SELECT COUNT(*), MAX(id), SUM(CASE WHEN started_at < ? THEN 1 ELSE 0 END) FROM "
        "(SELECT id, started_at FROM usage_records WHERE id > ? ORDER BY id LIMIT ?) AS piece",
        (before, after, PIECE),
    )
    seen, last, old = found[0]
    if old:
        with database.transaction():
            text = "DELETE FROM usage_records WHERE id > ? AND id <= ? AND started_at < ?"
            database.run(text, (after, last, before))
    return _Looked(seen, int(old or 0), last or 0)

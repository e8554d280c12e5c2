"""Files that have been seen and may not be whole."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable

from .watch_state import Key

#: Images that are handed out at once.
AT_ONCE = 10_000
# Earlier than any reading of the clock.
_LONG_AGO = -1e9


class Waiting:
    """Names, sizes and times of files at the latest look; in a temporary file where they are many.

    Parameters
    ----------
    pause : float
        Seconds for which a file must stay as it is.

    Examples
    --------
    >>> waiting = Waiting(pause=1e-7)
    >>> waiting.look([(Key(b"a.png", 5, 0), True), (Key(b"b.png", 5, 0), True)]), waiting.take()
    (2, [])
    >>> waiting.look([(Key(b"a.png", 5, 0), True), (Key(b"b.png", 6, 0), True)])
    2
    >>> [key.name for key in waiting.take()]
    [b'a.png']
    """

    def __init__(self, pause: float) -> None:
        self._pause = pause
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.execute(
            "CREATE TABLE waiting (name BLOB PRIMARY KEY, size INT, changed INT, first REAL, latest REAL) WITHOUT ROWID"
        )

    def look(self, found: Iterable[tuple[Key, bool]]) -> int:
        """Compare with the look before: a file that has changed begins to wait anew, one that is gone is forgotten.

        Parameters
        ----------
        found : iterable of (Key, bool)
            What is there and has no row, and whether it must wait.

        Returns
        -------
        int
            How many wait.
        """
        now = time.monotonic()
        self._database.execute("BEGIN")
        self._database.executemany(
            "INSERT INTO waiting VALUES (?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET "
            "first = CASE WHEN size = excluded.size AND changed = excluded.changed THEN first ELSE excluded.first END, "
            "size = excluded.size, changed = excluded.changed, latest = excluded.latest",
            ((*key, now if waits else _LONG_AGO, now) for key, waits in found),
        )
        self._database.execute("DELETE FROM waiting WHERE latest < ?", (now,))
        self._database.execute("COMMIT")
        (count,) = self._database.execute("SELECT count(*) FROM waiting").fetchone()
        return int(count)

    def take(self) -> list[Key]:
        """The first that two looks have found the same, so many seconds apart; they are forgotten."""
        keys = self._database.execute(
            "SELECT name, size, changed FROM waiting WHERE latest - first >= ? ORDER BY first, name LIMIT ?",
            (self._pause, AT_ONCE),
        ).fetchall()
        self._database.executemany("DELETE FROM waiting WHERE name = ?", ((name,) for name, _, _ in keys))
        return [Key(*key) for key in keys]

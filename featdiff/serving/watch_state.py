"""What a watch has done: which images have a row, the test of drift, and a file of rows that is never behind it.

A batch is one transaction of a small SQLite file, which holds names, counts, the test of drift and the rows themselves
with their place in the output. Only then the output is written. A process may be killed at any moment: either the batch
is not in the state, and its images are found again, or it is, and the next process writes its rows to the same place
once more. So each image has its row once, and the test of drift has seen each row once.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Self

from ..exceptions import FeatdiffError, UsageError
from ..verdicts.counts import Counts

#: The state of rows.jsonl is called so, with this behind it.
SUFFIX = ".state"
#: Of what rows are made with, that which stays even after a restart.
SOURCE = "source"
# Tells SQLite files of ours from others, and their layout.
_APPLICATION = 0x66647731
_VERSION = 1
_READ_WRITE = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)


class Key(NamedTuple):
    """What tells one image from others and from itself with another content; times are compared, never ordered.

    Attributes
    ----------
    name : bytes
    size : int
        In bytes; -1 where there is no file to ask.
    changed : int
        Time of the last change in nanoseconds; 0 where there is no file to ask.
    """

    name: bytes
    size: int
    changed: int


class WatchState:
    """The rows of a watch and what it knows of them, for one process at a time.

    Parameters
    ----------
    output : Path
        The file of rows, which grows; the state lies beside it, as ``NAME.state``.
    made_with : mapping of str to JSON values
        What decides the rows, by a name for people, and as ``source`` where they come from.
    rotate_bytes : int, default 0
        Once the output has so many bytes, it becomes ``NAME-000001.jsonl``, and a new one is begun; 0: never.
    restart : bool, default False
        Accept rows of the same source that were made with something else, and forget the test of drift.

    Attributes
    ----------
    counts : Counts
        Of all rows.
    drift : dict, optional
        The test of drift after them, as JSON; None before the first, and after a restart.
    told : list of str
        Sides whose alarm was told.
    since : int
        How many rows there were when the test of drift began.

    Raises
    ------
    UsageError
        The rows were made with something else, another process writes them, or what is there is no state of a watch.
    FeatdiffError
        The place cannot be written, or the output was changed by somebody else.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from featdiff.serving.watch_state import Key, WatchState
    >>> from featdiff.verdicts.counts import Counts
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "rows.jsonl"
    ...     with WatchState(file, {"model": "a"}) as state:
    ...         state.add([Key(b"a.png", 5, 0)], b"{}\\n", Counts(rows=1), None)
    ...     with WatchState(file, {"model": "a"}) as state:
    ...         file.read_text(), [state.is_done(Key(b"a.png", size, 0)) for size in (5, 6)]
    ('{}\\n', [True, False])
    """

    def __init__(
        self, output: Path, made_with: Mapping[str, Any], rotate_bytes: int = 0, restart: bool = False
    ) -> None:
        self.output = Path(os.path.realpath(output))
        self.file = self.output.with_name(self.output.name + SUFFIX)
        self._rotate_bytes = rotate_bytes
        self._written = False  # the rows of the last batch, by this process
        self._check_place()
        made: dict[str, Any] = json.loads(json.dumps(made_with))  # as it is read again: with lists for tuples
        with self._named_errors():
            self._database = sqlite3.connect(self.file, timeout=0, isolation_level=None)
        try:
            with self._named_errors():
                self._open(made)
                self._check_same(made, restart)
                if restart:
                    self._save({**self._facts, "made with": made, **_no_test(self.counts.rows)}, self._rows)
                self._recover()
        except BaseException:
            self._database.close()
            raise

    # ---- open ----

    def _check_place(self) -> None:
        if self.output.exists() and not self.output.is_file():
            raise UsageError(f"{self.output} is not a regular file: rows of a watch need one", argument="output")
        if not self.output.parent.is_dir():
            raise UsageError(f"no folder {self.output.parent} for {self.output.name}", argument="output")
        known = self.file.exists() and self.file.stat().st_size
        if not known and self.output.exists() and self.output.stat().st_size:
            raise UsageError(
                f"{self.output} has rows, and there is no {self.file.name} that says of which images: move it away, or "
                "choose another file",
                argument="output",
            )

    def _open(self, made_with: dict[str, Any]) -> None:
        """Read the facts; of a new file, write the first ones. No other process can from here on."""
        database = self._database
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("PRAGMA journal_mode = WAL")  # in exclusive mode without shared memory
        database.execute("PRAGMA synchronous = FULL")
        with self._transaction():
            (application,), (version,) = (
                database.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
            )
            (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if not tables:
                self._create(made_with)
            elif application != _APPLICATION:
                raise UsageError(f"{self.file} is no state of a watch: move it away, or choose another output")
            elif version != _VERSION:
                raise UsageError(
                    f"{self.file} was written by another version of featdiff (layout {version}, now {_VERSION}): begin "
                    "with another output"
                )
        self._read()

    def _read(self) -> None:
        text, self._rows = self._database.execute("SELECT facts, rows FROM now").fetchone()
        self._facts: dict[str, Any] = json.loads(text)

    def _create(self, made_with: dict[str, Any]) -> None:
        database = self._database
        database.execute(f"PRAGMA application_id = {_APPLICATION}")
        database.execute(f"PRAGMA user_version = {_VERSION}")
        database.execute("CREATE TABLE done (name BLOB PRIMARY KEY, size INT, changed INT) WITHOUT ROWID")
        database.execute("CREATE TABLE now (facts TEXT, rows BLOB)")
        facts = {"made with": made_with, "counts": asdict(Counts()), **_no_test(0)}
        facts |= {"start": 0, "rotated": 0, "rotating": False}
        database.execute("INSERT INTO now VALUES (?, ?)", (json.dumps(facts), b""))

    def _check_same(self, made_with: dict[str, Any], restart: bool) -> None:
        """After a restart, only what the names are seen from must be the same."""
        before = self._facts["made with"]
        for name in [SOURCE] if restart else [SOURCE, *made_with, *before]:
            if before.get(name) != made_with.get(name):
                raise UsageError(
                    f"{self.output} was begun with another {name} ({_shown(before.get(name))}, now "
                    f"{_shown(made_with.get(name))}): give the same as then, or choose another output",
                    argument="output" if name == SOURCE else "restart",
                )

    def _recover(self) -> None:
        """Do what the process before had begun."""
        if self._facts["rotating"]:
            self._finish_rotation()
        if not self._rows:
            return
        size = self._size()
        if size == 0 and self._facts["start"]:  # it was moved away
            self._save({**self._facts, "start": 0}, self._rows)
        elif not self._facts["start"] <= size <= self._end:
            self._refuse(size)
        self._write()

    # ---- facts ----

    @property
    def counts(self) -> Counts:
        return Counts(**self._facts["counts"])

    @property
    def drift(self) -> dict[str, Any] | None:
        drift: dict[str, Any] | None = self._facts["drift"]
        return drift

    @property
    def told(self) -> list[str]:
        return list(self._facts["told"])

    @property
    def since(self) -> int:
        return int(self._facts["since"])

    def is_done(self, key: Key) -> bool:
        """Whether this image has a row with this content."""
        found = self._database.execute("SELECT 1 FROM done WHERE name = ? AND size = ? AND changed = ?", key)
        return found.fetchone() is not None

    # ---- write ----

    def add(self, keys: Sequence[Key], rows: bytes, counts: Counts, drift: dict[str, Any] | None) -> None:
        """Write the rows of a batch.

        Parameters
        ----------
        keys : sequence of Key
            Its images.
        rows : bytes
            Whole lines.
        counts : Counts
            Of all rows, these included.
        drift : dict, optional
            The test of drift after them, as JSON.

        Raises
        ------
        FeatdiffError
            The disk is full, or the output was changed by somebody else. The batch is either not done, or another
            process will write it.
        """
        with self._named_errors():
            start = self._next_place()
            facts = {**self._facts, "start": start, "counts": asdict(counts), "drift": drift}
            self._written = False
            with self._transaction():
                self._database.executemany("INSERT OR REPLACE INTO done VALUES (?, ?, ?)", keys)
                self._update(facts, rows)
            self._facts, self._rows = facts, rows
            self._write()

    def tell(self, side: str) -> None:
        """The alarm of a side was told."""
        with self._named_errors():
            self._save({**self._facts, "told": [*self.told, side]}, self._rows)

    @property
    def _end(self) -> int:
        return int(self._facts["start"]) + len(self._rows)

    def _next_place(self) -> int:
        """Where the next rows begin: behind the others, or in a new file."""
        size = self._size()
        if size == 0:  # at the beginning, or somebody has moved the file away
            return 0
        if size != self._end:
            self._refuse(size)
        if self._rotate_bytes and size >= self._rotate_bytes:
            number = self._facts["rotated"] + 1
            while self._rotated(number).exists():
                number += 1
            self._save({**self._facts, "start": 0, "rotated": number, "rotating": True}, b"")
            self._finish_rotation()
            return 0
        return size

    def _rotated(self, number: int) -> Path:
        return self.output.with_name(f"{self.output.stem}-{number:06}{self.output.suffix}")

    def _finish_rotation(self) -> None:
        """Give the output its number, unless that was done; the name was free when this began."""
        target = self._rotated(self._facts["rotated"])
        if self.output.exists() and not target.exists():
            self.output.rename(target)
        self._save({**self._facts, "rotating": False}, self._rows)

    def _write(self) -> None:
        """Put the rows of the last batch into their place, once more if they are there."""
        descriptor = os.open(self.output, _READ_WRITE, 0o666)
        try:
            os.lseek(descriptor, self._facts["start"], os.SEEK_SET)
            rest = memoryview(self._rows)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._written = True

    def _update(self, facts: dict[str, Any], rows: bytes) -> None:
        self._database.execute("UPDATE now SET facts = ?, rows = ?", (json.dumps(facts), rows))

    def _save(self, facts: dict[str, Any], rows: bytes) -> None:
        """In a transaction of its own."""
        self._update(facts, rows)
        self._facts, self._rows = facts, rows

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # a full disk has rolled back already
                self._database.execute("ROLLBACK")
            raise

    def _size(self) -> int:
        return self.output.stat().st_size if self.output.exists() else 0

    def _refuse(self, size: int) -> None:
        raise FeatdiffError(
            f"{self.output} has {size:,} bytes, and {self._end:,} were written: somebody else has changed it; move it "
            "away, and new rows begin a new file"
        )

    # ---- end ----

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """All rows are in the output, which can be moved away from here on."""
        with contextlib.suppress(sqlite3.Error, OSError, FeatdiffError):  # or else the next process does it
            self._read()  # Ctrl-C may have come between a transaction and what is known of it here
            if not self._written:
                self._recover()
            self._save({**self._facts, "start": self._end}, b"")
        self._database.close()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Errors of the system and of SQLite as one line that names the file."""
        try:
            yield
        except OSError as error:
            raise FeatdiffError(f"{self.output} cannot be written: {error.strerror or error}") from error
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise UsageError(f"another process is writing {self.output}: wait for it, or choose another") from None
            raise FeatdiffError(f"{self.file} cannot be written: {error}") from error
        except (sqlite3.DatabaseError, ValueError, TypeError, KeyError) as error:
            if isinstance(error, FeatdiffError):
                raise
            raise UsageError(
                f"{self.file} is damaged or no state of a watch ({error}): begin with another output"
            ) from None


def _no_test(rows: int) -> dict[str, Any]:
    """Facts of a test of drift that begins after so many rows."""
    return {"drift": None, "told": [], "since": rows}


def _shown(value: object) -> str:
    """Enough of a value to tell it from another."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:12]}..."

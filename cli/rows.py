"""The rows of a long run: to standard output, or to a file that has another name until it is whole."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, Self

from .choice import Choice
from .output import is_stream

if TYPE_CHECKING:
    from featdiff import Scores


class Rows(Protocol):
    """Takes the parts of a run in order.

    ``resumable``: another run can go on from what is written.
    """

    @property
    def resumable(self) -> bool: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...

    def resumed(self, total: int, names: Callable[[int], Iterable[str]]) -> dict[str, int]:
        """The counts of an interrupted run, empty without one.

        ``names`` gives the names of the first so many of all ``total`` rows: its rows must be those.
        """

    def before(self) -> Iterator[dict[str, Any]] | None:
        """Those rows; ``ood_score``, ``p_value`` and ``is_ood`` are numbers or None, others as they were written.

        None if they are there, but in a table, whose numbers are rounded.
        """

    def write(self, part: Scores, counts: Mapping[str, int]) -> None:
        """Append a part; ``counts`` include it."""

    def finish(self) -> None:
        """All rows are written."""

    def kept(self, count: int) -> str:
        """What is kept of ``count`` rows if the run ends now, and how to go on."""


# Rows that must be sorted for a stream lie in memory up to so many bytes, then in a temporary file.
_IN_MEMORY = 64 << 20


def open_rows(
    output: Path | None,
    format_: str,
    raw_csv: bool,
    made_with: Mapping[str, Any],
    columns: Sequence[str],
    resume: bool,
    choice: Choice,
) -> Rows:
    """Where rows go; ``made_with`` is what decides them, by a name for people."""
    if output is None or is_stream(output):
        return StreamRows(output, format_, raw_csv, columns, choice)
    return FileRows(output, format_, raw_csv, made_with, columns, resume, choice)


class StreamRows:
    """Rows on standard output, a device or a pipe; those in order of strangeness when all are there."""

    resumable = False

    def __init__(
        self, output: Path | None, format_: str, raw_csv: bool, columns: Sequence[str], choice: Choice
    ) -> None:
        from featdiff.report.writers import open_writer

        self._name = str(output or "standard output")
        self._stream = output.open("wb") if output else sys.stdout.buffer
        self._ours = output is not None
        self._writer = open_writer(format_, self._stream, raw_csv=raw_csv)

        self._choice = choice
        self._columns = choice.columns(columns)
        self._waiting = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115
        self._lines = open_writer("jsonl", self._waiting)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # what cannot be written was an error before
            self._waiting.close()
        if self._ours:
            with contextlib.suppress(OSError):
                self._stream.close()

    def resumed(self, total: int, names: Callable[[int], Iterable[str]]) -> dict[str, int]:
        return {}

    def before(self) -> Iterator[dict[str, Any]] | None:
        return iter(())

    def write(self, part: Scores, counts: Mapping[str, int]) -> None:
        if self._choice.waits_for_all:
            self._keep(part)
            return
        with self._named_errors():
            self._writer.write(self._choice.of_part(part))

    def finish(self) -> None:
        with self._named_errors():
            if self._choice.waits_for_all:
                self._waiting.seek(0)
                self._writer.write_rows(self._choice.of_lines(self._waiting), self._columns)
            self._writer.close()
            self._stream.flush()

    def _keep(self, part: Scores) -> None:
        try:
            self._lines.write(part)
        except OSError as error:
            raise OSError(error.errno, error.strerror, tempfile.gettempdir()) from None

    def kept(self, count: int) -> str:
        if self._choice.waits_for_all:
            return f"no rows are written: {self._choice} needs all of them first"
        if self._choice.only_ood:
            return f"the flagged ones of {count:,} rows are written"
        return f"{count:,} rows are written"

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # the reader has seen enough
            raise
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._name) from None


class FileRows:
    """Rows in a file that takes its place when it is whole.

    A Parquet file cannot be read before its end is written, so its rows are JSON lines until then. So are all rows of
    which some are chosen or sorted in the end.
    """

    def __init__(
        self,
        output: Path,
        format_: str,
        raw_csv: bool,
        made_with: Mapping[str, Any],
        columns: Sequence[str],
        resume: bool,
        choice: Choice,
    ) -> None:
        from featdiff.files.partial import PartialFile
        from featdiff.report.writers import open_writer

        open_writer(format_, io.BytesIO())  # can it be written here? Better asked before the long work
        self._converted = format_ == "parquet" or not choice.everything
        self._final = format_
        self._format = "jsonl" if self._converted else format_
        self._raw_csv = raw_csv
        self._columns = choice.columns(columns)
        self._choice = choice
        decisive = {
            "format": format_,
            "raw CSV": raw_csv,
            "columns": list(columns),
            "choice of rows": str(choice),
            **made_with,
        }

        self._parts = PartialFile(output, decisive, resume)
        self._part = io.BytesIO()
        self._writer = open_writer(self._format, self._part, raw_csv=raw_csv, header=not self._parts.facts)
        self._names = hashlib.sha256()

    @property
    def resumable(self) -> bool:
        return bool(self._parts.facts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._parts.__exit__()

    def resumed(self, total: int, names: Callable[[int], Iterable[str]]) -> dict[str, int]:
        from featdiff.exceptions import UsageError

        if not self._parts.facts:
            return {}
        counts: dict[str, int] = dict(self._parts.facts["counts"])
        self._add(names(min(counts["rows"], total)))
        if counts["rows"] > total or self._names.hexdigest() != self._parts.facts["names"]:
            raise UsageError(
                f"{self._parts.partial} holds {counts['rows']:,} rows, and they are not the first of what is to be "
                "scored now: name the same files in the same order, or delete it and its .json to begin again"
            )
        return counts

    def before(self) -> Iterator[dict[str, Any]] | None:
        if not self._parts.facts:
            return iter(())
        return None if self._format == "table" else self._rows_in_parts()

    def _rows_in_parts(self) -> Iterator[dict[str, Any]]:
        with self._parts.open() as stream:
            yield from _rows_in(stream, self._format, self._raw_csv)

    def write(self, part: Scores, counts: Mapping[str, int]) -> None:
        self._writer.write(part)
        self._add(part.path)
        self._parts.append(self._part.getvalue(), {"counts": dict(counts), "names": self._names.hexdigest()})
        self._part.seek(0)
        self._part.truncate()

    def finish(self) -> None:
        self._parts.finish(self._convert if self._converted else None)

    def kept(self, count: int) -> str:
        if not self.resumable:
            return "no rows were written yet"
        if not self._parts.partial.exists():  # the signal came in the last moment
            return f"all {count:,} rows are written"
        rows = self._parts.facts["counts"]["rows"]
        return f"{rows:,} rows are kept in {self._parts.partial}: the same command with --resume goes on from there"

    def _add(self, names: Iterable[str]) -> None:
        """Add names to the digest of all names so far."""
        for name in names:
            self._names.update(name.encode("utf-8", "surrogatepass") + b"\0")

    def _convert(self, source: IO[bytes], target: IO[bytes]) -> None:
        from featdiff.report.writers import open_writer

        writer = open_writer(self._final, target, raw_csv=self._raw_csv)
        writer.write_rows(self._choice.of_lines(source), self._columns)
        writer.close()


def _rows_in(stream: IO[bytes], format_: str, raw_csv: bool) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines or CSV."""
    if format_ == "jsonl":
        for line in stream:
            yield json.loads(line)
        return

    from featdiff.report.writers import read_csv

    for row in read_csv(stream, raw_csv=raw_csv):
        for name in ("ood_score", "p_value"):
            row[name] = None if row[name] == "" else float(row[name])
        row["is_ood"] = {"true": True, "false": False}.get(row["is_ood"])
        yield row

"""The rows of a long run: to standard output, or to a file that has another name until it is whole."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, Self

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

    def scores(self) -> list[float]:
        """``ood_score`` of those rows."""

    def write(self, part: Scores, counts: Mapping[str, int]) -> None:
        """Append a part; ``counts`` include it."""

    def finish(self) -> None:
        """All rows are written."""

    def kept(self, count: int) -> str:
        """What is kept of ``count`` rows if the run ends now, and how to go on."""


def open_rows(
    output: Path | None, format_: str, raw_csv: bool, made_with: Mapping[str, Any], columns: Sequence[str], resume: bool
) -> Rows:
    """Where rows go; ``made_with`` is what decides them, by a name for people."""
    if output is None or is_stream(output):
        return StreamRows(output, format_, raw_csv)
    return FileRows(output, format_, raw_csv, made_with, columns, resume)


class StreamRows:
    """Rows on standard output, a device or a pipe."""

    resumable = False

    def __init__(self, output: Path | None, format_: str, raw_csv: bool) -> None:
        from featdiff.report.writers import open_writer

        self._name = str(output or "standard output")
        self._stream = output.open("wb") if output else sys.stdout.buffer
        self._ours = output is not None
        self._writer = open_writer(format_, self._stream, raw_csv=raw_csv)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            with contextlib.suppress(OSError):  # what cannot be written was an error before
                self._stream.close()

    def resumed(self, total: int, names: Callable[[int], Iterable[str]]) -> dict[str, int]:
        return {}

    def scores(self) -> list[float]:
        return []

    def write(self, part: Scores, counts: Mapping[str, int]) -> None:
        with self._named_errors():
            self._writer.write(part)

    def finish(self) -> None:
        with self._named_errors():
            self._writer.close()
            self._stream.flush()

    def kept(self, count: int) -> str:
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

    A Parquet file cannot be read before its end is written, so its rows are JSON lines until then.
    """

    def __init__(
        self,
        output: Path,
        format_: str,
        raw_csv: bool,
        made_with: Mapping[str, Any],
        columns: Sequence[str],
        resume: bool,
    ) -> None:
        from featdiff.files.partial import PartialFile
        from featdiff.report.writers import open_writer

        self._parquet = format_ == "parquet"
        if self._parquet:
            open_writer("parquet", io.BytesIO())  # can it be written here? Better asked before the long work
        self._format = "jsonl" if self._parquet else format_
        self._columns = columns
        decisive = {"format": format_, "raw CSV": raw_csv, "columns": list(columns), **made_with}

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

    def scores(self) -> list[float]:
        if not self._parts.facts:
            return []
        with self._parts.open() as stream:
            return [float("nan" if score in (None, "") else score) for score in _scores_in(stream, self._format)]

    def write(self, part: Scores, counts: Mapping[str, int]) -> None:
        self._writer.write(part)
        self._add(part.path)
        self._parts.append(self._part.getvalue(), {"counts": dict(counts), "names": self._names.hexdigest()})
        self._part.seek(0)
        self._part.truncate()

    def finish(self) -> None:
        self._parts.finish(self._to_parquet if self._parquet else None)

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

    def _to_parquet(self, source: IO[bytes], target: IO[bytes]) -> None:
        from featdiff.report.writers import ParquetWriter

        writer = ParquetWriter(target)
        writer.write_rows(map(json.loads, source), self._columns)
        writer.close()


def _scores_in(stream: IO[bytes], format_: str) -> Iterator[Any]:
    """The values of ``ood_score`` in a file of rows."""
    if format_ == "jsonl":
        for line in stream:
            yield json.loads(line)["ood_score"]
    else:
        for row in csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8", newline="")):
            yield row["ood_score"]

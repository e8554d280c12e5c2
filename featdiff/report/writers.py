"""Scores -> CSV, JSON lines, Parquet or a table, written as they come."""

from __future__ import annotations

import csv
import io
import json
from typing import IO, Any, Protocol

from ..exceptions import UsageError
from ..verdicts.results import COLUMNS, OK, Scores

FORMATS = ("table", "csv", "jsonl", "parquet")


class Writer(Protocol):
    """Writes the parts of a run in order; lines of text are on disk or on screen when :meth:`write` returns."""

    def write(self, scores: Scores) -> None:
        """Append the rows of one part."""

    def close(self) -> None:
        """Finish the file; also after an interrupted run."""


def open_writer(format: str, stream: IO[bytes]) -> Writer:
    """A writer of a format onto a binary stream.

    Parameters
    ----------
    format : {"table", "csv", "jsonl", "parquet"}
    stream : binary stream
        Not closed by the writer.

    Returns
    -------
    Writer

    Raises
    ------
    UsageError
        An unknown format, or Parquet without pyarrow.

    Examples
    --------
    >>> import io
    >>> import numpy as np
    >>> from featdiff import Scores
    >>> from featdiff.report.writers import open_writer
    >>> scores = Scores(["a.png"], ["ok"], [""], np.array([0.5]), np.array([0.3]), np.array([False]), {})
    >>> stream = io.BytesIO()
    >>> writer = open_writer("csv", stream)
    >>> writer.write(scores)
    >>> writer.close()
    >>> stream.getvalue().decode().splitlines()
    ['path,status,reason,ood_score,p_value,is_ood', 'a.png,ok,,0.5,0.3,false']
    """
    kinds: dict[str, type[Any]] = {
        "table": TableWriter,
        "csv": CsvWriter,
        "jsonl": JsonlWriter,
        "parquet": ParquetWriter,
    }
    if format not in kinds:
        raise UsageError(f"unknown format {format!r}; known: {', '.join(FORMATS)}", argument="format")

    writer: Writer = kinds[format](stream)
    return writer


class CsvWriter:
    """Comma-separated values with a header; cells that an unreadable image lacks are empty."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._started = False

    def write(self, scores: Scores) -> None:
        if not self._started:
            self._line(scores.columns)
            self._started = True

        for row in scores.rows():
            self._line([str(cell).lower() if isinstance(cell, bool) else cell for cell in row.values()])
        self._stream.flush()

    def _line(self, cells: list[Any]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\r\n").writerow(cells)  # so that a lone \r in a path is quoted, too
        self._stream.write(text.getvalue().removesuffix("\r\n").encode() + b"\n")

    def close(self) -> None:
        self._stream.flush()


class JsonlWriter:
    """One JSON object per line; values that an unreadable image lacks are null."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def write(self, scores: Scores) -> None:
        for row in scores.rows():
            self._stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.flush()


class ParquetWriter:
    """Apache Parquet (needs pyarrow). Unlike the others it keeps up to 10,000 rows in memory until :meth:`close`."""

    def __init__(self, stream: IO[bytes]) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UsageError("Parquet needs pyarrow: pip install 'featdiff[parquet]'") from None

        self._arrow = pyarrow
        self._parquet = pyarrow.parquet
        self._stream = stream
        self._writer: Any = None
        self._rows: list[dict[str, object]] = []
        self._columns: list[str] = list(COLUMNS)
        self._texts: list[str] = []

    def write(self, scores: Scores) -> None:
        self._columns = scores.columns
        self._texts = list(scores.extra)
        self._rows += scores.rows()
        if len(self._rows) >= 10_000:
            self._write_group()

    def _write_group(self) -> None:
        arrow = self._arrow
        kinds = {name: arrow.string() for name in ("path", "status", "reason", *self._texts)}
        kinds["is_ood"] = arrow.bool_()
        schema = arrow.schema([(name, kinds.get(name, arrow.float64())) for name in self._columns])

        if self._writer is None:
            self._writer = self._parquet.ParquetWriter(self._stream, schema)
        self._writer.write_table(arrow.Table.from_pylist(self._rows, schema=schema))
        self._rows.clear()

    def close(self) -> None:
        if self._rows or self._writer is None:
            self._write_group()  # without rows, still a file that can be read
        self._writer.close()


class TableWriter:
    """Lines for people: verdict, p-value, score, path; the reason for unreadable images."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._started = False

    def write(self, scores: Scores) -> None:
        if not self._started:
            self._stream.write(b"verdict      p-value    score  path\n")
            self._started = True

        for row in scores.rows():
            if row["status"] == OK:
                verdict = "OOD" if row["is_ood"] else "-"
                line = f"{verdict:<10} {row['p_value']:>9.4f} {row['ood_score']:>8.2f}  {row['path']}"
            else:
                line = f"{row['status']:<10} {'':>9} {'':>8}  {row['path']}  ({row['reason']})"
            further = [f"{name.replace('_', ' ')} {row[name]}" for name in scores.extra if row[name]]
            if further:
                line += f"  ({', '.join(further)})"

            # a line break or a control character in a path must not break the table
            line = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in line)
            self._stream.write(line.encode() + b"\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.flush()

"""Scores -> CSV, JSON lines, Parquet or a table, written as they come."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, Protocol

from ..exceptions import UsageError
from ..files.text import columns_on_screen, for_json, for_spreadsheet, for_terminal, from_spreadsheet
from ..verdicts.results import COLUMNS, FDR_FLAG, OK, Scores

FORMATS = ("table", "csv", "jsonl", "parquet")
# Column in which paths begin in a table.
_PATH_AT = 31
# Rows of a group of a Parquet file, which are held in memory.
_GROUP = 10_000


class Writer(Protocol):
    """Writes the parts of a run in order; lines of text are on disk or on screen when :meth:`write` returns."""

    def write(self, scores: Scores) -> None:
        """Append the rows of one part."""

    def write_rows(
        self, rows: Iterable[Mapping[str, object]], columns: Sequence[str], texts: Sequence[str] = ()
    ) -> None:
        """Append rows as :meth:`featdiff.Scores.rows` gives them; of ``columns``, ``texts`` are extra ones of text."""

    def close(self) -> None:
        """Finish the file; also after an interrupted run."""


def open_writer(
    format: str, stream: IO[bytes], *, raw_csv: bool = False, header: bool = True, width: int | None = None
) -> Writer:
    """A writer of a format onto a binary stream.

    Parameters
    ----------
    format : {"table", "csv", "jsonl", "parquet"}
    stream : binary stream
        Not closed by the writer.
    raw_csv : bool, default False
        Write text into CSV as it is. By default, cells that a spreadsheet would take for formulas, and those with
        control characters, are changed by :func:`featdiff.files.text.for_spreadsheet`.
    header : bool, default True
        Begin with the line of column names; False where rows are appended. Formats without such a line ignore it.
    width : int, optional
        Columns of a terminal: in a table, notes on an image that do not fit stand on a line of their own. Default: all
        on one line.

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
    if format == "csv":
        return CsvWriter(stream, raw_csv, header)
    if format == "table":
        return TableWriter(stream, header, width)
    if format == "jsonl":
        return JsonlWriter(stream)
    if format == "parquet":
        return ParquetWriter(stream)
    raise UsageError(f"unknown format {format!r}; known: {', '.join(FORMATS)}", argument="format")


class _RowWriter:
    """Writes the parts of a run by their rows."""

    def write(self, scores: Scores) -> None:
        self.write_rows(scores.rows(), scores.columns, tuple(scores.extra))

    def write_rows(
        self, rows: Iterable[Mapping[str, object]], columns: Sequence[str], texts: Sequence[str] = ()
    ) -> None:
        raise NotImplementedError


class CsvWriter(_RowWriter):
    """Comma-separated values with a header; cells that an unreadable image lacks are empty."""

    def __init__(self, stream: IO[bytes], raw: bool = False, header: bool = True) -> None:
        self._stream = stream
        self._raw = raw
        self._header = header

    def write_rows(
        self, rows: Iterable[Mapping[str, object]], columns: Sequence[str], texts: Sequence[str] = ()
    ) -> None:
        if self._header:
            self._line(columns)
            self._header = False

        for row in rows:
            self._line(list(row.values()))
        self._stream.flush()

    def _line(self, cells: Sequence[object]) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\r\n")  # so that a lone \r in a path is quoted, too
        writer.writerow([self._cell(cell) for cell in cells])
        self._stream.write(text.getvalue().removesuffix("\r\n").encode("utf-8", "surrogatepass") + b"\n")

    def _cell(self, cell: object) -> object:
        if isinstance(cell, bool):
            return str(cell).lower()
        if isinstance(cell, str) and not self._raw:
            return for_spreadsheet(cell)
        return cell

    def close(self) -> None:
        self._stream.flush()


def read_csv(stream: IO[bytes], *, raw_csv: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of a CSV file that :class:`CsvWriter` has written.

    Cells are text, but for numbers below zero, so that the same cells can be written again.

    Parameters
    ----------
    stream : binary stream
    raw_csv : bool, default False
        Whether it was written so.

    Raises
    ------
    ValueError, csv.Error
        It is no such file.
    """
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogatepass", newline="")
    for row in csv.DictReader(text, strict=True):
        if None in row or None in row.values():
            raise ValueError("a row with more or fewer cells than the first line")
        yield {name: _plain_cell(cell, raw_csv) for name, cell in row.items()}


def _plain_cell(cell: str, raw: bool) -> str | float:
    if cell.startswith("-"):  # text that begins so has an apostrophe, unless it is raw
        with contextlib.suppress(ValueError):
            return float(cell)
    return cell if raw else from_spreadsheet(cell)


class JsonlWriter(_RowWriter):
    """One JSON object per line; values that an unreadable image lacks are null."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def write_rows(
        self, rows: Iterable[Mapping[str, object]], columns: Sequence[str], texts: Sequence[str] = ()
    ) -> None:
        for row in rows:
            self._stream.write(for_json(json.dumps(row, ensure_ascii=False)).encode() + b"\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.flush()


class ParquetWriter(_RowWriter):
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
        self._rows: list[Mapping[str, object]] = []
        self._columns: Sequence[str] = COLUMNS
        self._texts: Sequence[str] = ()

    def write_rows(
        self, rows: Iterable[Mapping[str, object]], columns: Sequence[str], texts: Sequence[str] = ()
    ) -> None:
        self._columns = columns
        self._texts = texts
        for row in rows:
            self._rows.append(row)
            if len(self._rows) >= _GROUP:
                self._write_group()

    def _write_group(self) -> None:
        arrow = self._arrow
        kinds = {name: arrow.string() for name in ("path", "status", "reason", *self._texts)}
        kinds |= {name: arrow.bool_() for name in self._columns if name.startswith("is_ood") or name == FDR_FLAG}
        schema = arrow.schema([(name, kinds.get(name, arrow.float64())) for name in self._columns])

        if self._writer is None:
            self._writer = self._parquet.ParquetWriter(self._stream, schema)
        self._writer.write_table(arrow.Table.from_pylist(self._rows, schema=schema))
        self._rows.clear()

    def close(self) -> None:
        if self._rows or self._writer is None:
            self._write_group()  # without rows, still a file that can be read
        self._writer.close()


class TableWriter(_RowWriter):
    """Lines for people: verdict, p-value, score, path; the reason for unreadable images."""

    def __init__(self, stream: IO[bytes], header: bool = True, width: int | None = None) -> None:
        self._stream = stream
        self._header = header
        self._width = width

    def write_rows(
        self, rows: Iterable[Mapping[str, object]], columns: Sequence[str], texts: Sequence[str] = ()
    ) -> None:
        if self._header:
            self._stream.write(b"verdict      p-value    score  path\n")
            self._header = False

        for row in rows:
            if row["status"] == OK:
                verdict = "OOD" if row["is_ood"] else "-"
                line = f"{verdict:<10} {row['p_value']:>9.4f} {row['ood_score']:>8.2f}  {row['path']}"
            else:
                line = f"{row['status']:<10} {'':>9} {'':>8}  {row['path']}  ({row['reason']})"
            further = [f"{name.replace('_', ' ')} {row[name]}" for name in texts if row[name]]
            further += ["fdr"] if row.get(FDR_FLAG) else []
            self._line(line, f"({', '.join(further)})" if further else "")
        self._stream.flush()

    def _line(self, line: str, note: str) -> None:
        """A row and what there is to say about it, below it where the terminal is too narrow."""
        line = for_terminal(line)
        note = for_terminal(note)
        if note and (self._width is None or columns_on_screen(f"{line}  {note}") <= self._width):
            line += f"  {note}"
        elif note:
            line += f"\n{' ' * _PATH_AT}{note}"
        self._stream.write(line.encode() + b"\n")

    def close(self) -> None:
        self._stream.flush()

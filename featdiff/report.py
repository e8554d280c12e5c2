"""Scores -> CSV, JSON lines, Parquet or a table, written as they come; and a picture of histograms."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from .exceptions import UsageError
from .scores import COLUMNS, OK, Scores

FORMATS = ("table", "csv", "jsonl", "parquet")


class Writer(Protocol):
    """Takes parts of a run in order; rows of text are on disk or on screen when :meth:`write` returns."""

    def write(self, scores: Scores) -> None:
        """Append the rows of one part."""

    def close(self) -> None:
        """Finish the file; also after an interrupted run."""


def open_writer(format: str, stream: IO[bytes]) -> Writer:
    """A writer of one of ``FORMATS`` onto a binary stream.

    Raises
    ------
    UsageError
        An unknown format, or Parquet without pyarrow.
    """
    kinds: dict[str, type[Any]] = {
        "table": TableWriter,
        "csv": CsvWriter,
        "jsonl": JsonlWriter,
        "parquet": ParquetWriter,
    }
    if format not in kinds:
        raise UsageError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    writer: Writer = kinds[format](stream)
    return writer


class CsvWriter:
    """Comma-separated values with a header; empty cells for what an unreadable image lacks."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._started = stream, False

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
    """One JSON object per line; null for what an unreadable image lacks."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def write(self, scores: Scores) -> None:
        for row in scores.rows():
            self._stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.flush()


class ParquetWriter:
    """Apache Parquet (needs pyarrow). Unlike the others it holds back up to 10,000 rows until :meth:`close`."""

    def __init__(self, stream: IO[bytes]) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UsageError("Parquet needs pyarrow: pip install 'featdiff[parquet]'") from None
        self._arrow, self._parquet = pyarrow, pyarrow.parquet
        self._stream = stream
        self._writer: Any = None
        self._rows: list[dict[str, object]] = []
        self._columns: list[str] = list(COLUMNS)

    def write(self, scores: Scores) -> None:
        self._columns = scores.columns
        self._rows += scores.rows()
        if len(self._rows) >= 10_000:
            self._write_group()

    def _write_group(self) -> None:
        arrow = self._arrow
        kinds = {
            "path": arrow.string(),
            "status": arrow.string(),
            "reason": arrow.string(),
            "is_ood": arrow.bool_(),
        }
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
        self._stream, self._started = stream, False

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
            line = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in line)
            self._stream.write(line.encode() + b"\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.flush()


def save_histograms(
    file: str | Path, scores: Mapping[str, np.ndarray], threshold: float, fpr: float, title: str = ""
) -> None:
    """A picture of one histogram of ``ood_score`` per set, with the threshold; the first set is the in-domain one.

    Parameters
    ----------
    file : path ending in .png, .svg or .pdf
    scores : {set name: (N,) scores}; sets without a score are left out

    Raises
    ------
    UsageError
        No set has a score.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sets = {name: values[np.isfinite(values)] for name, values in scores.items()}
    sets = {name: values for name, values in sets.items() if len(values)}
    if not sets:
        raise UsageError("there are no scores to draw")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    edges = np.histogram_bin_edges(np.concatenate(list(sets.values())), bins=60)
    for name, values in sets.items():
        share = np.full(len(values), 100 / len(values))
        label = f"{name} ({len(values):,})"
        # matplotlib leaves out labels that begin with an underscore
        axes.hist(values, list(edges), weights=share, alpha=0.55, label=f"\u200b{label}" if label[0] == "_" else label)
    axes.axvline(threshold, color="black", linestyle="--", linewidth=1, label=f"threshold at fpr {fpr:g}")
    axes.set(xlabel="ood_score (higher = more out-of-distribution)", ylabel="share of the set (%)", title=title)
    for text in (*axes.legend().get_texts(), axes.title):
        text.set_parse_math(False)  # a dollar sign in a name is a dollar sign
    figure.savefig(file, dpi=150)


def save_inpaintings(
    file: str | os.PathLike[str], x: np.ndarray, masked: np.ndarray, inpainted: np.ndarray, scores: np.ndarray
) -> None:
    """A picture with one line for each image: original, masked, inpainted, and what differs (black = nothing).

    Parameters
    ----------
    file : path ending in .png, .svg or .pdf
    x, masked, inpainted : (N, C, H, W) in [-1, 1]
    scores : (N,)
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = {
        "original": (x + 1) / 2,
        "masked": (masked + 1) / 2,
        "inpainted": (inpainted + 1) / 2,
        "difference": np.abs(inpainted - x) / 2,
    }
    figure = Figure(figsize=(1.6 * len(columns) + 0.8, 1.6 * len(x) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(x), len(columns), squeeze=False)
    for j, (name, images) in enumerate(columns.items()):
        grid[0][j].set_title(name)
        for i, image in enumerate(images):
            shown = np.moveaxis(np.clip(image, 0, 1), 0, -1)
            grid[i][j].imshow(np.repeat(shown, 3, axis=-1) if shown.shape[-1] == 1 else shown)
            grid[i][j].set(xticks=[], yticks=[])
    for i, score in enumerate(scores):
        grid[i][0].set_ylabel(f"ood_score {score:.1f}")
    figure.savefig(file, dpi=120)


def save_projection(
    file: str | os.PathLike[str], points: Mapping[str, np.ndarray], share: float, title: str = ""
) -> None:
    """A picture of sets of points in a plane; the first set is the in-domain one, in grey.

    Parameters
    ----------
    file : path ending in .png, .svg or .pdf
    points : {set name: (N, 2)}
    share : float
        Of the in-domain variance that the plane shows, in [0, 1].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, (name, (x, y)) in enumerate((name, values.T) for name, values in points.items()):
        colour = "lightgrey" if i == 0 else f"C{i - 1}"
        axes.scatter(x, y, s=8, color=colour, alpha=0.7, linewidths=0, label=f"{name} ({len(x):,})")
    axes.set(xlabel="first component", ylabel=f"second component (both: {share:.0%} of the variance)", title=title)
    axes.legend()
    figure.savefig(file, dpi=150)

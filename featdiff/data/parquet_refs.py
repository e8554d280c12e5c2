"""Images in rows of Parquet files, here or at a URL, as Hugging Face stores them (``image: {bytes, path}``) or as plain
bytes. Rows are read in order, some at a time; of the other columns only one with names is read.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, ClassVar

import numpy as np

from ..exceptions import UnreadableImage, UsageError, one_line
from ..files.remote import open_input, version_of
from .datasets import PICTURE_KEYS
from .image_refs import ImageRef, MissingRef, printable
from .limits import MAX_BYTES, check_bytes

PARQUET_SUFFIXES = (".parquet", ".pq")
# Columns that may hold pictures and names, the first that is there; else any one column of bytes.
_PICTURES = (*PICTURE_KEYS, "jpg", "jpeg", "png", "webp", "content", "bytes", "data")
_NAMES = ("path", "file_name", "filename", "name", "key", "__key__", "id", "image_id")
_ROW = re.compile(r"(?P<file>.*?\.(?:parquet|pq))(?:/(?P<name>.*))?#row=(?P<row>\d+)", re.IGNORECASE | re.DOTALL)
# Rows that are held at a time.
_AT_ONCE = 16
_READING = threading.Lock()


@dataclass(frozen=True)
class ParquetRef(ImageRef):
    """The image in a row of a Parquet file; rows are counted from 0."""

    archive: str
    row: int
    sequential: ClassVar[bool] = True

    def read(self) -> bytes:
        return self.read_within(MAX_BYTES)

    def read_within(self, max_bytes: int) -> bytes:
        with _READING:
            content = _open_rows(self.archive, *version_of(self.archive)).at(self.row)
        check_bytes(len(content), max_bytes)
        return content


def is_parquet(path: str) -> bool:
    """Whether a path or a URL is that of a Parquet file by its name."""
    return path.partition("?")[0].lower().endswith(PARQUET_SUFFIXES)


def holds_images(path: str) -> bool:
    """Whether a Parquet file of a folder has a column of images for certain, which plain bytes are by their name only.

    True as well for a file that cannot be read: :func:`parquet_refs` says why. Raises ``UsageError`` without PyArrow.
    """
    try:
        rows = _open_rows(path, *version_of(path))
    except UnreadableImage:  # no column that may hold any
        return False
    except UsageError:
        raise
    except Exception:
        return True
    return rows.picture in _PICTURES or rows.table.schema_arrow.field(rows.picture).type.num_fields > 0


def parquet_ref(name: str) -> ParquetRef | None:
    """The row that a name means (``a.parquet/cat.jpg#row=3``); None if it means none."""
    match = _ROW.fullmatch(name)
    return ParquetRef(printable(name), match["file"], int(match["row"])) if match else None


def parquet_refs(path: str) -> Iterator[ImageRef]:
    """A reference to each row of a Parquet file.

    Parameters
    ----------
    path : str
        A file or a URL.

    Yields
    ------
    ImageRef
        Named ``a.parquet/cat.jpg#row=3`` where the row has a name, else ``a.parquet#row=3``. A file that cannot be
        read, or has no column of images, is one reference with a reason.

    Raises
    ------
    UsageError
        PyArrow is not installed.
    """
    label = printable(path)
    row = 0
    try:
        rows = _open_rows(path, *version_of(path))
        for name in rows.names():
            behind = f"/{printable(name)}" if name else ""
            yield ParquetRef(f"{label}{behind}#row={row}", path, row)
            row += 1
    except UsageError:
        raise
    except Exception as error:  # damaged files raise many kinds
        yield MissingRef(label, f"Parquet file cannot be read: {_reason(error)}")
        return
    if not row:
        yield MissingRef(label, "no rows in this file")


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)


def open_parquet(stream: BinaryIO, **options: Any) -> Any:
    """A ``pyarrow.parquet.ParquetFile`` that reads a stream of Python without threads of Arrow.

    A thread that frees Python's bytes while Python ends aborts the process (apache/arrow#34314).
    """
    return _without_threads()(stream, pre_buffer=False, **options)


@functools.cache
def _without_threads() -> Any:
    from pyarrow.parquet import ParquetFile

    names = ("read", "read_row_group", "iter_batches")
    methods = {name: functools.partialmethod(getattr(ParquetFile, name), use_threads=False) for name in names}
    return type("ParquetFile", (ParquetFile,), methods)


@functools.lru_cache(maxsize=4)
def _open_rows(file: str, *version: int) -> _Rows:
    stream = open_input(file)
    try:
        table = open_parquet(stream, buffer_size=1 << 20)
    except ImportError:
        raise UsageError(f"{file}: reading Parquet needs PyArrow: pip install 'featdiff[parquet]'") from None

    groups = [table.metadata.row_group(i).num_rows for i in range(table.metadata.num_row_groups)]
    picture, name = _columns(table.schema_arrow)
    return _Rows(table, picture, name, np.cumsum([0, *groups]))


@dataclass
class _Rows:
    """An open Parquet file, and the rows that were read last.

    ``picture`` and ``name``: columns, the latter empty if there is none; ``starts``: of row groups, and the end.
    """

    table: Any
    picture: str
    name: str
    starts: np.ndarray
    _batches: Iterator[Any] = field(default_factory=lambda: iter(()))
    _held: list[Any] = field(default_factory=list)
    _first: int = 0
    _damage: dict[int, tuple[int, str]] = field(default_factory=dict)  # row group -> first row that is lost, and why

    def names(self) -> Iterator[str]:
        """The name of each row, empty where it has none."""
        if not self.name:
            yield from ("" for _ in range(int(self.starts[-1])))
            return
        for batch in self.table.iter_batches(columns=[self.name]):
            for value in batch.column(0).to_pylist():
                found = value.get("path") if isinstance(value, dict) else value
                yield "" if found is None else str(found)

    def at(self, row: int) -> bytes:
        """The bytes in a row; going on is cheap, going back begins the row group anew."""
        if not self._first <= row < self._first + len(self._held):
            group = int(np.searchsorted(self.starts, row, side="right")) - 1
            if row >= self.starts[-1]:
                raise UnreadableImage(f"the file has {int(self.starts[-1]):,} rows")
            lost, reason = self._damage.get(group, (row + 1, ""))
            if row >= lost:  # what stands before would be read again for each row
                raise UnreadableImage(reason)
            if not self.starts[group] <= self._first <= row or not self._held:
                self._begin(group)
            while row >= self._first + len(self._held):
                self._next(group)
        return _bytes_of(self._held[row - self._first])

    def _begin(self, group: int) -> None:
        self._batches = self.table.iter_batches(_AT_ONCE, row_groups=[group], columns=[self.picture])
        self._first = int(self.starts[group])
        self._held = []

    def _next(self, group: int) -> None:
        self._first += len(self._held)
        self._held = []
        try:
            self._held = next(self._batches).column(0).to_pylist()
        except StopIteration:
            raise UnreadableImage("the file ends before this row") from None
        except Exception as error:
            self._damage[group] = self._first, f"Parquet file cannot be read from here on: {_reason(error)}"
            raise UnreadableImage(self._damage[group][1]) from None


def _bytes_of(value: Any) -> bytes:
    content = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(content, bytes):
        return content
    path = value.get("path") if isinstance(value, dict) else None
    raise UnreadableImage(f"no bytes in this row, only the path {printable(path)}" if path else "an empty row")


def _columns(schema: Any) -> tuple[str, str]:
    """The column of pictures, and that of their names, which may be empty (``UnreadableImage`` without pictures)."""
    import pyarrow.types as types

    def is_encoded(kind: Any) -> bool:
        return types.is_struct(kind) and kind.get_field_index("bytes") >= 0

    def is_bytes(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    kinds = {column.name: column.type for column in schema}
    wanted = [*(name for name in _PICTURES if name in kinds), *kinds]
    pictures = [name for name in wanted if is_encoded(kinds[name])] or [
        name for name in wanted if is_bytes(kinds[name])
    ]
    if not pictures:
        raise UnreadableImage("it has no column of images (bytes, or a struct of bytes and path)")

    picture = pictures[0]
    if is_encoded(kinds[picture]) and kinds[picture].get_field_index("path") >= 0:
        return picture, f"{picture}.path"
    texts = [
        name for name in _NAMES if name in kinds and (types.is_string(kinds[name]) or types.is_integer(kinds[name]))
    ]
    return picture, texts[0] if texts else ""

"""The names of many images in one Parquet file, sorted: what is to be scored, and in which order.

Columns: ``id`` (int64, the number of the image), ``uri`` (string) and ``size`` (int64, bytes; missing if not known).
Ids and names ascend, so none occurs twice. Writing takes as much memory as a million names, however many there are,
and reading as much as a row group.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ..data.image_refs import HeldRef, ImageRef, MissingRef, StreamRef
from ..data.parquet_refs import open_parquet
from ..data.references import ref_of
from ..exceptions import FeatdiffError, UnreadableImage, UsageError, first_line
from ..files.remote import open_input
from .places import placing

if TYPE_CHECKING:
    from pyarrow import Table

COLUMNS = ("id", "uri", "size")
# Rows that are read at once, and the names that are sorted in memory.
_GROUP = 100_000
_IN_MEMORY = 1_000_000
# Sorted files that are open at once, and the names of each of them that are in memory.
_MOST_FILES = 256
_BUFFERED = 1_000
# Of larger manifests only the footer is hashed.
_HASHED_BYTES = 1 << 30
_MAGIC = b"PAR1"
# Things without an image that are told by name.
_MOST_MISSING = 1_000

Entry = tuple[str, int | None]


def arrow() -> Any:
    """pyarrow with its Parquet and IPC parts (``UsageError`` where it is not installed)."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UsageError("manifests and blocks need pyarrow: pip install 'featdiff[parquet]'") from None
    return pyarrow


# ---- reading ----


@dataclass(frozen=True)
class Block:
    """Some rows of a manifest, one after the other.

    Attributes
    ----------
    number : int
        Which block it is.
    ids : (n,) int64
    uris : list of str
    sizes : (n,) int64
        Bytes; -1 where that is not known.
    """

    number: int
    ids: np.ndarray
    uris: list[str]
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.uris)

    def refs(self) -> list[ImageRef]:
        """The images."""
        return [
            ref_of(uri, None if size < 0 else size) for uri, size in zip(self.uris, self.sizes.tolist(), strict=True)
        ]

    def digest(self) -> str:
        """SHA-256 of all that the manifest says of these rows."""
        names = "\0".join(self.uris).encode("utf-8", "surrogatepass")
        return hashlib.sha256(self.ids.tobytes() + self.sizes.tobytes() + names).hexdigest()


class Manifest:
    """A manifest, read a few rows at a time.

    Parameters
    ----------
    name : str
        A file or a URL.

    Attributes
    ----------
    name : str
    rows : int
    digest : str
        SHA-256 of the file; of one above 1 GB, of its footer, which has sizes and counts of all groups of rows.

    Raises
    ------
    UsageError
        It is no manifest, or holds no rows.
    FeatdiffError
        It cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> from featdiff.data.references import MissingRef
    >>> from featdiff.serving.manifest import Manifest, write_manifest
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = f"{folder}/manifest.parquet"
    ...     _ = write_manifest([MissingRef(f"{name}.png", "") for name in "cab"], file)
    ...     Manifest(file).block(1, 2).uris
    ['c.png']
    """

    def __init__(self, name: str) -> None:
        self.name = name
        try:
            self._stream = open_input(name)
            self.digest = _digest_of(self._stream)
            arrow()  # or it says how to install it
            self._file = open_parquet(self._stream)
        except FeatdiffError:
            raise
        except OSError as error:
            raise FeatdiffError(f"the manifest {name} cannot be read: {error.strerror or first_line(error)}") from None
        except Exception as error:  # of pyarrow, on a file of another kind
            raise UsageError(f"{name} is no manifest ({first_line(error)}): featdiff manifest writes one") from None

        columns = set(self._file.schema_arrow.names)
        if not columns.issuperset(COLUMNS):
            raise UsageError(f"{name} is no manifest: it lacks {' and '.join(sorted(set(COLUMNS) - columns))}")
        parts = self._file.metadata
        counts = [parts.row_group(i).num_rows for i in range(parts.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self.rows = int(self._starts[-1])
        if not self.rows:
            raise UsageError(f"the manifest {name} holds no images")
        self._read: tuple[int, Table] | None = None

    def blocks(self, size: int) -> int:
        """How many blocks of so many rows there are; the last may be shorter."""
        return -(-self.rows // size)

    def rows_of(self, number: int, size: int) -> int:
        """How many rows one of them has."""
        return min(size, self.rows - number * size)

    def block(self, number: int, size: int) -> Block:
        """One of them.

        Raises
        ------
        UsageError
            Names or ids do not ascend.
        FeatdiffError
            The manifest is damaged or cannot be read any more.
        """
        start = number * size
        pa = arrow()
        try:
            table = pa.concat_tables(self._slices(start, min(start + size, self.rows)))
            ids = table["id"].cast(pa.int64()).to_numpy()
            uris = table["uri"].cast(pa.string()).to_pylist()
            sizes = table["size"].cast(pa.int64()).fill_null(-1).to_numpy()
        except Exception as error:
            raise FeatdiffError(f"the manifest {self.name} cannot be read: {first_line(error)}") from None

        if None in uris or any(b <= a for a, b in itertools.pairwise(uris)) or (np.diff(ids) <= 0).any():
            raise UsageError(
                f"{self.name}: names and ids must ascend, and none may occur twice: featdiff manifest writes them so"
            )
        return Block(number, np.ascontiguousarray(ids), uris, np.ascontiguousarray(sizes))

    def _slices(self, start: int, stop: int) -> Iterator[Table]:
        """Tables that hold these rows."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, stop, side="left"))
        for group in range(first, last):
            if self._read is None or self._read[0] != group:
                self._read = group, self._file.read_row_group(group, columns=list(COLUMNS))
            begin = int(self._starts[group])
            low = max(start - begin, 0)
            yield self._read[1].slice(low, min(stop - begin, self._read[1].num_rows) - low)


class LazyRefs(Sequence[ImageRef]):
    """The images of a manifest by their position, read when they are asked for; ascending positions are fast."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def __len__(self) -> int:
        return self._manifest.rows

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        return self._manifest.block(int(position), 1).refs()[0]


def _digest_of(stream: IO[bytes]) -> str:
    size = stream.seek(0, 2)
    start = 0
    if size > _HASHED_BYTES:
        stream.seek(size - 8)
        end = stream.read(8)
        start = max(0, size - 8 - int.from_bytes(end[:4], "little")) if end.endswith(_MAGIC) else 0
    stream.seek(start)
    hasher = hashlib.sha256(f"{size} ".encode())
    while data := stream.read(1 << 20):
        hasher.update(data)
    stream.seek(0)
    return hasher.hexdigest()


# ---- writing ----


@dataclass
class Written:
    """What a manifest came to hold.

    Attributes
    ----------
    rows : int
    copies : int
        Names that occurred once more, and are there once.
    missing : list of (name, reason)
        The first 1,000 things that hold no image. They are rows, so that scoring says what is wrong.
    missing_count : int
        How many there are.
    """

    rows: int = 0
    copies: int = 0
    missing: list[tuple[str, str]] = field(default_factory=list)
    missing_count: int = 0


def write_manifest(images: Iterable[ImageRef], file: str) -> Written:
    """Write the names of images, sorted, whole or not at all.

    Parameters
    ----------
    images : iterable of ImageRef
        Files, members of archives, URLs; all are taken one after the other, and a million names are in memory.
    file : str
        A file or a URL.

    Raises
    ------
    UsageError
        An image that has no name to be read by, such as an array.
    FeatdiffError
        The disk is full (also that of temporary files), or the place cannot be written. An older file stays whole.
    """
    written = Written()
    pa = arrow()
    with tempfile.TemporaryDirectory(prefix="featdiff-manifest-") as folder:
        try:
            files = _Sorted(Path(folder))
            for ref in images:
                files.add(_entry(ref, written))
            ordered = files.entries()
        except OSError as error:
            raise FeatdiffError(f"temporary files in {folder} cannot be written: {first_line(error)}") from None

        schema = pa.schema([("id", pa.int64()), ("uri", pa.string()), ("size", pa.int64())])
        with placing(file) as stream, pa.parquet.ParquetWriter(stream, schema) as writer:
            for entries in _batches(_different(ordered, written), _GROUP):
                first = written.rows
                written.rows += len(entries)
                uris, sizes = zip(*entries, strict=True)
                ids = pa.array(range(first, written.rows), pa.int64())
                columns = [ids, pa.array(uris, pa.string()), pa.array(sizes, pa.int64())]
                writer.write_table(pa.table(columns, schema=schema))
    return written


def _entry(ref: ImageRef, written: Written) -> Entry:
    if isinstance(ref, MissingRef):
        written.missing_count += 1
        if len(written.missing) < _MOST_MISSING:
            written.missing.append((ref.path, ref.reason))
        return ref.path, None
    if isinstance(ref, HeldRef | StreamRef):
        raise UsageError(f"{ref.path} is in memory, and a manifest holds names: write the image to a file first")
    try:
        return ref.path, ref.bytes_to_read()
    except (OSError, UnreadableImage):  # scoring says what is wrong with it
        return ref.path, None


def _different(entries: Iterable[Entry], written: Written) -> Iterator[Entry]:
    """Each name once."""
    last = None
    for entry in entries:
        if entry[0] == last:
            written.copies += 1
            continue
        last = entry[0]
        yield entry


def _batches(entries: Iterator[Entry], size: int) -> Iterator[list[Entry]]:
    while batch := list(itertools.islice(entries, size)):
        yield batch


class _Sorted:
    """Names that are sorted on disk: a million at a time in memory, then the sorted files are merged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: list[Entry] = []
        self._files: list[Path] = []
        self._count = 0

    def add(self, entry: Entry) -> None:
        self._held.append(entry)
        if len(self._held) >= _IN_MEMORY:
            self._held.sort(key=itemgetter(0))
            self._write(self._held)
            self._held = []
            if len(self._files) >= _MOST_FILES:
                merged, self._files = self._files, []
                self._write(_merged(merged))
                for file in merged:
                    file.unlink()

    def entries(self) -> Iterator[Entry]:
        """All in order."""
        self._held.sort(key=itemgetter(0))
        return heapq.merge(_merged(self._files), self._held, key=itemgetter(0)) if self._files else iter(self._held)

    def _write(self, entries: Iterable[Entry]) -> None:
        pa = arrow()
        schema = pa.schema([("uri", pa.string()), ("size", pa.int64())])
        file = self._folder / f"{self._count}.arrow"
        self._count += 1
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in _batches(iter(entries), _BUFFERED):
                uris, sizes = zip(*batch, strict=True)
                columns = [pa.array(uris, pa.string()), pa.array(sizes, pa.int64())]
                writer.write_batch(pa.record_batch(columns, schema=schema))
        self._files.append(file)


def _merged(files: Sequence[Path]) -> Iterator[Entry]:
    return heapq.merge(*map(_entries_in, files), key=itemgetter(0))


def _entries_in(file: Path) -> Iterator[Entry]:
    pa = arrow()
    with pa.OSFile(str(file), "rb") as source, pa.ipc.open_stream(source) as reader:
        for batch in reader:
            yield from zip(batch["uri"].to_pylist(), batch["size"].to_pylist(), strict=True)

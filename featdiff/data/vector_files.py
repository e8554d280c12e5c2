"""Files of vectors -> rows of float32, their names and their layers. Knows no images and no detector.

Missing numbers become NaN; callers decide what to do with such rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..exceptions import UsageError, first_line

#: Columns of a Parquet file that name rows, the first that is there.
NAME_COLUMNS = ("path", "id", "name")
_REAL = "biuf"  # NumPy's kinds of real numbers
_REAL_TENSORS = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")  # those of safetensors


class Part(Protocol):
    """Rows (n, d) on disk or in memory, of a NumPy or torch type."""

    def __getitem__(self, rows: slice) -> Any: ...


@dataclass(frozen=True)
class Arrays:
    """The vectors of one file, one a row.

    Attributes
    ----------
    file : str
        Its name as given.
    parts : mapping of str to Part
        By layer, the numbers (n, d) of all rows.
    widths : mapping of str to int
        By layer, the number of columns.
    n : int
        The number of rows.
    names : sequence of str, optional
        Of the rows, if the file has them.
    columns : sequence of str, optional
        Of the columns of a single layer, if the file has them.
    """

    file: str
    parts: Mapping[str, Part]
    widths: Mapping[str, int]
    n: int
    names: Sequence[str] | None = None
    columns: Sequence[str] | None = None

    def __len__(self) -> int:
        return self.n

    @property
    def width(self) -> int:
        """The number of columns of all layers together."""
        return sum(self.widths.values())

    @property
    def layers(self) -> dict[str, slice] | None:
        """Columns of each layer; None if the file has a single layer."""
        if len(self.parts) == 1:
            return None

        layers = {}
        start = 0
        for name, width in self.widths.items():
            layers[name] = slice(start, start + width)
            start += width
        return layers

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop``, (m, width) float32; larger numbers than float32 can hold become infinite."""
        with np.errstate(over="ignore", invalid="ignore"):
            parts = [_float32(part[start:stop]) for part in self.parts.values()]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def name(self, row: int) -> str:
        """The name of a row: that in the file, else ``FILE[row]``."""
        return f"{self.file}[{row}]" if self.names is None else self.names[row]


def open_arrays(name: str) -> Arrays:
    """Open a file of vectors: ``.npy``, ``.safetensors`` or ``.parquet``.

    Parameters
    ----------
    name : str
        ``.npy``: an array (n, d), which stays on disk. ``.safetensors``: one tensor (n, d), or several with the same
        number of rows, each of them a layer. ``.parquet``: columns of numbers, or columns of lists of numbers, each of
        them a layer; a column ``path``, ``id`` or ``name`` names the rows.

    Returns
    -------
    Arrays

    Raises
    ------
    UsageError
        No such file, another kind, a damaged one, no rows, numbers that are not real, or another shape.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from featdiff.data.vector_files import open_arrays
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/vectors.npy", np.ones((3, 4)))
    ...     arrays = open_arrays(f"{folder}/vectors.npy")
    >>> len(arrays), arrays.width
    (3, 4)
    """
    file = Path(name)
    readers: dict[str, Callable[[Path], Arrays]] = {
        ".npy": _open_npy,
        ".safetensors": _open_safetensors,
        ".parquet": _open_parquet,
    }
    if file.suffix.lower() not in readers:
        raise UsageError(f"{name}: vectors are read from files that end in {', '.join(readers)}")
    if not file.is_file():
        raise UsageError(f"{name}: {'not a file' if file.exists() else 'no such file'}")

    arrays = readers[file.suffix.lower()](file)
    if not len(arrays):
        raise UsageError(f"{name} holds no rows")
    if not arrays.width:
        raise UsageError(f"{name} holds no columns")
    return arrays


def _open_npy(file: Path) -> Arrays:
    try:
        if not file.stat().st_size:
            raise UsageError(f"{file} is empty")
        mapped: Any = "r" if _numbers_in(file) else None  # an empty array cannot be mapped
        array = np.load(file, mmap_mode=mapped, allow_pickle=False)
    except UsageError:
        raise
    except Exception as error:  # NumPy raises nearly anything on a damaged file
        raise _damaged(file, "NumPy", error) from None

    shape = _shape(file, array.shape, array.dtype.kind in _REAL, str(array.dtype))
    return _arrays(file, {"0": array}, {"0": shape})


def _numbers_in(file: Path) -> int:
    """How many numbers the header of a NumPy file promises."""
    with file.open("rb") as stream:
        major, _ = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        return int(np.prod(read(stream)[0]))


def _open_safetensors(file: Path) -> Arrays:
    from safetensors import SafetensorError, safe_open

    parts = {}
    shapes = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in sorted(opened.keys()):
                part = opened.get_slice(name)
                kind = part.get_dtype()
                parts[name] = part
                shapes[name] = _shape(file, part.get_shape(), kind in _REAL_TENSORS, kind, f": tensor {name}")
    except (SafetensorError, OSError) as error:
        raise _damaged(file, "safetensors", error) from None

    if not parts:
        raise UsageError(f"{file} holds no tensors")
    return _arrays(file, parts, shapes)


def _open_parquet(file: Path) -> Arrays:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError("Parquet needs pyarrow: pip install 'featdiff[parquet]'") from None

    try:
        table = pyarrow.parquet.ParquetFile(file).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(file, "Parquet", error) from None

    title = next((name for name in NAME_COLUMNS if name in table.column_names), None)
    names = None
    if title is not None:
        try:
            names = ["" if name is None else str(name) for name in table[title].to_pylist()]
        except UnicodeDecodeError as error:  # Parquet does not check that text is text
            raise _damaged(file, "Parquet", error) from None

    columns = {name: table[name].combine_chunks() for name in table.column_names if name != title}
    lists = [_is_list(file, name, column.type) for name, column in columns.items()]
    if not columns:
        raise UsageError(f"{file} holds no columns of numbers")
    if any(lists) and not all(lists):
        raise UsageError(f"{file} mixes columns of numbers and columns of lists of numbers: keep one kind")

    if lists[0]:
        parts = {name: _stacked(column) for name, column in columns.items()}
    else:
        parts = {"0": np.column_stack([_numbers(column) for column in columns.values()])}
    arrays = _arrays(file, parts, {name: part.shape for name, part in parts.items()})
    return replace(arrays, names=names, columns=None if lists[0] else list(columns))


def _is_list(file: Path, name: str, kind: Any) -> bool:
    """Whether an Arrow type is a list of numbers, not a number; anything else is refused."""
    from pyarrow import types

    nested = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    inner = kind.value_type if nested else kind
    if not types.is_integer(inner) and not types.is_floating(inner):
        raise UsageError(
            f"{file}: column {name!r} holds {kind}, not numbers or lists of numbers: leave it out, or call it "
            f"{NAME_COLUMNS[0]} if it names the rows"
        )
    return bool(nested)


def _numbers(column: Any) -> np.ndarray:
    """An Arrow column of numbers, with NaN for what is missing."""
    return np.asarray(column.cast("float32", safe=False).to_numpy(zero_copy_only=False), dtype=np.float32)


def _stacked(column: Any) -> np.ndarray:
    """An Arrow column of lists -> (n, d), where d is the commonest length; rows of other lists are NaN."""
    lengths = column.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False)
    different, counts = np.unique(lengths[lengths >= 0], return_counts=True)
    width = int(different[counts.argmax()]) if len(different) else 0

    vectors = np.full((len(column), width), np.nan, np.float32)
    good = lengths == width
    vectors[good] = _numbers(column.filter(good).flatten()).reshape(good.sum(), width)
    return vectors


def _arrays(file: Path, parts: Mapping[str, Part], shapes: Mapping[str, Sequence[int]]) -> Arrays:
    """Join layers, all of which must have the same number of rows."""
    counts = {name: shape[0] for name, shape in shapes.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {n:,}" for name, n in counts.items())
        raise UsageError(f"{file}: all layers need as many rows, and there are {listed}")

    widths = {name: shape[1] for name, shape in shapes.items()}
    return Arrays(str(file), parts, widths, next(iter(counts.values())))


def _shape(file: Path, shape: Sequence[int], is_real: bool, kind: str, part: str = "") -> Sequence[int]:
    """The shape (n, d) of an array; other shapes and other numbers are refused."""
    if len(shape) != 2:
        raise UsageError(f"{file}{part} has the shape {tuple(shape)}; needed are rows of vectors, (n, d)")
    if not is_real:
        raise UsageError(f"{file}{part} holds {kind}, not real numbers")
    return shape


def _float32(rows: Any) -> np.ndarray:
    if not isinstance(rows, np.ndarray):
        rows = rows.float().numpy()
    return np.asarray(rows, dtype=np.float32)


def _damaged(file: Path, kind: str, error: Exception) -> UsageError:
    return UsageError(f"{file} cannot be read as a {kind} file: {first_line(error)}")

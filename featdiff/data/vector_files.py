"""Files of vectors -> rows of float32, their names and their layers. Knows no images and no detector.

A row is judged by whoever uses it: what a file lacks comes out as NaN.
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


class Part(Protocol):
    """Rows (n, d) on disk or in memory, of a NumPy or torch type."""

    def __getitem__(self, rows: slice) -> Any: ...


@dataclass(frozen=True)
class Arrays:
    """Rows of one file.

    file : as named. parts : for each layer, rows of numbers. widths : for each layer, how many columns. n : rows.
    names, columns : of the rows, and of the columns of a single layer, if the file tells.
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
        """Columns of all layers."""
        return sum(self.widths.values())

    @property
    def layers(self) -> dict[str, slice] | None:
        """Columns of each layer, if the file tells layers apart."""
        if len(self.parts) == 1:
            return None
        ends = np.cumsum([*self.widths.values()]).tolist()
        return {name: slice(end - width, end) for (name, width), end in zip(self.widths.items(), ends, strict=True)}

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop``, (m, width) float32; numbers too large for that become infinite."""
        with np.errstate(over="ignore"):
            parts = [_float32(part[start:stop]) for part in self.parts.values()]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def name(self, row: int) -> str:
        """What to call a row: ``FILE[row]`` unless the file tells."""
        return f"{self.file}[{row}]" if self.names is None else self.names[row]


def open_arrays(name: str) -> Arrays:
    """Open a file of vectors: ``.npy``, ``.safetensors`` or ``.parquet``.

    Parameters
    ----------
    name : path
        ``.npy``: an array (n, d), which stays on disk. ``.safetensors``: one tensor (n, d), or several with as many
        rows, each of them a layer. ``.parquet``: columns of numbers, or columns of lists of numbers, each of them a
        layer; a column ``path``, ``id`` or ``name`` names the rows.

    Raises
    ------
    UsageError
        No such file, another kind, a damaged one, no rows, numbers that are not real, or another shape.
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
    found = readers[file.suffix.lower()](file)
    if not len(found) or not found.width:
        raise UsageError(f"{name} holds no {'columns' if len(found) else 'rows'}")
    return found


def _open_npy(file: Path) -> Arrays:
    try:
        if not file.stat().st_size:
            raise UsageError(f"{file} is empty")
        mapped: Any = "r" if _numbers_in(file) else None  # nothing cannot be mapped
        array = np.load(file, mmap_mode=mapped, allow_pickle=False)
    except UsageError:
        raise
    except Exception as error:  # NumPy raises nearly anything on a damaged file
        raise _damaged(file, "NumPy", error) from None
    return _whole(file, {"0": array}, {"0": _shape(file, array.shape, array.dtype.kind in _REAL, str(array.dtype))})


def _numbers_in(file: Path) -> int:
    with file.open("rb") as stream:
        major, _ = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        return int(np.prod(read(stream)[0]))


def _open_safetensors(file: Path) -> Arrays:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            parts = {name: opened.get_slice(name) for name in sorted(opened.keys())}
            kinds = {name: part.get_dtype() for name, part in parts.items()}
            shapes = {
                name: _shape(file, part.get_shape(), _is_real(kinds[name]), kinds[name], f": tensor {name}")
                for name, part in parts.items()
            }
    except (SafetensorError, OSError) as error:
        raise _damaged(file, "safetensors", error) from None
    if not parts:
        raise UsageError(f"{file} holds no tensors")
    return _whole(file, parts, shapes)


def _is_real(kind: str) -> bool:
    return kind in ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


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
    names = None if title is None else ["" if name is None else str(name) for name in table[title].to_pylist()]
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
    found = _whole(file, parts, {name: part.shape for name, part in parts.items()})
    return replace(found, names=names, columns=None if lists[0] else list(columns))


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
    """An Arrow column of lists -> (n, d), d being the commonest length; NaN where a list is missing or of another."""
    lengths = column.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False)
    known, counts = np.unique(lengths[lengths >= 0], return_counts=True)
    width = int(known[counts.argmax()]) if len(known) else 0
    out = np.full((len(column), width), np.nan, np.float32)
    good = lengths == width
    out[good] = _numbers(column.filter(good).flatten()).reshape(good.sum(), width)
    return out


def _whole(file: Path, parts: Mapping[str, Part], shapes: Mapping[str, Sequence[int]]) -> Arrays:
    rows = {name: shape[0] for name, shape in shapes.items()}
    if len(set(rows.values())) > 1:
        told = ", ".join(f"{name} {n:,}" for name, n in rows.items())
        raise UsageError(f"{file}: all layers need as many rows, and there are {told}")
    return Arrays(str(file), parts, {name: shape[1] for name, shape in shapes.items()}, next(iter(rows.values())))


def _shape(file: Path, shape: Sequence[int], is_real: bool, kind: str, part: str = "") -> Sequence[int]:
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

"""Files of vectors: NumPy, safetensors and Parquet, and what is refused."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from featdiff.data.vector_files import open_arrays
from featdiff.exceptions import UsageError


@pytest.mark.parametrize("kind", ["<f4", ">f8", "<f2", "<i2", "|u1", "|b1"])
def test_npy_of_any_real_type_stays_on_disk(kind: str, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 2, (7, 3)).astype(kind)
    np.save(tmp_path / "x.npy", rows)
    found = open_arrays(str(tmp_path / "x.npy"))
    assert (len(found), found.width, found.layers, found.name(4)) == (7, 3, None, f"{tmp_path / 'x.npy'}[4]")
    assert found.rows(2, 6).dtype == np.float32 and np.array_equal(found.rows(2, 6), rows[2:6])
    assert isinstance(found.parts["0"], np.memmap)


def test_float32_is_not_copied(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(5, 24)).astype(np.float32))
    found = open_arrays(str(tmp_path / "x.npy"))
    assert np.shares_memory(found.rows(0, 5), found.parts["0"])


def test_numbers_too_large_become_infinite(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([[1e300, 1.0]]))
    assert open_arrays(str(tmp_path / "x.npy")).rows(0, 1).tolist() == [[np.inf, 1]]


def test_tensors_are_layers_in_the_order_of_their_names(tmp_path: Path) -> None:
    b, a = torch.randn(5, 2, dtype=torch.bfloat16), torch.arange(15).reshape(5, 3)
    save_file({"b": b, "a": a}, tmp_path / "x.safetensors")
    found = open_arrays(str(tmp_path / "x.safetensors"))
    assert found.layers == {"a": slice(0, 3), "b": slice(3, 5)}
    assert np.array_equal(found.rows(1, 4), torch.cat([a.float(), b.float()], 1)[1:4].numpy())
    save_file({"only": a}, tmp_path / "y.safetensors")
    assert open_arrays(str(tmp_path / "y.safetensors")).layers is None


def test_parquet_columns_of_numbers(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = {"x": [1.0, None, 3.0], "name": ["a", None, "c"], "y": arrow.array([4, 5, 6], arrow.int8())}
    parquet.write_table(arrow.table(table), tmp_path / "x.parquet")
    found = open_arrays(str(tmp_path / "x.parquet"))
    assert np.array_equal(found.rows(0, 3), [[1, 4], [np.nan, 5], [3, 6]], equal_nan=True)
    assert (found.layers, found.columns, [found.name(i) for i in range(3)]) == (None, ["x", "y"], ["a", "", "c"])


@pytest.mark.parametrize("fixed", [True, False])
def test_parquet_columns_of_lists(fixed: bool, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    kind = arrow.list_(arrow.float64(), 2) if fixed else arrow.list_(arrow.float64())
    first = arrow.array([[1, 2], None, [3, None], [5, 6] if fixed else [7, 8, 9]], kind)
    second = arrow.array([[1.0], [2.0], [3.0], [4.0]], arrow.large_list(arrow.float32()))
    parquet.write_table(arrow.table({"id": [10, 11, 12, 13], "u": first, "v": second}), tmp_path / "x.parquet")
    found = open_arrays(str(tmp_path / "x.parquet"))
    last = [5, 6, 4] if fixed else [np.nan, np.nan, 4]
    expected = [[1, 2, 1], [np.nan, np.nan, 2], [3, np.nan, 3], last]
    assert np.array_equal(found.rows(0, 4), expected, equal_nan=True)
    assert found.layers == {"u": slice(0, 2), "v": slice(2, 3)}
    assert found.name(3) == "13"


def _npy(array: np.ndarray, cut: int = 0) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()[: -cut or None]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.npy", _npy(np.zeros(5)), "(5,)"),
        ("x.npy", _npy(np.zeros((0, 5))), "no rows"),
        ("x.npy", _npy(np.zeros((5, 0))), "no columns"),
        ("x.npy", _npy(np.array([["a", "b"]])), "<U1, not real numbers"),
        ("x.npy", _npy(np.zeros((2, 2), complex)), "complex128"),
        ("x.npy", _npy(np.array([[None, 1]], object)), "Python objects"),
        ("x.npy", _npy(np.zeros((50, 5)), cut=100), "cannot be read as a NumPy file"),
        ("x.npy", b"", "empty"),
        ("x.npy", b"PK\x03\x04 not what it says", "cannot be read as a NumPy file"),
        ("x.safetensors", b"no header", "cannot be read as a safetensors file"),
        ("x.parquet", b"PAR1 and no more", "cannot be read as a Parquet file"),
        ("x.csv", b"1,2\n3,4\n", "end in .npy, .safetensors, .parquet"),
        ("x.npy", None, "no such file"),
    ],
    ids=str,
)
def test_files_that_cannot_be_used(name: str, content: bytes | None, words: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        open_arrays(str(tmp_path / name))
    assert name in str(caught.value) and words in str(caught.value) and "\n" not in str(caught.value)


def test_tensors_that_cannot_be_used(tmp_path: Path) -> None:
    for tensors, words in (
        ({"a": torch.zeros(3, 2), "b": torch.zeros(4, 2)}, "as many rows, and there are a 3, b 4"),
        ({"a": torch.zeros(3, 2, 2)}, "tensor a has the shape (3, 2, 2)"),
        ({"a": torch.zeros(3, 2, dtype=torch.complex64)}, "tensor a holds"),
        ({}, "no tensors"),
    ):
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(UsageError) as caught:
            open_arrays(str(tmp_path / "x.safetensors"))
        assert words in str(caught.value)


def test_parquet_that_cannot_be_used(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for columns, words in (
        ({"x": [1.0], "label": ["cat"]}, "column 'label' holds string"),
        ({"x": [["cat"]]}, "column 'x' holds list"),
        ({"x": [1.0], "v": [[1.0, 2.0]]}, "keep one kind"),
        ({"path": ["a"]}, "no columns of numbers"),
        ({"x": arrow.array([], arrow.float32())}, "no rows"),
        ({"v": arrow.array([None], arrow.list_(arrow.float32()))}, "no columns"),
    ):
        parquet.write_table(arrow.table(columns), tmp_path / "x.parquet")
        with pytest.raises(UsageError) as caught:
            open_arrays(str(tmp_path / "x.parquet"))
        assert words in str(caught.value)


def test_parquet_names_that_are_no_text(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    names = arrow.array([b"\xff", b"b"]).view("string")
    parquet.write_table(arrow.table({"id": names, "x": [1.0, 2.0]}), tmp_path / "x.parquet")
    with pytest.raises(UsageError, match="x.parquet cannot be read as a Parquet file: 'utf-8' codec can't decode"):
        open_arrays(str(tmp_path / "x.parquet"))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match="pip install 'featdiff\\[parquet\\]'"):
        open_arrays(str(tmp_path / "x.parquet"))

"""Damaged files of vectors, and sound ones of odd shapes and types."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import torch
from safetensors.torch import save

from featdiff.data.vector_files import open_arrays
from featdiff.exceptions import UsageError

from .harness import Target
from .mutators import mutate
from .place import Place, command, parse_jsonl, require

_WIDTH = 16  # of the model of vectors
_TYPES = ("f4", "f8", "f2", ">f8", "i1", "i8", "u8", "?", "c8", "U3", "O", "M8[s]", "V4")


def make(rng: random.Random, folder: Path, place: Place) -> None:
    """One file ``vectors.SUFFIX``; half of them are whole, and odd in another way."""
    suffix = rng.choice((".npy", ".npy", ".npz", ".csv", ".safetensors", ".parquet", ".parquet"))
    whole = rng.random() < 0.4
    values = _odd(rng) if whole else np.random.default_rng(0).normal(size=(30, _WIDTH))
    try:
        data = _write(suffix, values, rng)
    except (
        ArithmeticError,
        IndexError,
        TypeError,
        ValueError,
        pyarrow.ArrowException,
    ):  # this kind of file cannot hold them
        data = _write(".npy", values, rng)
        suffix = ".npy"
    (folder / f"vectors{suffix}").write_bytes(data if whole else mutate(data, rng))


def _odd(rng: random.Random) -> np.ndarray:
    shape = rng.choice(((30, _WIDTH), (30, _WIDTH), (30, 15), (0, _WIDTH), (30, 0), (_WIDTH,), (), (2, 3, _WIDTH)))
    values = np.asarray(np.random.default_rng(rng.randrange(1000)).normal(size=shape))
    if values.size and rng.random() < 0.5:
        values.flat[rng.randrange(values.size)] = rng.choice((np.nan, np.inf, 1e300, 1e38, -1e20, 1e7))
    with np.errstate(all="ignore"):
        values = np.asarray(values.astype(rng.choice(_TYPES)) if rng.random() < 0.4 else values)
    return np.asfortranarray(values) if rng.random() < 0.2 else values


def _write(suffix: str, values: np.ndarray, rng: random.Random) -> bytes:
    stream = io.BytesIO()
    if suffix == ".npy":
        np.save(stream, values)
    elif suffix == ".npz":
        np.savez(stream, values)
    elif suffix == ".safetensors":
        half = values.shape[-1] // 2 if rng.random() < 0.3 else values.shape[-1]
        parts = {"a": torch.from_numpy(values[:, :half].copy()), "b": torch.from_numpy(values[:, half:].copy())}
        return save({name: part for name, part in parts.items() if part.numel()})
    else:
        table = _table(values, rng)
        if suffix == ".csv":
            pyarrow.csv.write_csv(table, stream)
        else:
            pyarrow.parquet.write_table(table, stream)
    return stream.getvalue()


def _table(values: np.ndarray, rng: random.Random) -> pyarrow.Table:
    """Columns of numbers or one of lists, with names or without; some cells may be missing."""
    columns: dict[str, Any] = {}
    if rng.random() < 0.5:
        columns[rng.choice(("path", "id", "name"))] = [rng.choice(("a", "", None, "=1")) for _ in values]
    if rng.random() < 0.3:
        rows: list[Any] = values.tolist()
        if rows and rng.random() < 0.5:
            rows[0] = rng.choice((None, [], [None], [1.0] * 99))
        columns["vector"] = rows
    else:
        columns |= {f"c{i}": values[:, i] for i in range(values.shape[1])}
    if rng.random() < 0.1:
        columns["text"] = ["x" for _ in values]
    return pyarrow.table(columns)


def check(folder: Path, place: Place) -> int:
    (file,) = folder.glob("vectors*")
    count = None
    try:
        arrays = open_arrays(str(file))
        arrays.rows(0, min(len(arrays), 100))
        arrays.name(0)
        count = len(arrays)
    except UsageError as error:
        require("\n" not in str(error), "a message of several lines")

    done = command("score", "--features", file, "-m", place.vectors, "--format", "jsonl", "-q")
    rows = parse_jsonl(done.stdout)
    if done.exit_code in (0, 3):
        require(len(rows) == count, f"{len(rows)} rows written, {count} in the file")
    else:
        require(len(done.stderr.splitlines()) == 1, f"an error of several lines: {done.stderr}")
    for row in rows:
        require((row["status"] == "ok") == (row["ood_score"] is not None), f"{row}")
        require(row["status"] != "ok" or np.isfinite([row["ood_score"], row["p_value"]]).all(), f"{row}")
    return len(rows)


TARGET = Target("vectors", make, check)

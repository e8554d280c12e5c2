"""Stores of small vectors, and disks that fill."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from featdiff.features.store import FeatureStore, FeatureTable, Rows

WIDTH = 8


VECTORS = np.random.default_rng(0).normal(size=(60, WIDTH)).astype(np.float32)


def digest(number: int) -> bytes:
    """Sixteen bytes, most of them zero, at either end."""
    return number.to_bytes(16, "big" if number % 2 else "little")


def fill(folder: Path, numbers: range) -> FeatureStore:
    store = FeatureStore(folder, WIDTH)
    for number in numbers:
        store.add(digest(number), VECTORS[number])
    store.flush()
    return store


def digests(numbers: range | list[int]) -> list[bytes]:
    return [digest(number) for number in numbers]


def everything(table: FeatureTable) -> np.ndarray:
    return table[np.arange(len(table))].numpy()


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def in_memory(rows: np.ndarray | Tensor) -> Rows:
    """Rows of features that are at hand."""
    return Rows(torch.as_tensor(rows, dtype=torch.float32))

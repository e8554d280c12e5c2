"""Which images train, which validate, and which calibrate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ..exceptions import UsageError

#: Rows that calibrate and validate, at most: more would not help.
MOST_CALIBRATION, MOST_VALIDATION = 10_000, 2_000


@dataclass(frozen=True)
class Split:
    """Disjoint row numbers, each sorted ascending."""

    training: np.ndarray
    validation: np.ndarray
    calibration: np.ndarray

    def check(self, n: int) -> None:
        """Whether each part has rows of ``n``, and no two parts the same one (``UsageError``)."""
        parts = (self.training, self.validation, self.calibration)
        every = np.concatenate(parts)
        if not all(map(len, parts)) or len(np.unique(every)) < len(every) or every.min() < 0:
            raise UsageError("training, validation and calibration need different rows, at least one each")
        if every.max() >= n:
            raise UsageError(f"the split has row {every.max()}, counted from 0, and {n} different images can be read")


def split(n: int, calibration: float, validation: float, seed: int) -> Split:
    """Random rows of ``n`` for training, validation and calibration.

    ``calibration`` and ``validation`` are shares of ``n``; at most so many rows as the constants above say.

    Raises
    ------
    UsageError
        Fewer than three rows.
    """
    return _parts(np.random.default_rng(seed).permutation(n), calibration, validation)


def split_by_content(digests: Sequence[bytes], calibration: float, validation: float) -> Split:
    """The same parts, of images with these digests: by chance, yet an image falls into the same one whenever it can.

    Images are ordered by digest; the first calibrate, the next validate, the others train. So whoever splits the same
    images with equal or larger shares trains on none that calibrate here; of more or fewer images, the place of an
    image that is near the border between two parts may change.

    Raises
    ------
    UsageError
        Fewer than three rows.
    """
    order = sorted(range(len(digests)), key=lambda i: digests[i])
    return _parts(np.array(order, dtype=np.int64), calibration, validation)


def _parts(order: np.ndarray, calibration: float, validation: float) -> Split:
    n = len(order)
    if n < 3:
        raise UsageError(f"{n} different images are too few: one each is needed to train, validate and calibrate")
    n_cal = min(max(1, round(calibration * n)), MOST_CALIBRATION, n - 2)
    # statistics of held-out errors need a handful of rows even when there are few in all
    n_val = min(max(1, round(validation * n), min(5, n // 5)), MOST_VALIDATION, n - n_cal - 1)
    return Split(*(np.sort(part) for part in (order[n_cal + n_val :], order[n_cal : n_cal + n_val], order[:n_cal])))


Some = TypeVar("Some", list[Any], np.ndarray)


def evenly(rows: Some, most: int) -> Some:
    """At most so many of a sequence, evenly spread; every second or third of it, and so on."""
    return rows[:: max(1, -(-len(rows) // most))]

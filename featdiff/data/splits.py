"""Which images train, which validate, and which calibrate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ..exceptions import UsageError

#: At most so many images calibrate: more would not help.
MOST_CALIBRATION = 10_000
#: At most so many images validate.
MOST_VALIDATION = 2_000


@dataclass(frozen=True)
class Split:
    """Which of the different images train, validate and calibrate.

    Parameters
    ----------
    training : ndarray of int
        Indices, sorted ascending; no index is in two parts.
    validation : ndarray of int
        As above.
    calibration : ndarray of int
        As above.

    Examples
    --------
    >>> from featdiff.data.splits import split
    >>> parts = split(100, calibration=0.2, validation=0.1, seed=0)
    >>> len(parts.training), len(parts.validation), len(parts.calibration)
    (70, 10, 20)
    >>> parts.check(100)
    """

    training: np.ndarray
    validation: np.ndarray
    calibration: np.ndarray

    def check(self, n: int) -> None:
        """Check that no part is empty, no index is in two parts, and all are below ``n``.

        Parameters
        ----------
        n : int
            Number of different images.

        Raises
        ------
        UsageError
            One of these does not hold.
        """
        parts = (self.training, self.validation, self.calibration)
        indices = np.concatenate(parts)
        is_disjoint = len(np.unique(indices)) == len(indices)
        if not all(map(len, parts)) or not is_disjoint or indices.min() < 0:
            raise UsageError("training, validation and calibration need different rows, at least one each")
        if indices.max() >= n:
            raise UsageError(f"the split has row {indices.max()}, counted from 0, and {n} different images can be read")


def split(n: int, calibration: float, validation: float, seed: int) -> Split:
    """Divide ``n`` rows by chance.

    Parameters
    ----------
    n : int
        Number of rows, at least 3.
    calibration : float
        Share of the rows that calibrates, in (0, 1); at most :data:`MOST_CALIBRATION` rows.
    validation : float
        Share of the rows that validates, in (0, 1); at most :data:`MOST_VALIDATION` rows.
    seed : int

    Returns
    -------
    Split

    Raises
    ------
    UsageError
        Fewer than three rows.
    """
    return _parts(np.random.default_rng(seed).permutation(n), calibration, validation)


def split_by_content(digests: Sequence[bytes], calibration: float, validation: float) -> Split:
    """Divide images by their content, so that an image tends to fall into the same part every time.

    Images are ordered by digest; the first calibrate, the next validate, the others train. A split of the same images
    with equal or larger shares therefore trains on none of the images that calibrate here. With more or fewer images,
    those near the border between two parts may change sides.

    Parameters
    ----------
    digests : sequence of bytes
        Of the different images.
    calibration : float
        As for :func:`split`.
    validation : float
        As for :func:`split`.

    Returns
    -------
    Split

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

    n_cal = max(1, round(calibration * n))
    n_cal = min(n_cal, MOST_CALIBRATION, n - 2)
    # statistics of held-out errors need a handful of rows even when there are few in all
    n_val = max(1, round(validation * n), min(5, n // 5))
    n_val = min(n_val, MOST_VALIDATION, n - n_cal - 1)

    return Split(
        training=np.sort(order[n_cal + n_val :]),
        validation=np.sort(order[n_cal : n_cal + n_val]),
        calibration=np.sort(order[:n_cal]),
    )


Some = TypeVar("Some", list[Any], np.ndarray)


def evenly(items: Some, most: int) -> Some:
    """At most ``most`` items of a sequence, evenly spread: every second or third of it, and so on."""
    step = max(1, math.ceil(len(items) / most))
    return items[::step]

"""Which images train, which validate, and which calibrate; images of one group are never on two sides."""

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
#: Up to so many groups (images, where each is its own group) calibration is by folds: a fifth would be too coarse.
FEW = 500
#: How many folds.
FOLDS = 5
#: Share of the images, or groups, that calibrates where there are more.
CALIBRATION = 0.2


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


@dataclass(frozen=True)
class Plan:
    """Which images train a detector, and which calibrate it.

    Parameters
    ----------
    final : Split
        Of the detector itself. Its calibration part is empty if there are folds.
    folds : tuple of Split, default ()
        Each trains a detector that scores its own calibration part and is then thrown away. Every image is in the
        calibration part of one of them.
    groups : int
        Independent groups among the images that calibrate.

    Examples
    --------
    >>> from featdiff.data.splits import make_plan
    >>> len(make_plan(100).folds), len(make_plan(1000).folds)
    (5, 0)
    """

    final: Split
    folds: tuple[Split, ...]
    groups: int

    @property
    def calibration(self) -> np.ndarray:
        """Indices of the images that calibrate, in the order in which they are scored."""
        if not self.folds:
            return self.final.calibration
        return np.concatenate([fold.calibration for fold in self.folds])


def make_plan(
    n: int,
    calibration: float | str = "auto",
    validation: float = 0.05,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> Plan:
    """Divide ``n`` rows by chance.

    Parameters
    ----------
    n : int
        Number of rows.
    calibration : "auto" or float, default "auto"
        Share of the groups that calibrates, in (0, 1). ``auto``: up to :data:`FEW` groups all of them, by
        :data:`FOLDS` folds; of more, :data:`CALIBRATION`.
    validation : float, default 0.05
        Share of the groups that validates, in (0, 1).
    seed : int, default 0
    groups : ndarray of shape (n,) of int, optional
        Rows with the same number are on the same side. Default: each row is a group of its own.

    Returns
    -------
    Plan

    Raises
    ------
    UsageError
        Fewer than three groups.
    """
    labels = _labels(n, groups)
    count = len(np.unique(labels))
    if calibration == "auto" and count <= FEW:
        return _fold_plan(labels, count, validation, seed)

    share = CALIBRATION if calibration == "auto" else float(calibration)
    parts = split(n, share, validation, seed, groups)
    return Plan(parts, (), len(np.unique(labels[parts.calibration])))


def split(n: int, calibration: float, validation: float, seed: int, groups: np.ndarray | None = None) -> Split:
    """Divide ``n`` rows by chance, once.

    Parameters
    ----------
    n : int
        Number of rows.
    calibration : float
        Share of the groups that calibrates, in (0, 1); at most :data:`MOST_CALIBRATION` rows.
    validation : float
        Share of the groups that validates, in (0, 1); at most :data:`MOST_VALIDATION` rows.
    seed : int
    groups : ndarray of shape (n,) of int, optional
        Rows with the same number are on the same side. Default: each row is a group of its own.

    Returns
    -------
    Split

    Raises
    ------
    UsageError
        Fewer than three groups.
    """
    labels = _labels(n, groups)
    names = np.unique(labels)
    order = names[np.random.default_rng(seed).permutation(len(names))]
    by_group = _parts(order, calibration, validation, single=len(names) == n)

    parts = []
    for chosen, most in (
        (by_group.calibration, MOST_CALIBRATION),
        (by_group.validation, MOST_VALIDATION),
    ):
        rows = np.flatnonzero(np.isin(labels, chosen))
        if len(rows) > most:
            in_random_order = order[np.isin(order, chosen)]
            rows = _first_groups(rows, labels, in_random_order, most)
        parts.append(rows)
    training = np.flatnonzero(np.isin(labels, by_group.training))
    return Split(training=training, validation=parts[1], calibration=parts[0])


def _first_groups(rows: np.ndarray, labels: np.ndarray, chosen: np.ndarray, most: int) -> np.ndarray:
    """Rows of as many of the chosen groups as have at most ``most`` rows together; of the first one in any case."""
    sizes = np.array([np.count_nonzero(labels[rows] == group) for group in chosen])
    fitting = max(1, int(np.searchsorted(np.cumsum(sizes), most, side="right")))
    return rows[np.isin(labels[rows], chosen[:fitting])][:most]


def _fold_plan(labels: np.ndarray, count: int, validation: float, seed: int) -> Plan:
    """Every group calibrates once, by a detector that has not seen it."""
    if count < 3:
        raise UsageError(too_few(count, count == len(labels)))
    rng = np.random.default_rng(seed)
    names = np.unique(labels)
    order = names[rng.permutation(count)]

    folds = []
    for held_out in np.array_split(order, min(FOLDS, count)):
        others = order[~np.isin(order, held_out)]
        training, validating = _without_calibration(others, validation)
        folds.append(_rows_of(labels, training, validating, held_out))

    training, validating = _without_calibration(order, validation)
    final = _rows_of(labels, training, validating, order[:0])
    return Plan(final, tuple(folds), count)


def _without_calibration(order: np.ndarray, validation: float) -> tuple[np.ndarray, np.ndarray]:
    """Groups in some order -> those that train, and those that validate."""
    n_validation = _validation_count(len(order), validation)
    n_validation = min(n_validation, len(order) - 1)
    return order[n_validation:], order[:n_validation]


def _rows_of(labels: np.ndarray, training: np.ndarray, validation: np.ndarray, calibration: np.ndarray) -> Split:
    """The rows of these groups."""
    return Split(
        training=np.flatnonzero(np.isin(labels, training)),
        validation=np.flatnonzero(np.isin(labels, validation)),
        calibration=np.flatnonzero(np.isin(labels, calibration)),
    )


def _labels(n: int, groups: np.ndarray | None) -> np.ndarray:
    """A group number for each of ``n`` rows."""
    return np.arange(n) if groups is None else np.asarray(groups)


def too_few(count: int, single: bool) -> str:
    """Why so few groups (images, if each is a group of its own) cannot be divided."""
    what = "different images" if single else "groups of images"
    return f"too few {what}, {count}: one each is needed to train, validate and calibrate, and about 20 to be of use"


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


def _parts(order: np.ndarray, calibration: float, validation: float, single: bool = True) -> Split:
    """Groups in some order -> which of them train, validate and calibrate."""
    n = len(order)
    if n < 3:
        raise UsageError(too_few(n, single))

    n_cal = max(1, round(calibration * n))
    n_cal = min(n_cal, MOST_CALIBRATION, n - 2)
    n_val = min(_validation_count(n, validation), n - n_cal - 1)

    return Split(
        training=np.sort(order[n_cal + n_val :]),
        validation=np.sort(order[n_cal : n_cal + n_val]),
        calibration=np.sort(order[:n_cal]),
    )


def _validation_count(n: int, validation: float) -> int:
    """How many of ``n`` groups validate."""
    # statistics of held-out errors need a handful of rows even when there are few in all
    wanted = max(1, round(validation * n), min(5, n // 5))
    return min(wanted, MOST_VALIDATION)


Some = TypeVar("Some", list[Any], np.ndarray)


def evenly(items: Some, most: int) -> Some:
    """At most ``most`` items of a sequence, evenly spread: every second or third of it, and so on."""
    step = max(1, math.ceil(len(items) / most))
    return items[::step]

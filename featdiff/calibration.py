"""Held-out in-domain scores -> conformal p-values and thresholds. Knows no images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .exceptions import UsageError

# k / (n + 1) and the same rate written as a decimal may differ in the last bits
_SLACK = 1e-9
# The same where p-values are float32; two of them are never so close, for n is at most 10,000.
_ROUNDING = 1e-7
#: Rows that calibrate and validate, at most: more would not help.
MOST_CALIBRATION, MOST_VALIDATION = 10_000, 2_000

Array = TypeVar("Array", np.ndarray, Tensor)


def p_values(scores: np.ndarray, calibration: np.ndarray) -> np.ndarray:
    """Split-conformal p-values: (1 + #{calibration >= score}) / (n + 1), in (0, 1]; small = out-of-distribution.

    If an image comes from the distribution of the calibration images, P(p <= a) <= a for every a (Vovk et al. 2005;
    Bates et al. 2023, arXiv 2104.08279). The guarantee is on average over calibration sets.

    Parameters
    ----------
    scores : (B,), higher = more OOD. NaN gives NaN.
    calibration : (n,) sorted ascending, scores of in-domain images that took no part in training.
    """
    at_least = len(calibration) - np.searchsorted(calibration, scores, side="left")
    return np.where(np.isnan(scores), np.nan, (1 + at_least) / (len(calibration) + 1))


def tensor_p_values(scores: Tensor, calibration: Tensor) -> Tensor:
    """The same on tensors of any device: (B,), (n,) float32 -> (B,) float32. Can be traced for export."""
    at_least = (calibration >= scores[:, None]).sum(1)
    return torch.where(scores.isnan(), scores, (1 + at_least) / (len(calibration) + 1))


def flagged(p: Array, fpr: float) -> Array:
    """p-values (B,) -> (B,) bool, ``p <= fpr``; NaN is not flagged."""
    return p <= fpr + _ROUNDING


def check_fpr(fpr: float, n: int | None = None) -> None:
    """Refuse a false-alarm rate that ``n`` calibration scores cannot support (less than 1 / (n + 1)).

    Raises
    ------
    UsageError
        Naming the number of calibration images that would do.
    """
    if not isinstance(fpr, int | float | np.floating) or not 0 < fpr < 1:
        raise UsageError(f"the false-alarm rate (--fpr) must lie between 0 and 1, not {fpr}")
    if n is not None and (fpr + _SLACK) * (n + 1) < 1:
        needed = math.ceil(1 / (fpr + _SLACK)) - 1
        raise UsageError(
            f"--fpr {fpr:g} needs at least {needed} held-out images for calibration, and there are {n}: "
            f"train on more images, or ask for --fpr {math.ceil(1000 / (n + 1)) / 1000:g} or more"
        )


def threshold(calibration: np.ndarray, fpr: float) -> float:
    """The largest score that is not flagged at this rate: ``score > threshold`` is the same as ``p <= fpr``."""
    check_fpr(fpr, len(calibration))
    n = len(calibration)
    allowed = int(flagged(np.arange(1, n + 1) / (n + 1), fpr).sum()) - 1  # calibration scores that may lie at or above
    return float(calibration[n - 1 - allowed])


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

"""Scores of several encoders -> one score, higher where any of them, or all together, find an image strange."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..verdicts.calibration import Calibration

#: Ways to join.
JOINS = Z_SUM, MIN_P = ("z-sum", "min-p")


def join(how: str, z: np.ndarray, calibrations: Sequence[Calibration], calibrates: bool = False) -> np.ndarray:
    """Join the scores of encoders, on a scale that is still to be calibrated.

    Parameters
    ----------
    how : {"z-sum", "min-p"}
    z : ndarray of shape (B, encoders)
        Each encoder's own score, in standard deviations of its calibration images.
    calibrations : sequence of Calibration
        Of each encoder, on the same images.
    calibrates : bool, default False
        These are the calibration images themselves, in any order.

    Returns
    -------
    ndarray of shape (B,)
        Higher = more OOD; NaN where one of the scores is.
    """
    return z_sum(z) if how == Z_SUM else min_p(z, calibrations, calibrates)


def z_sum(z: np.ndarray) -> np.ndarray:
    """The sum of standardised scores (B, encoders) over the root of their number."""
    summed: np.ndarray = z.sum(1) / math.sqrt(z.shape[1])
    return summed


def min_p(z: np.ndarray, calibrations: Sequence[Calibration], calibrates: bool = False) -> np.ndarray:
    """The smallest p-value of the encoders as a score, -log p, that goes on where p-values end.

    It is a score and no p-value: the smallest of several is too small too often, and is calibrated on its own. A new
    image's rank is counted among the calibration images and itself. A calibration image would have the same rank or the
    next one, according to where the new one stands; it is given the stranger of the two, its rank among the calibration
    images. So its score is never below the one that makes both exchangeable, and the joint p-value is never below that
    of full conformal prediction (Vovk et al. 2005), which holds exactly.

    Of two images with one p-value that with more standard deviations has the higher score.

    Parameters
    ----------
    z, calibrations, calibrates
        As for :func:`join`.

    Returns
    -------
    ndarray of shape (B,)
    """
    columns = [_strangeness(z[:, i], calibration, calibrates) for i, calibration in enumerate(calibrations)]
    highest: np.ndarray = np.max(columns, axis=0)
    return highest


def _strangeness(z: np.ndarray, calibration: Calibration, calibrates: bool) -> np.ndarray:
    """-log p (B,), and between two values of p by standard deviations."""
    n, groups = len(calibration), calibration.groups
    reached = n - np.searchsorted(calibration.scores, z, side="left")
    if calibrates:
        reached = reached - 1  # but for itself
    ranks = np.log1p(groups / n * np.arange(n + 1))
    step = np.diff(ranks, prepend=0.0)  # from each p-value to the next smaller one

    inside = step[reached] * (0.5 + 0.5 * np.tanh(z / 2))
    with np.errstate(invalid="ignore"):  # a failed computation stays NaN
        beyond = np.logaddexp(0.0, z)  # smaller than the smallest p-value: no end
    return math.log1p(groups) - ranks[reached] + np.where(reached > 0, inside, beyond)

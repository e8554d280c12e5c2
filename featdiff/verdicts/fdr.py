"""p-values of a batch of images -> flags among which the share of false ones is bounded. Knows no images."""

from __future__ import annotations

import math

import numpy as np

from ..exceptions import UsageError
from .calibration import ROUNDING


def check_fdr(level: object) -> float:
    """A false discovery rate (``UsageError`` unless it lies between 0 and 1)."""
    if not isinstance(level, int | float | np.floating) or not 0 < level < 1:
        raise UsageError(f"fdr, the share of false flags, must lie between 0 and 1, not {level}", argument="fdr")
    return float(level)


def fdr_threshold(p_values: np.ndarray, level: float, count: int | None = None) -> float:
    """The largest p-value of a batch that is flagged by the rule of Benjamini and Hochberg (1995).

    Let p(1) <= ... <= p(N). All up to p(k) are flagged, for the largest k with p(k) <= level k / N. On average over
    batches and held-out sets, at most the share ``level`` of the flagged images is normal; of a batch without any
    strange image, anything is flagged with a probability of at most ``level``. That holds although all p-values share
    one calibration set (Bates et al. 2023, arXiv 2104.08279, theorem 2), where each image is a group of its own.

    Parameters
    ----------
    p_values : ndarray of shape (N,)
        In (0, 1], in any order; NaN for images without a score, which do not count.
    level : float
        In (0, 1).
    count : int, optional
        How many images the batch has, where ``p_values`` are only those up to ``level``, above which none is flagged.

    Returns
    -------
    float
        0 if nothing is flagged.

    Raises
    ------
    UsageError
        A level outside (0, 1).

    Examples
    --------
    >>> import numpy as np
    >>> from featdiff.verdicts.fdr import fdr_threshold
    >>> fdr_threshold(np.array([0.9, 0.01, 0.04, 0.5, np.nan]), 0.1)
    0.04
    >>> fdr_threshold(np.array([0.9, 0.3]), 0.1)
    0.0
    """
    check_fdr(level)
    values = np.sort(p_values[~np.isnan(p_values)])
    total = max(1, len(values) if count is None else count)
    within = np.flatnonzero(values <= level * np.arange(1, len(values) + 1) / total + ROUNDING)
    return float(values[within[-1]]) if len(within) else 0.0


def fewest_flags(count: int, level: float, groups: int) -> int:
    """How many images of a batch must stand out at once, lest none be flagged.

    No p-value is below 1 / (groups + 1), so that many images and few held-out ones ask for several flags together.

    Parameters
    ----------
    count : int
        Images of the batch.
    level : float
        In (0, 1).
    groups : int
        Held-out images, or groups of them.

    Examples
    --------
    >>> from featdiff.verdicts.fdr import fewest_flags
    >>> fewest_flags(1000, 0.1, 1600), fewest_flags(1000, 0.1, 99)
    (7, 100)
    """
    return max(1, math.ceil(count / ((groups + 1) * (level + ROUNDING))))

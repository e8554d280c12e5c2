"""Counts of flagged images -> shares with intervals. Knows no images."""

from __future__ import annotations

import math

from .calibration import check_supported


def interval_of_share(share: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of a share that was counted (Clopper and Pearson 1934).

    Parameters
    ----------
    share : float
        In [0, 1].
    n : float
        Of how many independent things. Of images in groups, the number of groups: as if those of a group were one.
    confidence : float, default 0.95

    Returns
    -------
    low, high : float
        In [0, 1]; 0 and 1 without any.

    Examples
    --------
    >>> [round(end, 3) for end in interval_of_share(0.05, 100)]
    [0.016, 0.113]
    """
    from scipy.stats import beta  # type: ignore[import-untyped]

    rest = (1 - confidence) / 2
    hits = share * n
    low = float(beta.ppf(rest, hits, n - hits + 1)) if hits > 0 else 0.0
    high = float(beta.ppf(1 - rest, hits + 1, n - hits)) if hits < n else 1.0
    return low, high


def range_of_rate(fpr: float, groups: int, confidence: float = 0.95) -> tuple[float, float]:
    """Where the false-alarm rate of a calibration set lies, which is ``fpr`` only on average over such sets.

    With G held-out images, it is a draw of Beta(l, G + 1 - l), for l = floor(fpr (G + 1)) (Vovk 2012, arXiv 1209.2673).

    Parameters
    ----------
    fpr : float
        Not below 1 / (groups + 1).
    groups : int
        Held-out images, or groups of them.
    confidence : float, default 0.95

    Returns
    -------
    low, high : float
        In [0, 1].

    Raises
    ------
    UsageError
        A rate that so few cannot support.

    Examples
    --------
    >>> [round(end, 3) for end in range_of_rate(0.05, 1000)]
    [0.037, 0.064]
    """
    from scipy.stats import beta

    check_supported(fpr, groups)
    below = max(1, min(math.floor(fpr * (groups + 1) + 1e-6), groups))
    rest = (1 - confidence) / 2
    return float(beta.ppf(rest, below, groups + 1 - below)), float(beta.ppf(1 - rest, below, groups + 1 - below))

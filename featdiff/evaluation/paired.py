"""Two scores of the same images -> how far apart their AUROC, FPR95 and verdicts are, with intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..exceptions import UsageError
from .metrics import auroc, fpr_at_tpr
from .resamples import draw_counts, percentiles, resampled_fprs


@dataclass(frozen=True)
class Difference:
    """A number of two models, A and B, and how far apart they are.

    Parameters
    ----------
    values : (float, float)
        Of A and of B.
    interval : (float, float)
        95 % interval of B - A.
    """

    values: tuple[float, float]
    interval: tuple[float, float]

    @property
    def difference(self) -> float:
        """B - A."""
        return self.values[1] - self.values[0]

    @property
    def is_shown(self) -> bool:
        """Whether the interval leaves out 0."""
        low, high = self.interval
        return low > 0 or high < 0


@dataclass(frozen=True)
class Changes:
    """Verdicts of two models, A and B, on the same images.

    Parameters
    ----------
    only_a, only_b : int
        Images that only A, or only B, flags.
    p : float
        How likely so uneven a pair of counts, or a more uneven one, is where both flag at the same rate: the exact
        test of McNemar (1947).
    """

    only_a: int
    only_b: int
    p: float

    @classmethod
    def of(cls, flags_a: np.ndarray, flags_b: np.ndarray) -> Changes:
        """From the flags (n,) of both."""
        from scipy.stats import binomtest  # type: ignore[import-untyped]

        only_a = int((flags_a & ~flags_b).sum())
        only_b = int((flags_b & ~flags_a).sum())
        p = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
        return cls(only_a, only_b, p)


def auroc_difference(
    id_scores: tuple[np.ndarray, np.ndarray],
    ood_scores: tuple[np.ndarray, np.ndarray],
    id_groups: np.ndarray | None = None,
    ood_groups: np.ndarray | None = None,
    level: float = 0.95,
) -> Difference:
    """AUROC of two scores of the same images, and the interval of the difference by DeLong et al.

    An AUROC is the mean, over OOD images, of the share of ID images below each; and over ID images likewise. The
    differences of these shares between both scores vary over either set, which gives the variance of the difference of
    the AUROCs (DeLong, DeLong and Clarke-Pearson 1988, Biometrics 44). The shares come from ranks (Sun and Xu 2014,
    IEEE Signal Processing Letters 21), in the time of a sort. With groups, those of one group are added first
    (Obuchowski 1997, Biometrics 53).

    Parameters
    ----------
    id_scores, ood_scores : pairs of ndarrays of shape (n_id,) and (n_ood,)
        By A and by B, in one order of the images; finite, higher = more OOD.
    id_groups, ood_groups : ndarrays of int, optional
        Group of each image, 0 .. G - 1. Default: each counts alone.
    level : float, default 0.95

    Returns
    -------
    Difference
        In shares, -1 .. 1; B is better above 0.

    Raises
    ------
    UsageError
        Scores that are not finite or not paired; fewer than two images, or groups of them, of either kind.

    Examples
    --------
    >>> normal, strange = np.arange(20.0), np.arange(10.0, 30.0)
    >>> found = auroc_difference((normal, normal), (strange, strange + 5))
    >>> round(found.difference, 3), [round(end, 3) for end in found.interval], found.is_shown
    (0.094, [0.024, 0.163], True)
    """
    from scipy.stats import norm

    _check(id_scores, ood_scores)
    shares = [_shares(*scores) for scores in zip(id_scores, ood_scores, strict=True)]
    variance = 0.0
    for side, groups in enumerate((id_groups, ood_groups)):
        variance += _variance_of_mean(shares[1][side] - shares[0][side], groups)

    values = (auroc(id_scores[0], ood_scores[0]), auroc(id_scores[1], ood_scores[1]))
    reach = float(norm.ppf((1 + level) / 2) * np.sqrt(variance))
    difference = values[1] - values[0]
    return Difference(values, (max(-1.0, difference - reach), min(1.0, difference + reach)))


def fpr95_difference(
    id_scores: tuple[np.ndarray, np.ndarray],
    ood_scores: tuple[np.ndarray, np.ndarray],
    id_groups: np.ndarray | None = None,
    ood_groups: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """FPR95 of two scores of the same images, and the bootstrap interval of the difference.

    Images are drawn anew, ID and OOD separately, and each with both its scores; B is better below 0.

    Parameters
    ----------
    id_scores, ood_scores, id_groups, ood_groups, level
        As for :func:`auroc_difference`; whole groups are drawn.
    resamples : int, default 1000
    seed : int, default 0

    Returns
    -------
    Difference

    Raises
    ------
    UsageError
        As for :func:`auroc_difference`.
    """
    _check(id_scores, ood_scores)
    sizes = (len(id_scores[0]), len(ood_scores[0]))
    counts = draw_counts(sizes, resamples, seed, (id_groups, ood_groups))
    by_a, by_b = (resampled_fprs(*scores, *counts) for scores in zip(id_scores, ood_scores, strict=True))

    values = (fpr_at_tpr(id_scores[0], ood_scores[0]), fpr_at_tpr(id_scores[1], ood_scores[1]))
    return Difference(values, percentiles(by_b - by_a, level))


def _check(id_scores: tuple[np.ndarray, np.ndarray], ood_scores: tuple[np.ndarray, np.ndarray]) -> None:
    for name, (by_a, by_b) in (("ID", id_scores), ("OOD", ood_scores)):
        if len(by_a) != len(by_b):
            raise UsageError(f"the {name} images have {len(by_a):,} scores by A and {len(by_b):,} by B")
        if len(by_a) < 2:
            raise UsageError(f"models are compared on at least 2 {name} images, and there are {len(by_a)}")
        if not (np.isfinite(by_a).all() and np.isfinite(by_b).all()):
            raise UsageError(f"the {name} scores are not all numbers")


def _shares(id_scores: np.ndarray, ood_scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each ID image, the share of OOD images above it (n_id,); for each OOD image, that of ID images below it
    (n_ood,). Ties count half."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([id_scores, ood_scores]))
    n_id, n_ood = len(id_scores), len(ood_scores)
    above = 1 - (ranks[:n_id] - rankdata(id_scores)) / n_ood
    below = (ranks[n_id:] - rankdata(ood_scores)) / n_id
    return above, below


def _variance_of_mean(values: np.ndarray, groups: np.ndarray | None) -> float:
    """Of the mean of (n,) values, of which those of a group go together."""
    centred = values - values.mean()
    if groups is not None:
        centred = np.bincount(groups, weights=centred)
    count = len(centred)
    if count < 2:
        raise UsageError("the images are all in one group, which says nothing of how far others would be apart")
    return float((centred**2).sum()) * count / (count - 1) / len(values) ** 2

"""How often each image is drawn in the resamples of a bootstrap, and a score's AUROC and FPR95 in each of them.

Scores are sorted once. A resample is a column of counts, which may serve any number of scores of the same images: their
intervals are then paired.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

# Resamples at once: with more, the sums of 2,000 images no longer fit into a processor's cache.
_AT_ONCE = 64


def draw_counts(
    sizes: Sequence[int],
    resamples: int,
    seed: int | Sequence[int] = 0,
    groups: Sequence[np.ndarray | None] | None = None,
) -> list[np.ndarray]:
    """Draw sets of images anew, each with replacement and as many as it has.

    Parameters
    ----------
    sizes : sequence of int
        Images of each set, 1 or more.
    resamples : int
        R, how often.
    seed : int or sequence of int, default 0
    groups : sequence of ndarrays of int, optional
        For each set the group of each image, 0 .. G - 1: whole groups are drawn. None: each image counts alone.

    Returns
    -------
    list of ndarrays of shape (n, R) of int
        For each set, how often each image is drawn in each resample.
    """
    rng = np.random.default_rng(seed)
    counts = [np.empty((size, resamples), np.uint16) for size in sizes]
    for i in range(resamples):
        for k, drawn in enumerate(counts):
            of_set = None if groups is None else groups[k]
            independent = sizes[k] if of_set is None else int(of_set.max()) + 1
            times = np.bincount(rng.integers(independent, size=independent), minlength=independent)
            drawn[:, i] = times if of_set is None else times[of_set]
    return counts


def resampled_aurocs(
    id_scores: np.ndarray, ood_scores: np.ndarray, id_counts: np.ndarray, ood_counts: np.ndarray
) -> np.ndarray:
    """The AUROC of a score in each resample.

    Parameters
    ----------
    id_scores, ood_scores : ndarrays of shape (n_id,) and (n_ood,)
        Finite; higher = more OOD.
    id_counts, ood_counts : ndarrays of shape (n_id, R) and (n_ood, R) of int
        From :func:`draw_counts`.

    Returns
    -------
    ndarray of shape (R,)
        0 .. 1.
    """
    id_order, ood_order = np.argsort(id_scores), np.argsort(ood_scores)
    below, upto = (np.searchsorted(id_scores[id_order], ood_scores[ood_order], side) for side in ("left", "right"))

    areas = np.empty(id_counts.shape[1])
    for part in _parts(len(areas)):
        normal = _summed(id_counts[:, part][id_order])
        strange = ood_counts[:, part][ood_order]
        twice = normal[below] + normal[upto]  # ties count half
        wins = np.einsum("nr,nr->r", twice, strange, dtype=np.int64)
        areas[part] = wins / 2 / (normal[-1].astype(np.int64) * strange.sum(0, dtype=np.int64))
    return areas


def resampled_fprs(
    id_scores: np.ndarray,
    ood_scores: np.ndarray,
    id_counts: np.ndarray,
    ood_counts: np.ndarray,
    *,
    tpr: float = 0.95,
) -> np.ndarray:
    """:func:`featdiff.evaluation.metrics.fpr_at_tpr` of a score in each resample.

    Parameters
    ----------
    id_scores, ood_scores, id_counts, ood_counts
        As for :func:`resampled_aurocs`.
    tpr : float, default 0.95

    Returns
    -------
    ndarray of shape (R,)
        0 .. 1.
    """
    id_order, ood_order = np.argsort(id_scores), np.argsort(ood_scores)
    id_sorted, ood_sorted = id_scores[id_order], ood_scores[ood_order]

    rates = np.empty(id_counts.shape[1])
    for part in _parts(len(rates)):
        normal = _summed(id_counts[:, part][id_order])
        strange = _summed(ood_counts[:, part][ood_order])
        accepted = np.ceil(tpr * normal[-1] - 1e-9)  # as in fpr_at_tpr
        thresholds = id_sorted[(normal[1:] < accepted).sum(0)]
        passed = np.searchsorted(ood_sorted, thresholds, "right")
        rates[part] = strange[passed, np.arange(len(passed))] / strange[-1]
    return rates


def percentiles(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The ends of the interval that holds the middle ``level`` of the values (R,) of resamples."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _parts(resamples: int) -> Iterator[slice]:
    for start in range(0, resamples, _AT_ONCE):
        yield slice(start, start + _AT_ONCE)


def _summed(counts: np.ndarray) -> np.ndarray:
    """Counts (n, R) of sorted images -> how many were drawn of the first 0, 1 .. n of them (n + 1, R)."""
    sums = np.zeros((len(counts) + 1, counts.shape[1]), np.int32)
    np.cumsum(counts, axis=0, out=sums[1:])
    return sums

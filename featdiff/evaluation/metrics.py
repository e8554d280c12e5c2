"""Scores of in-domain and of OOD images -> AUROC, AUPR and FPR@95TPR, with an interval. Higher score = more OOD."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from ..exceptions import UsageError
from .resamples import draw_counts, percentiles, resampled_aurocs


@dataclass(frozen=True)
class Metrics:
    """How well scores separate in-domain from OOD images.

    Parameters
    ----------
    auroc : float
        P(OOD score > ID score) + half the ties, 0 to 1, higher is better.
    aupr_in : float
        Average precision with ID as the positive class, 0 to 1, higher is better.
    aupr_out : float
        Average precision with OOD as the positive class, 0 to 1, higher is better.
    fpr95 : float
        Share of OOD images accepted at the threshold that accepts 95 % of the ID images, 0 to 1, lower is better.
    auroc_ci : (float, float)
        95 % bootstrap interval of ``auroc``.
    """

    auroc: float
    aupr_in: float
    aupr_out: float
    fpr95: float
    auroc_ci: tuple[float, float]

    def to_dict(self) -> dict[str, object]:
        """As plain numbers, for JSON."""
        return asdict(self) | {"auroc_ci": list(self.auroc_ci)}


def evaluate(
    id_scores: np.ndarray,
    ood_scores: np.ndarray,
    resamples: int = 1000,
    seed: int = 0,
    id_groups: np.ndarray | None = None,
    ood_groups: np.ndarray | None = None,
) -> Metrics:
    """All metrics of two arrays of scores.

    Parameters
    ----------
    id_scores : ndarray of shape (n_id,)
        Scores of in-domain images.
    ood_scores : ndarray of shape (n_ood,)
        Scores of OOD images.
    resamples : int, default 1000
        Bootstrap resamples for the interval.
    seed : int, default 0
        Decides the resamples.
    id_groups, ood_groups : ndarrays of int, optional
        Group of each image, 0 .. G - 1: the interval resamples whole groups, for images of a burst are no independent
        evidence. Default: images.

    Returns
    -------
    Metrics

    Raises
    ------
    UsageError
        An array is empty, or holds NaN or infinite values.

    Examples
    --------
    >>> metrics = evaluate(np.array([0.0, 1.0, 2.0, 3.0]), np.array([2.5, 4.0]))
    >>> metrics.auroc, metrics.fpr95
    (0.875, 0.5)
    """
    from sklearn.metrics import average_precision_score

    for name, scores in (("ID", id_scores), ("OOD", ood_scores)):
        if len(scores) == 0:
            raise UsageError(f"the {name} scores are empty")
        if not np.isfinite(scores).all():
            raise UsageError(f"the {name} scores are not all numbers")

    all_scores = np.concatenate([id_scores, ood_scores])
    is_ood = np.repeat([0, 1], [len(id_scores), len(ood_scores)])
    return Metrics(
        auroc=auroc(id_scores, ood_scores),
        aupr_in=float(average_precision_score(1 - is_ood, -all_scores)),
        aupr_out=float(average_precision_score(is_ood, all_scores)),
        fpr95=fpr_at_tpr(id_scores, ood_scores),
        auroc_ci=bootstrap_auroc(id_scores, ood_scores, resamples, seed, 0.95, id_groups, ood_groups),
    )


def auroc(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Area under the ROC curve.

    Parameters
    ----------
    id_scores : ndarray of shape (n_id,)
        Scores of in-domain images.
    ood_scores : ndarray of shape (n_ood,)
        Scores of OOD images.

    Returns
    -------
    float
        0 to 1, higher is better.
    """
    from sklearn.metrics import roc_auc_score

    is_ood = np.repeat([0, 1], [len(id_scores), len(ood_scores)])
    return float(roc_auc_score(is_ood, np.concatenate([id_scores, ood_scores])))


def fpr_at_tpr(id_scores: np.ndarray, ood_scores: np.ndarray, tpr: float = 0.95) -> float:
    """Share of OOD images that are accepted when a given share of the ID images is. ID is the positive class.

    Parameters
    ----------
    id_scores : ndarray of shape (n_id,)
        Scores of in-domain images.
    ood_scores : ndarray of shape (n_ood,)
        Scores of OOD images.
    tpr : float, default 0.95
        Share of the ID images that are accepted, above 0, at most 1.

    Returns
    -------
    float
        0 to 1, lower is better. The threshold is the smallest that accepts enough ID images; scores equal to it are
        accepted.
    """
    # the small number keeps rounding errors of tpr * n from moving the threshold by one image
    accepted = int(np.ceil(tpr * len(id_scores) - 1e-9))
    threshold = np.sort(id_scores)[accepted - 1]
    return float(np.mean(ood_scores <= threshold))


def bootstrap_auroc(
    id_scores: np.ndarray,
    ood_scores: np.ndarray,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    id_groups: np.ndarray | None = None,
    ood_groups: np.ndarray | None = None,
) -> tuple[float, float]:
    """Percentile interval of the AUROC; ID and OOD images are resampled separately.

    Parameters
    ----------
    id_scores : ndarray of shape (n_id,)
        Scores of in-domain images.
    ood_scores : ndarray of shape (n_ood,)
        Scores of OOD images.
    resamples : int, default 1000
        Number of resamples.
    seed : int, default 0
        Decides the resamples.
    level : float, default 0.95
        Share of the resamples inside the interval, above 0 and below 1.
    id_groups, ood_groups : ndarrays of int, optional
        Group of each image, 0 .. G - 1: whole groups are resampled. Default: images.

    Returns
    -------
    (float, float)
        Lower and upper end.
    """
    sizes = (len(id_scores), len(ood_scores))
    id_counts, ood_counts = draw_counts(sizes, resamples, seed, (id_groups, ood_groups))
    return percentiles(resampled_aurocs(id_scores, ood_scores, id_counts, ood_counts), level)

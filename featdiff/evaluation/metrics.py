"""Two score arrays -> AUROC, AUPR, FPR@95TPR with intervals. Higher score = more OOD. Knows nothing else."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from ..exceptions import UsageError


@dataclass(frozen=True)
class Metrics:
    """Separation of in-domain and OOD scores.

    auroc : P(OOD score > ID score) + half the ties, 0..1, higher is better.
    aupr_in, aupr_out : average precision with ID, or OOD, as the positive class.
    fpr95 : share of OOD images accepted at the threshold that accepts 95 % of ID images, lower is better.
    auroc_ci : 95 % bootstrap interval of ``auroc``.
    """

    auroc: float
    aupr_in: float
    aupr_out: float
    fpr95: float
    auroc_ci: tuple[float, float]

    def to_dict(self) -> dict[str, object]:
        """As plain numbers, for JSON."""
        return asdict(self) | {"auroc_ci": list(self.auroc_ci)}


def evaluate(id_scores: np.ndarray, ood_scores: np.ndarray, resamples: int = 1000, seed: int = 0) -> Metrics:
    """All metrics of two score arrays (n_id,), (n_ood,).

    Raises
    ------
    UsageError
        An array is empty, or holds NaN or infinite values.
    """
    from sklearn.metrics import average_precision_score

    for name, scores in (("ID", id_scores), ("OOD", ood_scores)):
        if len(scores) == 0 or not np.isfinite(scores).all():
            raise UsageError(f"the {name} scores are {'empty' if len(scores) == 0 else 'not all numbers'}")
    scores = np.concatenate([id_scores, ood_scores])
    is_ood = np.repeat([0, 1], [len(id_scores), len(ood_scores)])
    return Metrics(
        auroc=auroc(id_scores, ood_scores),
        aupr_in=float(average_precision_score(1 - is_ood, -scores)),
        aupr_out=float(average_precision_score(is_ood, scores)),
        fpr95=fpr_at_tpr(id_scores, ood_scores),
        auroc_ci=bootstrap_auroc(id_scores, ood_scores, resamples, seed),
    )


def auroc(id_scores: np.ndarray, ood_scores: np.ndarray) -> float:
    """Area under the ROC curve, 0..1."""
    from sklearn.metrics import roc_auc_score

    labels = np.repeat([0, 1], [len(id_scores), len(ood_scores)])
    return float(roc_auc_score(labels, np.concatenate([id_scores, ood_scores])))


def fpr_at_tpr(id_scores: np.ndarray, ood_scores: np.ndarray, tpr: float = 0.95) -> float:
    """Share of OOD scores at or below the smallest threshold that keeps ``tpr`` of the ID scores (ID is positive)."""
    kept = np.sort(id_scores)[int(np.ceil(tpr * len(id_scores) - 1e-9)) - 1]
    return float(np.mean(ood_scores <= kept))


def bootstrap_auroc(
    id_scores: np.ndarray, ood_scores: np.ndarray, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the AUROC, resampling ID and OOD images separately.

    Scores are sorted once; each resample is a vector of counts, so the AUROC is a weighted sum over ranks.
    """
    rng = np.random.default_rng(seed)
    values, place = np.unique(np.concatenate([id_scores, ood_scores]), return_inverse=True)
    id_place, ood_place = place[: len(id_scores)], place[len(id_scores) :]
    areas = np.empty(resamples)
    for i in range(resamples):
        id_count = _resampled_counts(rng, id_place, len(values))
        ood_count = _resampled_counts(rng, ood_place, len(values))
        below = np.cumsum(id_count) - id_count / 2  # ties count half
        areas[i] = below @ ood_count / (len(id_scores) * len(ood_scores))
    low, high = np.quantile(areas, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resampled_counts(rng: np.random.Generator, place: np.ndarray, length: int) -> np.ndarray:
    return np.bincount(rng.choice(place, len(place)), minlength=length)

"""Scores of the images that could be read -> a row for every image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .calibration import Calibration
from .results import ERROR, OK, UNREADABLE, Scores

#: Why a row has the status ``error``.
NOT_A_SCORE = "its score is not finite: the model fails on it"


def judge(
    names: Sequence[str],
    positions: Sequence[int] | np.ndarray,
    reasons: Mapping[int, str],
    ood_score: np.ndarray,
    layers: Mapping[str, np.ndarray],
    calibration: Calibration,
    fpr: float,
    notes: Mapping[int, str] | None = None,
    p_values: Mapping[str, np.ndarray] | None = None,
) -> Scores:
    """Compare scores with the calibration, and put them beside the images that have none.

    Parameters
    ----------
    names : sequence of str
        Of all N images (or rows), in their order.
    positions : sequence of int
        Which of them have a score.
    reasons : mapping
        Position of each of the others -> why it has none.
    ood_score : ndarray of shape (n,)
        Of the images at ``positions``.
    layers : mapping of names to ndarrays of shape (n,)
    calibration : Calibration
    fpr : float
        False-alarm rate.
    notes : mapping, optional
        Position of an image that has a score -> what is to be told of it all the same.
    p_values : mapping of names to ndarrays of shape (n,), optional
        Of the scores that ``ood_score`` joins.

    Returns
    -------
    Scores
        Of length N; NaN where there is no score. An image whose score, or that of a layer, is not finite has the status
        ``error`` and is flagged: a failed computation must not pass as ordinary.
    """
    positions = np.asarray(positions, dtype=np.int64)
    failed = ~np.isfinite([ood_score, *layers.values()]).all(axis=0)
    p_value, flags = calibration.flags(np.where(failed, np.nan, ood_score), fpr)
    is_ood = np.zeros(len(names), dtype=bool)
    is_ood[positions] = flags

    texts = {**(notes or {}), **reasons, **dict.fromkeys(positions[failed].tolist(), NOT_A_SCORE)}
    status = np.full(len(names), UNREADABLE, dtype=object)
    status[positions] = np.where(failed, ERROR, OK)

    def spread(values: np.ndarray) -> np.ndarray:
        column = np.full(len(names), np.nan)
        column[positions] = values
        return column

    return Scores(
        path=list(names),
        status=status.tolist(),
        reason=[texts.get(i, "") for i in range(len(names))],
        ood_score=spread(ood_score),
        p_value=spread(p_value),
        is_ood=is_ood,
        layers={name: spread(values) for name, values in layers.items()},
        fpr=fpr,
        p_values={name: spread(values) for name, values in (p_values or {}).items()},
    )

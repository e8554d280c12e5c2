"""Scores of the images that could be read -> a row for every image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .calibration import Calibration
from .results import OK, UNREADABLE, Scores


def judge(
    names: Sequence[str],
    positions: Sequence[int] | np.ndarray,
    reasons: Mapping[int, str],
    ood_score: np.ndarray,
    layers: Mapping[str, np.ndarray],
    calibration: Calibration,
    fpr: float,
    notes: Mapping[int, str] | None = None,
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

    Returns
    -------
    Scores
        Of length N; NaN where there is no score.
    """

    def spread(values: np.ndarray) -> np.ndarray:
        column = np.full(len(names), np.nan)
        column[positions] = values
        return column

    texts = {**(notes or {}), **reasons}
    score = spread(ood_score)
    p_value, is_ood = calibration.flags(score, fpr)
    return Scores(
        path=list(names),
        status=[UNREADABLE if i in reasons else OK for i in range(len(names))],
        reason=[texts.get(i, "") for i in range(len(names))],
        ood_score=score,
        p_value=p_value,
        is_ood=is_ood,
        layers={name: spread(values) for name, values in layers.items()},
        fpr=fpr,
    )

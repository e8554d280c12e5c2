"""A fitted estimator and ordinary rows from elsewhere -> the same estimator with a calibration from these."""

from __future__ import annotations

import copy

import numpy as np
from sklearn.utils.validation import check_is_fitted, validate_data

from ..data.groups import Groups, check_groups
from ..exceptions import UsageError
from ..verdicts.calibration import Calibration, check_fpr
from .estimator import FeatureDiffusion, group_rows
from .estimator_checks import first_of_each, row_digest
from .estimator_scores import PreparedRows
from .recalibration import Recalibration, changes, check_enough
from .soundness import check_spread


def recalibrate_rows(
    estimator: FeatureDiffusion, X: object, *, fpr: float | None = None, groups: Groups | None = None
) -> Recalibration[FeatureDiffusion]:
    """Calibrate a fitted estimator anew, as :func:`featdiff.detectors.recalibration.recalibrate` does a detector.

    Parameters
    ----------
    estimator : FeatureDiffusion
        Fitted; it stays as it is.
    X : array of shape (n, d)
        Finite numbers: ordinary rows of the new place, which took no part in training. The estimator keeps nothing
        that would tell.
    fpr : float, optional
        False-alarm rate of the new estimator; default: that of the old one.
    groups : "auto", "none", or sequence of length n, optional
        As for :meth:`featdiff.FeatureDiffusion.fit`.

    Returns
    -------
    Recalibration

    Raises
    ------
    ValueError
        Rows with NaN, or of another width.
    UsageError
        Too few different rows for ``fpr``.
    FeatdiffError
        Scores without spread, or that are not finite.

    Warns
    -----
    LargeShift
        The old calibration flags most of the rows.
    NearCopiesFound
        Near-copies were taken as groups without being asked for.

    Examples
    --------
    >>> rows = np.random.default_rng(0).normal(size=(400, 8))
    >>> estimator = FeatureDiffusion(hidden_max=16, recipe={"epochs": 2}).fit(rows[:300])
    >>> changed = recalibrate_rows(estimator, 1.2 * rows[300:], fpr=0.1)
    >>> len(changed.detector.calibration_), changed.fpr
    (100, 0.1)
    """
    check_groups(groups)
    check_is_fitted(estimator)
    rows = validate_data(estimator, X, dtype=np.float32, reset=False)
    rate = estimator.fpr_ if fpr is None else check_fpr(fpr)
    digests = [row_digest(row) for row in rows]
    different = first_of_each(digests)
    features = PreparedRows(rows, different, estimator.heads_)
    grouping = group_rows(features, digests, estimator.heads_, groups, divided=False)
    count = grouping.count or len(different)
    check_enough(rate, count, grouping, "rows")

    scores, _ = estimator.heads_.score(rows[different])
    if not np.isfinite(scores).all():
        bad = int((~np.isfinite(scores)).sum())
        raise UsageError(f"the scores of {bad:,} of the rows are not finite, so that they cannot calibrate anything")
    check_spread(scores)

    other = copy.copy(estimator)
    other.calibration_ = Calibration(scores, count)
    other.fpr, other.fpr_ = rate, rate
    other.grouping_ = grouping
    other.offset_ = other._offset(rows[different])

    return changes(estimator, other, scores, rate, len(rows) - len(different), grouping, [], "rows")

"""Feature diffusion on rows of numbers as a detector of PyOD (extra ``pyod``)."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import clone
from sklearn.utils.validation import check_array, check_is_fitted

from ..exceptions import UsageError
from .estimator import FeatureDiffusion

try:
    from pyod.models.base import BaseDetector
except ImportError:
    raise UsageError("PyOD is not installed: pip install 'featdiff[pyod]'") from None


class PyodDetector(BaseDetector):  # type: ignore[misc]
    """:class:`featdiff.FeatureDiffusion` with the names and signs of PyOD: 1 is an outlier, higher is stranger.

    PyOD's threshold is a quantile of the scores of ``fit``'s own rows, so ``contamination`` is the share of *those*
    that is flagged, and nothing is promised for new rows. For a false-alarm rate that holds on new rows, use
    ``estimator_.p_values``, which come from held-out rows.

    Parameters
    ----------
    contamination : float, default 0.1
        Share of the rows of ``fit`` that are labelled 1, in (0, 0.5].
    estimator : FeatureDiffusion, optional
        What is cloned and fitted; default: one with its own defaults.

    Attributes
    ----------
    decision_scores_ : ndarray of shape (n,)
        ``ood_score`` of the rows of ``fit``, which look a little more ordinary than new ones.
    labels_ : ndarray of shape (n,), int
        1 where these are above ``threshold_``, else 0.
    threshold_ : float
    estimator_ : FeatureDiffusion
        The fitted estimator.

    Raises
    ------
    UsageError
        Too few rows, or settings that contradict each other.

    Examples
    --------
    >>> import numpy as np
    >>> from featdiff import FeatureDiffusion
    >>> rows = np.random.default_rng(0).normal(size=(200, 6))
    >>> small = FeatureDiffusion(hidden_max=16, recipe={"epochs": 2})
    >>> detector = PyodDetector(contamination=0.05, estimator=small).fit(rows)
    >>> int(detector.labels_.sum()), detector.predict(np.full((1, 6), 50.0))
    (10, array([1]))
    """

    def __init__(self, contamination: float = 0.1, estimator: FeatureDiffusion | None = None) -> None:
        super().__init__(contamination=contamination)
        self.estimator = estimator

    def fit(self, X: object, y: object = None) -> PyodDetector:
        """Fit on rows ``X`` of shape (n, d); ``y`` is ignored."""
        rows = check_array(X, dtype=np.float32)
        self._set_n_classes(y)
        self.estimator_ = clone(self.estimator if self.estimator is not None else FeatureDiffusion()).fit(rows)
        self.decision_scores_ = self.decision_function(rows)
        self._process_decision_scores()
        return self

    def decision_function(self, X: object) -> np.ndarray:
        """Rows (n, d) -> ``ood_score`` (n,), higher = stranger."""
        check_is_fitted(self, ["estimator_"])
        scores: Any = self.estimator_.score_samples(check_array(X, dtype=np.float32))
        return np.asarray(-scores, dtype=np.float64)

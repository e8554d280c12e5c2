"""The detector of PyOD, by PyOD's own conventions and tools."""

from __future__ import annotations

import numpy as np
import pytest
from pyod.models.base import BaseDetector
from pyod.models.knn import KNN
from pyod.utils.data import generate_data
from pyod.utils.utility import check_detector, standardizer
from sklearn.base import clone
from sklearn.metrics import roc_auc_score

from featdiff import FeatureDiffusion
from featdiff.detectors.pyod_detector import PyodDetector

SMALL = FeatureDiffusion(hidden_max=32, recipe={"epochs": 5, "min_steps": 100})
SHARE = 0.1


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """PyOD's own example: 200 rows and 100 others, a tenth of them outliers (X, X_test, y, y_test)."""
    return generate_data(n_train=200, n_test=100, n_features=6, contamination=SHARE, random_state=42)


@pytest.fixture(scope="module")
def detector(data: tuple[np.ndarray, ...]) -> PyodDetector:
    return PyodDetector(contamination=SHARE, estimator=SMALL).fit(data[0])


def test_it_is_a_detector_of_pyod(detector: PyodDetector) -> None:
    assert isinstance(detector, BaseDetector)
    check_detector(detector)


def test_attributes_after_fit(detector: PyodDetector, data: tuple[np.ndarray, ...]) -> None:
    """As in the tests of PyOD's own detectors."""
    assert detector.decision_scores_.shape == (200,)
    assert set(detector.labels_) == {0, 1}
    assert detector.labels_.sum() == 20
    assert np.array_equal(detector.labels_, detector.decision_scores_ > detector.threshold_)
    assert np.array_equal(detector.decision_function(data[0]), detector.decision_scores_)


def test_it_finds_the_outliers(detector: PyodDetector, data: tuple[np.ndarray, ...]) -> None:
    _, X_test, y, y_test = data
    assert roc_auc_score(y, detector.decision_scores_) > 0.9
    assert roc_auc_score(y_test, detector.decision_function(X_test)) > 0.9
    assert ((detector.predict(X_test) == 1) == (detector.decision_function(X_test) > detector.threshold_)).all()


def test_what_pyod_makes_of_the_scores(detector: PyodDetector, data: tuple[np.ndarray, ...]) -> None:
    X_test = data[1]
    for method in ("linear", "unify"):
        shares = detector.predict_proba(X_test, method=method)
        assert shares.shape == (100, 2)
        assert shares.min() >= 0 and shares.max() <= 1
    labels, confidence = detector.predict(X_test, return_confidence=True)
    assert labels.shape == confidence.shape == (100,)
    assert confidence.min() >= 0 and confidence.max() <= 1


def test_scores_are_those_of_the_estimator(detector: PyodDetector, data: tuple[np.ndarray, ...]) -> None:
    """With PyOD's sign."""
    X, X_test, *_ = data
    alone = clone(SMALL).fit(X.astype(np.float32))
    assert np.allclose(detector.decision_function(X_test), -alone.score_samples(X_test), atol=1e-6)
    assert detector.estimator_.p_values(X_test).shape == (100,)


def test_parameters_and_clones(detector: PyodDetector) -> None:
    again = clone(detector)
    assert again.get_params()["contamination"] == SHARE
    assert again.get_params()["estimator__hidden_max"] == 32
    assert again.set_params(contamination=0.2).contamination == 0.2
    assert not hasattr(again, "estimator_")
    assert SMALL.get_params()["hidden_max"] == 32 and not hasattr(SMALL, "calibration_")  # the given one is not fitted


def test_it_joins_others_in_an_ensemble(detector: PyodDetector, data: tuple[np.ndarray, ...]) -> None:
    X, X_test, _, y_test = data
    both = [each.decision_function(X_test) for each in (detector, KNN(contamination=SHARE).fit(X))]
    joined = standardizer(np.column_stack(both)).mean(axis=1)
    assert roc_auc_score(y_test, joined) > 0.9


def test_what_is_refused(detector: PyodDetector, data: tuple[np.ndarray, ...]) -> None:
    with pytest.raises(ValueError, match="features"):
        detector.decision_function(data[1][:, :3])
    with pytest.raises(ValueError, match="NaN"):
        detector.predict(np.full((1, 6), np.nan))
    with pytest.raises(ValueError, match="contamination"):
        PyodDetector(contamination=0.9)
    with pytest.raises(ValueError, match="fitted"):
        PyodDetector().decision_function(data[0])

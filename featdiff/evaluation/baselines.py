"""Classic methods, fitted on a detector's own features for comparison."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..detectors import BaseDetector, Detector
from ..exceptions import UsageError
from ..scores.registry import BASELINE, Features, Options, Score, baselines, make_scores


@dataclass(frozen=True)
class Baselines:
    """Fitted baselines.

    Parameters
    ----------
    scores : dict of Score
        By the name that tables show, ``baseline_<name>``.
    seconds : dict of float
        Time to fit each of them.
    """

    scores: Mapping[str, Score]
    seconds: Mapping[str, float]

    @torch.inference_mode()
    def __call__(self, features: Tensor) -> dict[str, np.ndarray]:
        """Features (B, D) -> scores (B,) by name, float64, higher = more OOD."""
        values = {}
        for name, score in self.scores.items():
            values[name] = score(features).double().cpu().numpy()
        return values


def fit_baselines(detector: BaseDetector[Any]) -> Baselines:
    """Fit all registered baselines on the training images in the detector's bank.

    Their features are read from the detector's cache, where training left them.

    Parameters
    ----------
    detector : Detector
        Fitted.

    Returns
    -------
    Baselines
        ``baseline_knn``, ``baseline_mahalanobis`` and so on, in the order in which they were registered.

    Raises
    ------
    UsageError
        The cache lacks the features, the detector is of the pixel mode, or there are too few images.
    """
    detector.check_fitted()
    if not isinstance(detector, Detector):
        raise UsageError(f"baselines look at features of one backbone, and this model is of mode {detector.mode}")

    detector = detector.without_local()  # baselines look at pooled features, as training left them
    store = detector.training_store()
    digests = [digest.tobytes() for digest in detector.bank_digests_]
    if missing := sum(digest not in store for digest in digests):
        raise UsageError(
            f"baselines are fitted on the training images, and {missing:,} of their {len(digests):,} features are not "
            f"in the cache {detector.settings.cache_folder}: train once more with this cache (only what is missing is "
            "computed)"
        )
    return fit_on(detector, store.table(digests))


def fit_on(detector: Detector, features: Features) -> Baselines:
    """Fit all registered baselines on given features.

    Parameters
    ----------
    detector : Detector
        Fitted; its extractor made the features.
    features : Features
        In-domain features (N, D).

    Returns
    -------
    Baselines
    """
    options = Options(rows=len(features), backend=detector.settings.backend)
    fitted: dict[str, Score] = {}
    seconds: dict[str, float] = {}
    for name in baselines():
        for score in make_scores(name, detector.extractor_.layout, options):
            start = time.perf_counter()
            label = BASELINE + score.name
            fitted[label] = score.fit(features)
            seconds[label] = time.perf_counter() - start
    return Baselines(fitted, seconds)

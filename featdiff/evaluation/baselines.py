"""Classic methods fitted on a detector's own features, to be printed beside it."""

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
        What fitting each took.
    """

    scores: Mapping[str, Score]
    seconds: Mapping[str, float]

    @torch.inference_mode()
    def __call__(self, features: Tensor) -> dict[str, np.ndarray]:
        """Rows of features (B, D) -> scores (B,) by name, higher = more OOD."""
        return {name: score(features).double().cpu().numpy() for name, score in self.scores.items()}


def fit_baselines(detector: BaseDetector[Any]) -> Baselines:
    """Fit everything that is registered as a baseline on the training images whose features the detector keeps.

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
        The cache does not hold the features any more, the detector does not look at features, or there are too few.
    """
    detector.check_fitted()
    if not isinstance(detector, Detector):
        raise UsageError("baselines look at features, and this model at pixels: train one of mode feature")

    store = detector.feature_store()
    digests = [digest.tobytes() for digest in detector.bank_digests_]
    if missing := sum(digest not in store for digest in digests):
        raise UsageError(
            f"baselines are fitted on the training images, and {missing:,} of their {len(digests):,} features are not "
            f"in the cache {detector.settings.cache_folder}: train once more with this cache (only what is missing is "
            "computed)"
        )
    return fit_on(detector, store.table(digests))


def fit_on(detector: Detector, features: Features) -> Baselines:
    """The same on in-domain features (N, D) of this detector's extractor."""
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

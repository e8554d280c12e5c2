"""Baselines and metrics against another project's: pytorch-ood (extra ``bench``), on the same features."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from featdiff import Detector
from featdiff.evaluation.baselines import fit_baselines
from featdiff.evaluation.metrics import evaluate
from featdiff.scores.gaussian import Mahalanobis, moments

detectors = pytest.importorskip("pytorch_ood.detector")
judges = pytest.importorskip("pytorch_ood.metrics")


@pytest.fixture(scope="module")
def features(tiny_detector: Detector) -> tuple[Tensor, Tensor]:
    """Features of the in-domain images that the detector keeps, and of strangers."""
    known = tiny_detector.feature_store().table([digest.tobytes() for digest in tiny_detector.bank_digests_])[:]
    noise = torch.randn(known.shape, generator=torch.Generator().manual_seed(0))
    return known, known + 0.3 * known.std(0) * noise


def last_stage(detector: Detector, features: Tensor) -> Tensor:
    return features[:, detector.extractor_.layout.last_stage.columns]


def fitted(kind: Any, vectors: Tensor, **arguments: Any) -> Any:
    return kind(None, **arguments).fit_features(vectors, torch.zeros(len(vectors), dtype=torch.long))


def test_knn(tiny_detector: Detector, features: tuple[Tensor, Tensor]) -> None:
    known, strange = features
    other = fitted(detectors.KNN, last_stage(tiny_detector, known), k=5)
    ours = fit_baselines(tiny_detector)(strange)["baseline_knn"]
    np.testing.assert_allclose(ours, other.predict_features(last_stage(tiny_detector, strange)), rtol=1e-4)


def test_mahalanobis() -> None:
    """Theirs is not shrunk and has another scale: with many vectors, the order of images is the same."""
    source = torch.Generator().manual_seed(1)
    scales = torch.linspace(0.5, 2, 12)  # far from singular, where shrinkage matters
    known, fresh = (torch.randn(n, 12, generator=source) * scales for n in (5000, 200))
    other = fitted(detectors.Mahalanobis, known).predict_features(fresh)
    ours = Mahalanobis(12).fit(moments([known], 12))(fresh)
    assert spearmanr(ours, other).statistic > 0.9995


def test_metrics() -> None:
    """On scores that overlap and tie. Their FPR95 takes strangers for positive: ours with sets and sign swapped."""
    rng = np.random.default_rng(0)
    scores = [np.round(rng.normal(mean, 1, n), 1) for mean, n in ((0, 400), (1, 300))]
    judge = judges.OODMetrics()
    for values, label in zip(scores, (0, -1), strict=True):
        judge.update(torch.from_numpy(values), torch.full((len(values),), label))
    theirs, ours = judge.compute(), evaluate(*scores)
    assert ours.auroc == pytest.approx(theirs["AUROC"], abs=1e-6)
    assert ours.aupr_in == pytest.approx(theirs["AUPR-IN"], abs=0.01)  # theirs interpolates
    assert ours.aupr_out == pytest.approx(theirs["AUPR-OUT"], abs=0.01)
    assert evaluate(-scores[1], -scores[0]).fpr95 == pytest.approx(theirs["FPR95TPR"], abs=1e-6)

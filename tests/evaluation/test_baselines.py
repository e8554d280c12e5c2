"""Baselines, each against an independent computation on the same features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.covariance import OAS
from sklearn.neighbors import NearestNeighbors

from featdiff import Detector
from featdiff.evaluation.baselines import Baselines, fit_baselines, fit_on
from featdiff.evaluation.protocols import evaluate_detector
from featdiff.exceptions import UsageError
from featdiff.features.store import FeatureStore

Folders = dict[str, Path]


@pytest.fixture(scope="module")
def parts(tiny_detector: Detector) -> tuple[np.ndarray, np.ndarray, Baselines]:
    """Features of the in-domain images that the detector keeps, of fresh ones, and baselines fitted on the former."""
    table = tiny_detector.feature_store().table([digest.tobytes() for digest in tiny_detector.bank_digests_])
    bank = table[:]
    fresh = bank + 0.1 * bank.std(0) * torch.randn(bank.shape, generator=torch.Generator().manual_seed(0))
    return bank.numpy(), fresh.numpy(), fit_baselines(tiny_detector)


def unit(x: np.ndarray) -> np.ndarray:
    return x[:, 80:176] / np.linalg.norm(x[:, 80:176], axis=1, keepdims=True)


def normal(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)


def test_knn_is_the_fifth_distance_of_scikit_learn(parts: tuple[np.ndarray, np.ndarray, Baselines]) -> None:
    bank, fresh, baselines = parts
    expected = NearestNeighbors(n_neighbors=5).fit(unit(bank)).kneighbors(unit(fresh))[0][:, 4]
    np.testing.assert_allclose(baselines(torch.from_numpy(fresh))["baseline_knn"], expected, rtol=1e-3)


def test_mahalanobis_is_that_of_scikit_learn(parts: tuple[np.ndarray, np.ndarray, Baselines]) -> None:
    """On the last stage, on every stage, and on all joined; shrunk as by OAS."""
    bank, fresh, baselines = parts
    found = baselines(torch.from_numpy(fresh))
    stages = {"layer1": slice(0, 32), "layer2": slice(32, 80), "layer4": slice(80, 176)}

    def joined(x: np.ndarray) -> np.ndarray:
        return np.concatenate([normal(x[:, part]) for part in stages.values()], 1)

    views: dict[str, Any] = {"baseline_mahalanobis": unit, "baseline_mahalanobis_all": joined}
    views |= {f"baseline_mahalanobis_{name}": lambda x, part=part: normal(x[:, part]) for name, part in stages.items()}
    for name, view in views.items():
        expected = OAS().fit(view(bank).astype(np.float64)).mahalanobis(view(fresh).astype(np.float64))
        np.testing.assert_allclose(found[name], expected, rtol=2e-2, err_msg=name)


def test_pca_residual_vanishes_inside_and_grows_outside(parts: tuple[np.ndarray, np.ndarray, Baselines]) -> None:
    bank, fresh, baselines = parts
    centred = unit(bank) - unit(bank).mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    outside = vectors[:, np.cumsum(values) / values.sum() <= 0.1]
    expected = np.linalg.norm((unit(fresh) - unit(bank).mean(0)) @ outside, axis=1)
    np.testing.assert_allclose(baselines(torch.from_numpy(fresh))["baseline_pca"], expected, rtol=1e-2)


def test_baselines_are_printed_beside_the_detector(tiny_detector: Detector, sample_folders: Folders) -> None:
    sets = {"digits": sample_folders["digits"]}
    alone = evaluate_detector(tiny_detector, sample_folders["test"], sets, ["matched"])
    baselines = fit_baselines(tiny_detector)
    both = evaluate_detector(tiny_detector, sample_folders["test"], sets, ["matched"], baselines=baselines)
    heads, more = alone["pairs"][0]["heads"], both["pairs"][0]["heads"]
    assert {name: more[name] for name in heads} == heads
    assert list(baselines.scores) == [name for name in more if name not in heads]
    assert set(more) - set(heads) == {
        *("baseline_knn", "baseline_mahalanobis", "baseline_mahalanobis_all", "baseline_pca"),
        *("baseline_mahalanobis_layer1", "baseline_mahalanobis_layer2", "baseline_mahalanobis_layer4"),
    }


def test_features_that_are_gone_from_the_cache_are_named(tiny_model: Path, tmp_path: Path) -> None:
    loaded = Detector.from_pretrained(tiny_model, cache=tmp_path)
    with pytest.raises(UsageError, match=r"292 of their 292 features are not in the cache .*train once more"):
        fit_baselines(loaded)


def test_too_few_images(tiny_detector: Detector, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, tiny_detector.extractor_.width)
    with pytest.raises(UsageError, match="at least 5 in-domain images, and there are 0"):
        fit_on(tiny_detector, store.table([]))

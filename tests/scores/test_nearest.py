"""Distances to the nearest in-domain vectors, on seeded features of known layout."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import sklearn.neighbors
import torch
from torch import Tensor

from featdiff.features.layout import LOGITS, PRE_LOGITS, FeatureLayout, Kind
from featdiff.scores.coded import CodedIndex
from featdiff.scores.nearest import NearestNeighbors
from featdiff.scores.registry import Options, make_scores

LAYOUT = FeatureLayout.of(
    {
        ("early", Kind.MEAN): 6,
        ("last", Kind.MEAN): 20,
        (PRE_LOGITS, Kind.PRE_LOGITS): 40,
        ("last", Kind.SPATIAL_STD): 20,
        (PRE_LOGITS, Kind.SPATIAL_STD): 40,
    }
)


def features(rows: int, seed: int = 0, width: int = 126) -> Tensor:
    """Positive, as after a ReLU, with some zeros."""
    return (torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) + 0.5).clamp_min(0) + 1e-3


def make(rows: int = 50, k: int = 3, backend: str = "auto", layout: FeatureLayout = LAYOUT) -> list[NearestNeighbors]:
    """One score for each space."""
    scores = make_scores("neighbors", layout, Options(rows, k, backend))
    assert all(isinstance(score, NearestNeighbors) for score in scores)
    return scores  # type: ignore[return-value]


def fitted(bank: Tensor, k: int = 3, backend: str = "auto") -> list[NearestNeighbors]:
    return [score.fit(bank) for score in make(len(bank), k, backend)]  # type: ignore[arg-type]


def distances(scores: list[NearestNeighbors], queries: Tensor) -> Tensor:
    """(B, spaces)."""
    return torch.stack([score(queries) for score in scores], 1)


def spaces(x: np.ndarray) -> list[np.ndarray]:
    """The three spaces again, in NumPy."""

    def normal(part: np.ndarray) -> np.ndarray:
        return (part - part.mean(1, keepdims=True)) / np.sqrt(part.var(1, keepdims=True) + 1e-6)

    def unit(part: np.ndarray) -> np.ndarray:
        root = np.sign(part) * np.sqrt(np.abs(part))
        return root / np.linalg.norm(root, axis=1, keepdims=True)

    last = np.concatenate([normal(x[:, 6:26]), normal(x[:, 66:86])], 1)
    return [last, unit(x[:, 26:66]), unit(x[:, 86:126])]


def test_distances_are_geometric_means_over_the_nearest() -> None:
    """Against scikit-learn in full precision: 8-bit vectors cost less than a percent."""
    bank, queries = features(50), features(9, seed=1)
    scores = fitted(bank)
    assert [score.name for score in scores] == ["knn_last", "knn_pre_logits", "knn_pre_logits:std"]
    for score, vectors, asked in zip(scores, spaces(bank.numpy()), spaces(queries.numpy()), strict=True):
        nearest = sklearn.neighbors.NearestNeighbors(n_neighbors=3).fit(vectors).kneighbors(asked)[0]
        np.testing.assert_allclose(score(queries), np.exp(np.log(nearest).mean(1)), rtol=1e-2)


def test_long_vectors_are_kept_with_4_bits() -> None:
    """Two numbers in a byte; what is loaded is what was fitted, and distances are those of full precision but for a few
    percent, in which the order of the queries stays."""
    layout = FeatureLayout.of({("a", Kind.MEAN): 512})
    bank = features(200, width=512)
    share = torch.linspace(0, 0.8, 40)[:, None]  # of a vector of the bank
    queries = share * bank[:40] + (1 - share) * features(40, seed=1, width=512)
    (score,) = make(200, 5, layout=layout)
    score.fit(bank)  # type: ignore[arg-type]
    state = score.state_dict()
    assert state["vectors"].shape == (200, 256) and state["vectors"].dtype == torch.uint8
    assert score.nbytes == 200 * (256 + 4)

    (other,) = make(200, 5, layout=layout)
    other(queries)
    other.load_state_dict(state)
    assert torch.equal(other.vectors, score.vectors) and score.vectors.min() < 0 < score.vectors.max()
    assert torch.equal(other(queries), score(queries))

    def normal(x: np.ndarray) -> np.ndarray:
        return (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)

    exact = sklearn.neighbors.NearestNeighbors(n_neighbors=5).fit(normal(bank.numpy()))
    expected = np.exp(np.log(exact.kneighbors(normal(queries.numpy()))[0]).mean(1))
    ratio = score(queries).numpy() / expected
    assert ratio.min() > 0.95 and ratio.max() < 1.05
    assert np.corrcoef(score(queries).numpy(), expected)[0, 1] > 0.99


def test_only_the_pre_logits_are_a_layer_of_their_own() -> None:
    """The last stage has its diffusion score already."""
    scores = make()
    assert [score.layer for score in scores] == [None, PRE_LOGITS, None]
    assert all(score.log_scale for score in scores)


def test_scores_ignore_the_rest_of_the_batch() -> None:
    scores, queries = fitted(features(50)), features(9, seed=1)
    whole = distances(scores, queries)
    for i in range(9):
        assert torch.equal(distances(scores, queries[i : i + 1])[0], whole[i])
    assert torch.equal(distances(scores, queries.flip(0)).flip(0), whole)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_a_copy_searches_on_its_own(backend: str) -> None:
    """One for an export, say, whose search is made of tensor operations alone and finds the same."""
    if backend == "faiss":
        pytest.importorskip("faiss")
    queries = features(7, seed=4)
    for score in fitted(features(50), backend=backend):
        before = score(queries)
        index = score._index
        for other in (copy.deepcopy(score), pickle.loads(pickle.dumps(score))):
            assert torch.equal(other(queries), before)
            other.search_coded()
            assert isinstance(other._index[0], CodedIndex)
            assert torch.equal(other(queries), before)
        assert score._index == index


def test_a_new_fit_is_searched_anew() -> None:
    queries = features(7, seed=4)
    for score, expected in zip(fitted(features(50)), fitted(features(50, seed=8)), strict=True):
        score(queries)
        score.fit(features(50, seed=8))  # type: ignore[arg-type]
        assert torch.equal(score(queries), expected(queries))


def test_spaces_follow_the_layout() -> None:
    layout = FeatureLayout.of_stages({"a": 4, "b": 5})
    assert [score.name for score in make(5, 1, layout=layout)] == ["knn_b"]
    with_head = FeatureLayout.of({("a", Kind.MEAN): 4, (PRE_LOGITS, Kind.PRE_LOGITS): 5, (LOGITS, Kind.LOGITS): 3})
    scores = make(5, 1, layout=with_head)
    assert [score.name for score in scores] == ["knn_a", "knn_pre_logits"]
    assert [score.vectors.shape for score in scores] == [(5, 4), (5, 5)]
    assert [score.scales.shape for score in scores] == [(5, 1), (5, 1)]
    assert all(score.vectors.dtype == torch.int8 for score in scores)


def test_fewer_vectors_than_neighbours() -> None:
    scores = fitted(features(2), k=5)
    assert all(score.k == 2 for score in scores)
    assert torch.isfinite(distances(scores, features(4, seed=1))).all()


def test_an_image_of_the_bank_and_constant_features_give_finite_scores() -> None:
    bank = features(50)
    scores = fitted(bank)
    assert torch.isfinite(distances(scores, bank).log()).all()
    assert (distances(scores, bank) < distances(scores, features(50, seed=2))).float().mean() > 0.95
    assert torch.isfinite(distances(scores, torch.zeros(1, 126)).log()).all()
    assert torch.isfinite(distances(fitted(torch.zeros(4, 126), k=2), features(2)).log()).all()

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


def make(rows: int = 50, k: int = 3, backend: str = "auto", layout: FeatureLayout = LAYOUT) -> NearestNeighbors:
    (score,) = make_scores("neighbors", layout, Options(rows, k, backend))
    assert isinstance(score, NearestNeighbors)
    return score


def fitted(bank: Tensor, k: int = 3, backend: str = "auto") -> NearestNeighbors:
    return make(len(bank), k, backend).fit(bank)  # type: ignore[arg-type]


def spaces(x: np.ndarray) -> list[np.ndarray]:
    """The three spaces again, in NumPy."""

    def normal(part: np.ndarray) -> np.ndarray:
        return (part - part.mean(1, keepdims=True)) / np.sqrt(part.var(1, keepdims=True) + 1e-6)

    def unit(part: np.ndarray) -> np.ndarray:
        root = np.sign(part) * np.sqrt(np.abs(part))
        return root / np.linalg.norm(root, axis=1, keepdims=True)

    last = np.concatenate([normal(x[:, 6:26]), normal(x[:, 66:86])], 1)
    return [last, unit(x[:, 26:66]), unit(x[:, 86:126])]


def side_by_side(bank: list[np.ndarray], asked: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Each space centred and brought to unit total variance, the first to 2; of the bank, and of what is asked."""
    both = []
    for vectors in (bank, asked):
        parts = []
        for i, (known, part) in enumerate(zip(bank, vectors, strict=True)):
            total = ((known - known.mean(0)) ** 2).sum(1).mean() / (2 if i == 0 else 1)
            parts.append((part - known.mean(0)) / np.sqrt(total))
        both.append(np.concatenate(parts, 1))
    return both[0], both[1]


def geometric_means(bank: np.ndarray, asked: np.ndarray, k: int) -> np.ndarray:
    """Over the k nearest, by scikit-learn."""
    nearest = sklearn.neighbors.NearestNeighbors(n_neighbors=k).fit(bank).kneighbors(asked)[0]
    return np.exp(np.log(nearest).mean(1))


def shortened(bank: np.ndarray, vectors: np.ndarray, count: int) -> np.ndarray:
    """Vectors times (C + v I)^(-1/16) v^(1/16), of which only the first ``count`` directions differ from 1."""
    values, directions = np.linalg.eigh(np.cov(bank.T, bias=True))
    factors = ((values + values.mean()) / values.mean()) ** -0.0625
    factors[: len(values) - count] = 1
    return vectors @ (directions * factors) @ directions.T


def test_distances_are_geometric_means_over_the_nearest() -> None:
    """Against NumPy and scikit-learn in full precision: 8-bit vectors cost less than a percent."""
    bank, queries = features(80), features(9, seed=1)
    score = fitted(bank)
    assert score.name == "neighbors"
    known, asked = side_by_side(spaces(bank.numpy()), spaces(queries.numpy()))
    known, asked = (shortened(known, vectors, 64) for vectors in (known, asked))
    np.testing.assert_allclose(score.view(queries), asked, atol=5e-3)  # directions of 8 bits
    np.testing.assert_allclose(score(queries), geometric_means(known, asked, 3), rtol=1e-2)


def test_directions_in_which_in_domain_vectors_differ_most_count_less() -> None:
    layout = FeatureLayout.of({("a", Kind.MEAN): 60})
    spread = torch.ones(60)
    spread[:4] = 20.0
    bank = features(500, width=60) * spread
    score = make(500, layout=layout).fit(bank)  # type: ignore[arg-type]
    raw = score.spaces[0](bank)
    before = (raw - raw.mean(0)).square().mean(0)
    after = score.view(bank).square().mean(0)
    shares = after / after.sum() / (before / before.sum())
    assert before[:4].sum() / before.sum() > 0.8
    assert shares[:4].max() < 0.97 < 1.1 < shares[4:].min()


def test_long_vectors_are_kept_with_4_bits() -> None:
    """Two numbers in a byte; what is loaded is what was fitted, and distances are those of full precision but for a few
    percent, in which the order of the queries stays."""
    layout = FeatureLayout.of({("a", Kind.MEAN): 512})
    bank = features(200, width=512)
    share = torch.linspace(0, 0.8, 40)[:, None]  # of a vector of the bank
    queries = share * bank[:40] + (1 - share) * features(40, seed=1, width=512)
    score = make(200, 5, layout=layout)
    score.fit(bank)  # type: ignore[arg-type]
    state = score.state_dict()
    assert state["vectors"].shape == (200, 256) and state["vectors"].dtype == torch.uint8
    assert score.nbytes == 200 * (256 + 4) + 512 * (64 + 4) + 4 * (64 + 1)

    other = make(200, 5, layout=layout)
    other(queries)
    other.load_state_dict(state)
    assert torch.equal(other.vectors, score.vectors) and score.vectors.min() < 0 < score.vectors.max()
    assert torch.equal(other(queries), score(queries))

    def normal(x: np.ndarray) -> np.ndarray:
        return (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)

    known, asked = side_by_side([normal(bank.numpy())], [normal(queries.numpy())])
    expected = geometric_means(shortened(known, known, 64), shortened(known, asked, 64), 5)
    ratio = score(queries).numpy() / expected
    assert ratio.min() > 0.98 and ratio.max() < 1.06  # rounding adds to a distance
    assert np.corrcoef(score(queries).numpy(), expected)[0, 1] > 0.99


def test_scores_ignore_the_rest_of_the_batch() -> None:
    """But for the last digits of a product."""
    score, queries = fitted(features(50)), features(9, seed=1)
    whole = score(queries)
    for i in range(9):
        torch.testing.assert_close(score(queries[i : i + 1])[0], whole[i], rtol=1e-6, atol=0)
    torch.testing.assert_close(score(queries.flip(0)).flip(0), whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_a_copy_searches_on_its_own(backend: str) -> None:
    """One for an export, say, whose search is made of tensor operations alone and finds the same."""
    if backend == "faiss":
        pytest.importorskip("faiss")
    queries = features(7, seed=4)
    score = fitted(features(50), backend=backend)
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
    score, expected = fitted(features(50)), fitted(features(50, seed=8))
    score(queries)
    score.fit(features(50, seed=8))  # type: ignore[arg-type]
    assert torch.equal(score(queries), expected(queries))


def test_further_rows_are_kept_beside_older_ones() -> None:
    """In the older ones' space: what was kept of those stays as it was."""
    older = fitted(features(50))
    kept = np.array([0, 3, 49])
    added = features(10, seed=8)
    score = make(13).fit_further(older, kept, added, None)  # type: ignore[arg-type]
    assert torch.equal(score.vectors[:3], older.vectors[kept])
    assert torch.equal(score.view(added), older.view(added))
    assert (score(added) < 0.5 * older(added)).all()  # one of the three nearest is the image itself


def test_spaces_follow_the_layout() -> None:
    assert make(5, 1, layout=FeatureLayout.of_stages({"a": 4, "b": 5})).widths == [5]
    with_head = FeatureLayout.of({("a", Kind.MEAN): 4, (PRE_LOGITS, Kind.PRE_LOGITS): 5, (LOGITS, Kind.LOGITS): 3})
    score = make(7, 1, layout=with_head)
    assert score.widths == [4, 5]
    assert score.vectors.shape == (7, 9) and score.vectors.dtype == torch.int8
    assert score.scales.shape == (7, 1)
    assert score.directions.shape == (9, 9)
    assert score.log_scale


def test_fewer_vectors_than_neighbours() -> None:
    score = fitted(features(2), k=5)
    assert score.k == 2
    assert torch.isfinite(score(features(4, seed=1))).all()


def test_an_image_of_the_bank_and_constant_features_give_finite_scores() -> None:
    bank = features(50)
    score = fitted(bank)
    assert torch.isfinite(score(bank).log()).all()
    assert (score(bank) < score(features(50, seed=2))).float().mean() > 0.95
    assert torch.isfinite(score(torch.zeros(1, 126)).log()).all()
    assert torch.isfinite(fitted(torch.zeros(4, 126), k=2)(features(2)).log()).all()

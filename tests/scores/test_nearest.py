"""Banks of neighbours and what joins them with diffusion, on seeded features of known layout."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from featdiff.scores.fused import FusedHeads
from featdiff.scores.fusion import FUSIONS
from featdiff.scores.nearest import Banks
from featdiff.scores.neighbors import CodedIndex

COLUMNS = {
    "early": slice(0, 6),
    "last": slice(6, 26),
    "pre_logits": slice(26, 66),
    "last:std": slice(66, 86),
    "pre_logits:std": slice(86, 126),
}
SETTINGS: dict[str, Any] = {
    "neighbors": 3,
    "bank_rows": 50,
    "fusion": "mean",
    "backend": "auto",
    **{"joint": False, "hidden_ratio": 2.0, "hidden_max": 16, "blocks": 1, "timesteps": 100},
    **{"start_times": (20, 60), "draws": 2, "stride": None, "seed": 0},
}


def features(rows: int, seed: int = 0, width: int = 126) -> Tensor:
    """Positive, as after a ReLU, with some zeros."""
    return (torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) + 0.5).clamp_min(0) + 1e-3


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
    banks = Banks(COLUMNS, 50, 3).fit(bank)
    assert banks.names == ["knn_last", "knn_pre_logits", "knn_pre_logits:std"]
    found = banks(queries).numpy()
    for i, (known, asked) in enumerate(zip(spaces(bank.numpy()), spaces(queries.numpy()), strict=True)):
        distances = NearestNeighbors(n_neighbors=3).fit(known).kneighbors(asked)[0]
        np.testing.assert_allclose(found[:, i], np.exp(np.log(distances).mean(1)), rtol=1e-2)


def test_scores_ignore_the_rest_of_the_batch() -> None:
    banks, queries = Banks(COLUMNS, 50, 3).fit(features(50)), features(9, seed=1)
    whole = banks(queries)
    for i in range(9):
        assert torch.equal(banks(queries[i : i + 1])[0], whole[i])
    assert torch.equal(banks(queries.flip(0)).flip(0), whole)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_a_copy_searches_on_its_own(backend: str) -> None:
    """One for an export, say, whose search is made of tensor operations alone and finds the same."""
    banks, queries = Banks(COLUMNS, 50, 3, backend).fit(features(50)), features(7, seed=4)
    before = banks(queries)
    indices = list(banks._indices)
    other = copy.deepcopy(banks)
    assert torch.equal(other(queries), before)
    other.search_coded()
    assert all(isinstance(index, CodedIndex) for index in other._indices)
    assert torch.equal(other(queries), before)
    assert banks._indices == indices


def test_spaces_follow_the_columns() -> None:
    assert Banks({"a": slice(0, 4), "b": slice(4, 9)}, 5, 1).names == ["knn_b"]
    with_head = {"a": slice(0, 4), "pre_logits": slice(4, 9)}
    banks = Banks(with_head, 5, 1)
    assert banks.names == ["knn_a", "knn_pre_logits"]
    assert [banks.vectors_0.shape, banks.vectors_1.shape] == [(5, 4), (5, 5)]
    assert banks.vectors_0.dtype == torch.int8


def test_fewer_vectors_than_neighbours() -> None:
    banks = Banks(COLUMNS, 2, 5).fit(features(2))
    assert banks.k == 2
    assert torch.isfinite(banks(features(4, seed=1))).all()


def test_an_image_of_the_bank_and_constant_features_give_finite_scores() -> None:
    bank = features(50)
    banks = Banks(COLUMNS, 50, 3).fit(bank)
    assert torch.isfinite(banks(bank).log()).all()
    assert (banks(bank) < banks(features(50, seed=2))).float().mean() > 0.95
    assert torch.isfinite(banks(torch.zeros(1, 126)).log()).all()
    assert torch.isfinite(Banks(COLUMNS, 4, 2).fit(torch.zeros(4, 126))(features(2)).log()).all()


def make(**changes: Any) -> FusedHeads:
    heads = FusedHeads(COLUMNS, **(SETTINGS | changes))
    source = torch.Generator().manual_seed(1)
    for parameter in heads.parameters():  # as if trained
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=source))
    if heads.banks is not None:
        heads.banks.fit(features(heads.banks.vectors_0.shape[0]))
    heads.fit_statistics(features(40, seed=3))
    return heads


def test_fused_is_the_standardised_sum_of_its_heads() -> None:
    heads, held_out, queries = make(), features(40, seed=3), features(7, seed=4)
    names = ["layerwise", "knn_last", "knn_pre_logits", "knn_pre_logits:std"]

    def raw(x: Tensor) -> np.ndarray:
        scores, _ = heads(x)
        return np.stack([scores["layerwise"], *(np.log(scores[name].numpy()) for name in names[1:])], 1)

    known = raw(held_out)
    z = (raw(queries) - known.mean(0)) / np.maximum(known.std(0), 0.05)
    scores, layers = heads(queries)
    assert list(scores) == ["fused", "layerwise", "mse", "mfsim", "lr", *names[1:]]
    shares = np.array([0.75, 1, 1, 1])
    np.testing.assert_allclose(scores["fused"], z @ shares / np.linalg.norm(shares), rtol=1e-3, atol=1e-4)
    assert heads.layers == ["early", "last", "pre_logits"]
    np.testing.assert_allclose(layers[:, 2], z[:, 2], rtol=1e-3, atol=1e-4)
    weights = np.array([6, 20]) ** 0.75
    expected = layers[:, :2].numpy() @ (weights / np.linalg.norm(weights))
    np.testing.assert_allclose(scores["layerwise"], expected, rtol=1e-4, atol=1e-5)


def test_held_out_images_score_about_zero() -> None:
    scores = make()(features(40, seed=3), ("fused",))[0]["fused"]
    assert abs(scores.mean()) < 1e-5
    assert 0.2 < scores.std() < 2.1  # 1 if heads were independent, 2 if they were one


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_ranks_a_stranger_highest(fusion: str) -> None:
    heads = make(fusion=fusion)
    strange = torch.zeros(1, 126)
    strange[:, [0, 6, 26, 66, 86]] = 9.0  # one channel says it all
    scores = heads(torch.cat([features(20, seed=5), strange]), ("fused",))[0]["fused"]
    assert scores.argmax() == 20


def test_without_neighbours_it_is_diffusion_alone() -> None:
    heads = make(neighbors=0)
    assert heads.banks is None and heads.layers == ["early", "last"]
    known, queries = heads(features(40, seed=3))[0]["layerwise"], features(7, seed=4)
    scores = heads(queries)[0]
    assert set(scores) == {"fused", "layerwise", "mse", "mfsim", "lr"}
    torch.testing.assert_close(scores["fused"], (scores["layerwise"] - known.mean()) / known.std(correction=0))


def test_state_dict_holds_everything_that_decides_a_score() -> None:
    heads, other, queries = make(), FusedHeads(COLUMNS, **(SETTINGS | {"seed": 9})), features(7, seed=4)
    other.load_state_dict(heads.state_dict())
    for name, values in heads(queries)[0].items():
        assert torch.equal(other(queries)[0][name], values)


def test_only_what_is_asked_for() -> None:
    assert list(make()(features(2), ("mse",))[0]) == ["mse"]
    assert list(make()(features(2), ("layerwise",))[0]) == ["layerwise"]

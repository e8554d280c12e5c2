"""What joins the scores of a detector, on seeded features of known layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from featdiff.exceptions import UsageError
from featdiff.features.layout import PRE_LOGITS, FeatureLayout, Kind
from featdiff.scores.baselines import LastStageMahalanobis
from featdiff.scores.diffusion import DIFFUSION, Diffusion
from featdiff.scores.fused import FUSED, Heads
from featdiff.scores.registry import RESERVED, Options, Score, make_scores

LAYOUT = FeatureLayout.of(
    {
        ("early", Kind.MEAN): 6,
        ("last", Kind.MEAN): 20,
        (PRE_LOGITS, Kind.PRE_LOGITS): 40,
        ("last", Kind.SPATIAL_STD): 20,
        (PRE_LOGITS, Kind.SPATIAL_STD): 40,
    }
)
SETTINGS: dict[str, Any] = {
    **{"joint": False, "hidden_ratio": 2.0, "hidden_max": 16, "blocks": 1, "timesteps": 100},
    **{"start_times": (20, 60), "draws": 2, "stride": None, "seed": 0},
}


def features(rows: int, seed: int = 0) -> Tensor:
    """Positive, as after a ReLU, with some zeros."""
    return (torch.randn(rows, 126, generator=torch.Generator().manual_seed(seed)) + 0.5).clamp_min(0) + 1e-3


def unfitted(neighbors: int = 3, head: str = FUSED, **changes: Any) -> Heads:
    members = make_scores("neighbors", LAYOUT, Options(50, neighbors)) if neighbors else []
    return Heads(Diffusion(LAYOUT, **(SETTINGS | changes)), members, head)


def make(neighbors: int = 3, head: str = FUSED) -> Heads:
    heads = unfitted(neighbors, head)
    source = torch.Generator().manual_seed(1)
    for parameter in heads.parameters():  # as if trained
        parameter.copy_((0.2 * torch.randn(parameter.shape, generator=source)).half())
    for score in heads.members:
        score.fit(features(50))  # type: ignore[operator]
    heads.fit_statistics(heads.measure(features(40, seed=3)))
    return heads


def test_reserved_names_are_those_that_detectors_use() -> None:
    assert set(RESERVED) == {"featdiff", FUSED, *DIFFUSION}


def test_fused_is_the_standardised_sum_of_its_scores() -> None:
    heads, held_out, queries = make(), features(40, seed=3), features(7, seed=4)

    def raw(x: Tensor) -> np.ndarray:
        scores = heads.all_scores(x)
        return np.stack([scores["layerwise"], np.log(scores["neighbors"].numpy())], 1)

    expected = raw(held_out)
    z = (raw(queries) - expected.mean(0)) / np.maximum(expected.std(0), 0.05)
    scores = heads.all_scores(queries)
    assert list(scores) == list(heads.scores) == ["layerwise", "mse", "mfsim", "lr", "neighbors"]

    fused, layers = heads(queries)  # not scaled yet
    shares = np.array([1, 4])
    np.testing.assert_allclose(fused, z @ shares / np.linalg.norm(shares), rtol=1e-3, atol=1e-4)
    assert heads.layers == ["early", "last"]
    weights = np.array([6, 20]) ** 0.75
    layerwise = layers.numpy() @ (weights / np.linalg.norm(weights))
    np.testing.assert_allclose(scores["layerwise"], layerwise, rtol=1e-4, atol=1e-5)


def test_held_out_images_score_about_zero() -> None:
    score = make()(features(40, seed=3))[0]
    assert abs(score.mean()) < 1e-5
    assert 0.2 < score.std() < 1.3  # 1 if scores were independent, 1.2 if they were one


@pytest.mark.parametrize("head", [FUSED, "layerwise", "mse", "mfsim", "lr", "neighbors"])
def test_scale_is_that_of_calibration_images(head: str) -> None:
    """A shift and a factor: no order changes."""
    heads = make(head=head)
    calibration, queries = features(60, seed=6), features(20, seed=7)
    before = heads.unscaled(queries)
    heads.fit_scale(heads.unscaled(calibration))
    score, layers = heads(calibration)
    both = torch.cat([score[:, None], layers], 1)
    torch.testing.assert_close(both.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(both.std(0, correction=0), torch.ones(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(heads.unscaled(queries), before)
    assert torch.equal(heads(queries)[0].argsort(), before[:, 0].argsort())
    by_hand = (before - heads.location) / heads.scale
    torch.testing.assert_close(heads.rescaled(before), by_hand)


def test_scale_of_scores_that_never_change_is_finite() -> None:
    heads = make()
    heads.fit_scale(torch.full((5, 3), 3.0))
    assert torch.isfinite(torch.cat([*(part.flatten() for part in heads(features(4)))])).all()
    assert torch.equal(heads.scale, torch.ones(3))


def test_a_stranger_ranks_highest() -> None:
    strange = torch.zeros(1, 126)
    strange[:, [0, 6, 26, 66, 86]] = 9.0  # one channel says it all
    score = make()(torch.cat([features(20, seed=5), strange]))[0]
    assert score.argmax() == 20


def test_a_row_has_one_score_whatever_the_batch() -> None:
    heads, queries = make(), features(9, seed=5)
    together = heads.unscaled(queries)
    apart = torch.cat([heads.unscaled(row) for row in queries.split(1)])
    assert ((apart - together).abs().amax(0) < 1e-4 * together.std(0)).all()


def test_without_neighbours_it_is_diffusion_alone() -> None:
    heads = make(neighbors=0)
    assert not heads.members and heads.layers == ["early", "last"]
    held_out, queries = heads.all_scores(features(40, seed=3))["layerwise"], features(7, seed=4)
    scores = heads.all_scores(queries)
    assert set(scores) == {"layerwise", "mse", "mfsim", "lr"}
    expected = (scores["layerwise"] - held_out.mean()) / held_out.std(correction=0)
    torch.testing.assert_close(heads(queries)[0], expected)


@pytest.mark.parametrize("head", ["layerwise", "mse", "mfsim", "lr", "neighbors"])
def test_any_single_score_can_be_the_detector_s_own(head: str) -> None:
    heads, fused, queries = make(head=head), make(), features(7, seed=4)
    score, layers = heads(queries)
    assert torch.equal(score, heads.all_scores(queries)[head])
    torch.testing.assert_close(layers, fused(queries)[1])


@pytest.mark.parametrize("head", [FUSED, "lr"])
def test_state_dict_holds_everything_that_decides_a_score(head: str) -> None:
    """The early network only where the detector's own score is likelihood regret."""
    heads, queries = make(head=head), features(7, seed=4)
    heads.fit_scale(heads.unscaled(features(60, seed=6)))
    other = unfitted(head=head, seed=9)
    other.load_state_dict(heads.state_dict())

    again = other.all_scores(queries)
    assert set(heads.all_scores(queries)) - set(again) == (set() if head == "lr" else {"lr"})
    assert any("early" in name for name in heads.state_dict()) == (head == "lr")
    for name, values in again.items():
        assert torch.equal(heads.all_scores(queries)[name], values)
    for values, loaded in zip(heads(queries), other(queries), strict=True):
        assert torch.equal(values, loaded)


def test_scores_of_one_name_are_refused() -> None:
    twice = [score for _ in range(2) for score in make_scores("neighbors", LAYOUT, Options(50))]
    with pytest.raises(UsageError, match="two scores are called 'neighbors': give each a name of its own"):
        Heads(Diffusion(LAYOUT, **SETTINGS), twice)
    other = LastStageMahalanobis(LAYOUT)
    other.name = "mse"
    with pytest.raises(UsageError, match="two scores are called 'mse'"):
        Heads(Diffusion(LAYOUT, **SETTINGS), [other])


def test_a_group_of_scores_cannot_be_the_detector_s_own() -> None:
    each = make_scores("mahalanobis_stages", LAYOUT, Options(50))
    with pytest.raises(UsageError, match="'mahalanobis_stages' stands for several scores") as caught:
        Heads(Diffusion(LAYOUT, **SETTINGS), each, "mahalanobis_stages")
    assert caught.value.argument == "head"


def test_only_distances_are_joined_by_their_logarithm() -> None:
    class Last(Score):
        name = "last_column"

        def forward(self, features: Tensor) -> Tensor:
            return features[:, -1] - 1

    heads = Heads(Diffusion(LAYOUT, **SETTINGS), [Last(LAYOUT)])
    held_out = features(40, seed=3)
    heads.fit_statistics(heads.measure(held_out))
    assert heads.mean[1].item() == pytest.approx((held_out[:, -1] - 1).mean().item(), rel=1e-5)
    assert heads.deviation[1].item() == pytest.approx(held_out[:, -1].std(correction=0).item(), rel=1e-5)

"""A fit to which strange rows look ordinary is an error, and a few bad rows do no such thing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from featdiff import FeatdiffError, FeatureDiffusion
from featdiff.detectors.soundness import check_sensitive, check_spread
from featdiff.features.layout import LOGITS, FeatureLayout, Kind

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(400, 16)).astype(np.float32)
NEW = RNG.normal(size=(500, 16)).astype(np.float32)
LAYOUT = FeatureLayout.of({("early", Kind.MEAN): 4, ("last", Kind.MEAN): 12})
HELD_OUT = np.linspace(-2, 2, 100)


def fitted(rows: np.ndarray) -> FeatureDiffusion:
    recipe = {"epochs": 20, "min_steps": 1, "batch_size": 64}
    return FeatureDiffusion(hidden_max=32, calibration=0.2, recipe=recipe).fit(rows)


@pytest.mark.parametrize("size", [1e5, 1e6, 1e12, 1e30])
def test_one_huge_row_disables_nothing(size: float) -> None:
    """At 1e6 or more it did: scale and level were a mean, and rows 20 deviations away had p = 1."""
    clean = fitted(ROWS)
    spoiled = fitted(np.concatenate([ROWS, np.full((1, 16), size, dtype=np.float32)]))
    shifted = NEW + 5
    assert (clean.p_values(shifted) <= 0.05).mean() == 1
    assert (spoiled.p_values(shifted) <= 0.05).mean() == 1
    assert (spoiled.p_values(NEW) <= 0.05).mean() < 0.08
    assert spoiled.heads_.scale.item() == pytest.approx(clean.heads_.scale.item(), rel=0.01)
    assert spoiled.heads_.level.item() == pytest.approx(clean.heads_.level.item(), abs=0.01)


def test_rows_that_are_mostly_alike_still_have_a_scale() -> None:
    """The median deviation would be zero."""
    rows = np.zeros((300, 16), dtype=np.float32)
    rows[:100] = ROWS[:100]
    detector = FeatureDiffusion(hidden_max=32, calibration=0.2, recipe={"epochs": 1, "min_steps": 1})
    detector.fit(np.concatenate([rows[:101], ROWS[200:]]))
    assert detector.heads_.scale.item() == pytest.approx(1, abs=0.1)


def test_scores_without_spread_are_refused() -> None:
    check_spread(HELD_OUT)
    check_spread(np.zeros(7))  # too few to say
    with pytest.raises(
        FeatdiffError, match=r"^fitting failed: the 100 held-out images or rows have the same score, 3,"
    ):
        check_spread(np.concatenate([np.full(80, 3.0), HELD_OUT[:20]]))


def test_a_score_that_looks_one_way_only_is_sound() -> None:
    check_sensitive(torch.from_numpy(ROWS), LAYOUT, lambda rows: rows[:, 0].numpy(), HELD_OUT)


@pytest.mark.parametrize("kind", ["constant", "upside down", "saturated"])
def test_scores_that_do_not_see_strange_rows_are_refused(kind: str) -> None:
    def score(rows: Tensor) -> np.ndarray:
        far = rows.square().mean(1).sqrt().numpy()
        return {"constant": 0 * far, "upside down": -far, "saturated": np.minimum(far, 0.5)}[kind]

    with pytest.raises(FeatdiffError, match=r"^fitting failed: images or rows 20 standard deviations away .* score "):
        check_sensitive(torch.from_numpy(ROWS), LAYOUT, score, score(torch.from_numpy(NEW)) + 1e-3 * NEW[:, 0])


def test_logits_stay_where_they_are() -> None:
    """A shift would make them certain, and an energy would take it for ordinary."""
    layout = FeatureLayout.of({("last", Kind.MEAN): 12, (LOGITS, Kind.LOGITS): 4})
    rows = torch.from_numpy(ROWS)

    def score(shifted: Tensor) -> np.ndarray:
        torch.testing.assert_close(shifted[:, 12:], rows[:64, 12:])
        return shifted.square().mean(1).numpy()

    check_sensitive(rows, layout, score, HELD_OUT)


def test_bad_rows_among_the_others_hide_no_column() -> None:
    """The shift follows the bulk of the rows, is the same in all columns of a layer, and leaves constants alone."""
    rows = torch.from_numpy(ROWS).clone()
    rows[:20] = 1e9
    rows[:, 3] = 1.0
    rows[:, 4:] *= 10
    seen: list[Tensor] = []

    def score(shifted: Tensor) -> np.ndarray:
        seen.append(shifted - rows[:64])
        return shifted.square().mean(1).numpy()

    check_sensitive(rows, LAYOUT, score, HELD_OUT)
    moved = seen[0][20:].abs().mean(0)
    torch.testing.assert_close(moved[:4], torch.tensor([17.3, 17.3, 17.3, 0.0]), atol=1.5, rtol=0)
    torch.testing.assert_close(moved[4:], torch.full((12,), 200.0), atol=15, rtol=0)
    assert (seen[0][20:] < 0).float()[:, 4:].mean() == pytest.approx(0.5, abs=0.1)

"""Scores and reasons -> a row for every image."""

from __future__ import annotations

import numpy as np
import pytest

from featdiff.verdicts.calibration import Calibration
from featdiff.verdicts.judge import judge
from featdiff.verdicts.results import Scores

CALIBRATION = Calibration(np.arange(19.0))


def judged(ood_score: list[float], layer: list[float]) -> Scores:
    """Four images, of which the second could not be read."""
    names = ["a.png", "b.png", "c.png", "d.png"]
    layers = {"stage": np.array(layer)}
    return judge(names, [0, 2, 3], {1: "empty file (0 bytes)"}, np.array(ood_score), layers, CALIBRATION, 0.05)


def test_a_row_for_each_image() -> None:
    scores = judged([3.5, 50.0, 0.0], [1.0, 2.0, 3.0])
    assert scores.status == ["ok", "unreadable", "ok", "ok"]
    assert scores.reason == ["", "empty file (0 bytes)", "", ""]
    np.testing.assert_allclose(scores.p_value, [16 / 20, np.nan, 1 / 20, 1])
    assert scores.is_ood.tolist() == [False, False, True, False]
    np.testing.assert_allclose(scores.layers["stage"], [1, np.nan, 2, 3])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["ood_score", "layer"])
def test_an_image_without_a_finite_score_is_an_error(bad: float, place: str) -> None:
    """Whether the score itself is not finite, or that of a layer."""
    values = {"ood_score": [0.0, 0.0, 0.0], "layer": [0.0, 0.0, 0.0]}
    values[place][1] = bad
    scores = judged(**values)
    assert scores.status == ["ok", "unreadable", "error", "ok"]
    assert scores.reason[2] == "its score is not finite: the model fails on it"
    assert scores.p_value[2] == 1 / 20
    assert scores.is_ood.tolist() == [False, False, True, False]
    assert scores.flagged == 0
    assert repr(scores) == "Scores(4 images: 0 OOD at fpr 0.05, 1 unreadable, 1 failed)"

    rows = list(scores.rows())
    assert rows[2]["status"] == "error" and rows[2]["is_ood"] is True and rows[2]["p_value"] == 0.05
    assert rows[2]["ood_score" if place == "ood_score" else "layer_stage"] is None
    assert [row.path for row in scores.sorted()] == ["c.png", "a.png", "d.png", "b.png"]


def test_without_an_image_that_can_be_read() -> None:
    scores = judge(["a.png"], [], {0: "not an image"}, np.empty(0), {"stage": np.empty(0)}, CALIBRATION, 0.05)
    assert scores.status == ["unreadable"] and np.isnan(scores.p_value).all() and not scores.is_ood.any()

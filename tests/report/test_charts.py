"""The geometry of charts, compared with what NumPy and scikit-learn say."""

from __future__ import annotations

import re

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from featdiff.report.charts import HEIGHT, WIDTH, histogram, roc_path


def tops(path: str) -> np.ndarray:
    """Heights of the bars of an outline, as shares of the plot."""
    return 1 - np.array([float(y) for y in re.findall(r"V([\d.]+)H", path)]) / HEIGHT


def test_each_set_is_as_high_as_the_plot() -> None:
    """So that the normal images can still be seen beside a single other one."""
    rng = np.random.default_rng(0)
    normal, these = rng.normal(size=400), rng.normal(1, 1, size=50)
    chart = histogram(these, normal)
    edges = np.linspace(chart.low, chart.high, 61)
    for path, scores in ((chart.normal, normal), (chart.these, these)):
        counts = np.histogram(np.clip(scores, chart.low, chart.high), edges)[0]
        np.testing.assert_allclose(tops(path), counts / counts.max(), atol=0.001)
    assert tops(histogram(these[:1], normal).normal).max() == 1


def test_normal_images_keep_a_quarter_of_the_width() -> None:
    """However strange others are, which lie in the last bar."""
    normal = np.linspace(-1, 1, 100)
    chart = histogram(np.array([0.0, 1e6, 2e6]), normal)
    assert chart.beyond == 2
    assert (2 / (chart.high - chart.low)) >= 0.25
    assert tops(chart.these)[-1] == 1
    assert tops(chart.these).sum() == pytest.approx(1.5, abs=0.001)
    assert chart.x(1e6) == WIDTH


@pytest.mark.parametrize("scores", [[], [1.5], [1.5, 1.5, 1.5], [0.0, 1e-9]])
def test_few_scores(scores: list[float]) -> None:
    chart = histogram(np.array(scores))
    assert chart.low < chart.high
    assert np.isfinite([place for place, _ in chart.ticks]).all()
    assert bool(chart.these) == bool(scores)
    assert chart.normal == ""


def test_ticks_are_round_and_at_their_place() -> None:
    chart = histogram(np.array([-1.3, 8.9]))
    assert [label for _, label in chart.ticks] == ["0", "2", "4", "6", "8"]
    for place, label in chart.ticks:
        assert place == pytest.approx(chart.x(float(label)))


@pytest.mark.parametrize("count", [5, 3000])
def test_the_area_below_a_roc_path_is_the_auroc(count: int) -> None:
    rng = np.random.default_rng(count)
    normal, strange = rng.normal(size=count), rng.normal(1.5, 1, size=count).round(1)
    corners = re.findall(r"([\d.]+) ([\d.]+)", roc_path(normal, strange, side=300))
    x, y = np.array(corners, dtype=float).T / 300
    assert (x[0], y[0], x[-1], y[-1]) == (0, 1, 1, 0)
    assert (np.diff(x) >= 0).all()
    labels = np.repeat([0, 1], count)
    expected = roc_auc_score(labels, np.concatenate([normal, strange]))
    assert np.trapezoid(1 - y, x) == pytest.approx(expected, abs=0.005)

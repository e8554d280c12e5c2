"""Intervals of shares, compared with other implementations and with simulated calibration sets."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from featdiff.exceptions import UsageError
from featdiff.verdicts.calibration import Calibration
from featdiff.verdicts.shares import interval_of_share, range_of_rate


@pytest.mark.parametrize(("hits", "n"), [(0, 7), (1, 30), (50, 1000), (7, 7)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_as_scipy_has_it(hits: int, n: int, confidence: float) -> None:
    expected = binomtest(hits, n).proportion_ci(confidence, method="exact")
    assert interval_of_share(hits / n, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_nothing_is_known_of_none() -> None:
    assert interval_of_share(0.0, 0) == (0.0, 1.0)


def test_rates_of_drawn_calibration_sets() -> None:
    """Scores are even, so that the rate of a set is 1 - its threshold: 95 % of the sets have theirs in the range."""
    rng = np.random.default_rng(0)
    rates = np.array([1 - Calibration(rng.uniform(size=200)).threshold(0.05) for _ in range(2000)])
    low, high = range_of_rate(0.05, 200)
    assert ((rates >= low) & (rates <= high)).mean() == pytest.approx(0.95, abs=0.015)
    assert rates.mean() == pytest.approx(10 / 201, abs=0.001)


def test_too_few_for_a_rate() -> None:
    with pytest.raises(UsageError, match="at least 99"):
        range_of_rate(0.01, 50)

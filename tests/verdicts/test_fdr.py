"""Flags of a batch: the rule is SciPy's, and the share of false flags stays below the level."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import false_discovery_control

from featdiff import Scores
from featdiff.exceptions import UsageError
from featdiff.verdicts.calibration import Calibration
from featdiff.verdicts.fdr import fdr_threshold, fewest_flags


@pytest.mark.parametrize("level", [0.01, 0.1, 0.5])
def test_flags_are_those_of_scipy(level: float) -> None:
    for seed in range(50):
        rng = np.random.default_rng(seed)
        p_values = np.concatenate([rng.uniform(size=200), rng.uniform(size=50) ** 5]).clip(1e-6)
        expected = false_discovery_control(p_values, method="bh") <= level
        np.testing.assert_array_equal(p_values <= fdr_threshold(p_values, level), expected)


def test_images_without_a_score_do_not_count() -> None:
    p_values = np.array([0.01, np.nan, 0.04, 0.9, np.nan])
    assert fdr_threshold(p_values, 0.1) == fdr_threshold(p_values[[0, 2, 3]], 0.1) == 0.04
    assert fdr_threshold(np.array([np.nan]), 0.1) == fdr_threshold(np.array([]), 0.1) == 0.0


def test_large_p_values_need_only_be_counted() -> None:
    rng = np.random.default_rng(5)
    for level in (0.05, 0.2, 0.5):
        p_values = np.concatenate([rng.random(500), rng.random(60) ** 6, [level, np.nan]])
        small = p_values[p_values <= level]
        whole = fdr_threshold(p_values, level)
        assert 0 < whole <= level
        assert fdr_threshold(small, level, 561) == whole


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_few_flags_are_false(share: float) -> None:
    """On average over batches, each behind a calibration set of its own, at most the level."""
    level, found, false_shares = 0.1, 0, []
    for seed in range(400):
        rng = np.random.default_rng([seed, int(100 * share)])
        strange = np.arange(300) < 300 * share
        scores = rng.standard_normal(300) + 3 * strange
        p_values = Calibration(rng.standard_normal(500)).p_values(scores)
        flags = p_values <= fdr_threshold(p_values, level)
        false_shares.append((flags & ~strange).sum() / max(1, flags.sum()))
        found += (flags & strange).sum()
    assert np.mean(false_shares) <= level + 3 * np.std(false_shares) / 20
    assert found > 0.3 * 400 * 300 * share or share == 0.0


@pytest.mark.parametrize("groups", [9, 99, 1600])
def test_fewer_flags_than_that_never_come(groups: int) -> None:
    count, level = 500, 0.1
    fewest = fewest_flags(count, level, groups)
    smallest = 1 / (groups + 1)
    for strange in (fewest - 1, fewest):
        if strange <= count:
            p_values = np.where(np.arange(count) < strange, smallest, 1.0)
            assert bool(fdr_threshold(p_values, level)) == (strange >= fewest)


def test_flags_of_scores() -> None:
    p_values = np.array([0.001, 0.9, np.nan, 0.002])
    ok = ["ok", "ok", "unreadable", "ok"]
    scores = Scores(list("abcd"), ok, [""] * 4, -p_values, p_values, p_values < 0.05, {})
    assert scores.fdr_flags(0.1).tolist() == [True, False, False, True]
    assert scores[[1]].fdr_flags(0.1).tolist() == [False]
    for level in (0.0, 1.0, "a"):
        with pytest.raises(UsageError, match="fdr"):
            scores.fdr_flags(level)

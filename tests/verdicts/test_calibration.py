"""p-values, rates, thresholds and splits: the formulas, their guarantees and their edges."""

from __future__ import annotations

import re

import numpy as np
import pytest

from featdiff.data.splits import Split, split, split_by_content
from featdiff.exceptions import UsageError
from featdiff.verdicts.calibration import check_fpr, flagged, p_values, threshold


def by_hand(score: float, calibration: np.ndarray) -> float:
    return (1 + sum(1 for value in calibration if value >= score)) / (len(calibration) + 1)


# ---- p-values ----


@pytest.mark.parametrize("n", [1, 2, 7, 19, 200])
@pytest.mark.parametrize("ties", [False, True])
def test_p_values_follow_the_formula(n: int, ties: bool) -> None:
    rng = np.random.default_rng(n)
    draw = (lambda size: rng.integers(0, 4, size).astype(float)) if ties else rng.normal
    calibration = np.sort(draw(size=n))
    scores = np.concatenate([draw(size=30), calibration, [-np.inf, np.inf]])
    expected = [by_hand(score, calibration) for score in scores]
    np.testing.assert_allclose(p_values(scores, calibration), expected, rtol=1e-15)


def test_a_tie_counts_against_the_alarm() -> None:
    assert p_values(np.array([2.0]), np.array([1.0, 2.0, 2.0, 3.0])) == [4 / 5]


def test_range_of_p_values() -> None:
    calibration = np.arange(19.0)
    p = p_values(np.array([-np.inf, -1, 0, 18, 18.5, np.inf]), calibration)
    np.testing.assert_allclose(p, [1, 1, 1, 2 / 20, 1 / 20, 1 / 20])


def test_nan_gives_nan_and_no_alarm() -> None:
    p = p_values(np.array([np.nan, 100.0, -100.0]), np.arange(9.0))
    assert np.isnan(p[0])
    assert flagged(p, 0.5).tolist() == [False, True, False]
    assert flagged(np.array([np.nan]), 0.999).tolist() == [False]


def test_no_scores() -> None:
    p = p_values(np.empty(0), np.arange(9.0))
    assert p.shape == (0,)
    assert flagged(p, 0.5).shape == (0,)


@pytest.mark.parametrize("n", [19, 50])
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_false_alarms_on_exchangeable_data_keep_the_rate(n: int, rate: float) -> None:
    """Over calibration sets, P(p <= a) = floor(a (n + 1)) / (n + 1) <= a; four standard errors of room."""
    rng, trials = np.random.default_rng(1), 4000
    alarms = 0
    for _ in range(trials):
        scores = rng.gumbel(size=n + 1)
        alarms += int(flagged(p_values(scores[:1], np.sort(scores[1:])), rate)[0])
    exact = np.floor(rate * (n + 1) + 1e-9) / (n + 1)
    assert exact <= rate
    assert alarms / trials == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / trials))


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5])
def test_false_alarms_stay_below_the_rate_with_ties(rate: float) -> None:
    rng, trials = np.random.default_rng(2), 3000
    alarms = 0
    for _ in range(trials):
        scores = rng.integers(0, 5, 40).astype(float)
        alarms += int(flagged(p_values(scores[:1], np.sort(scores[1:])), rate)[0])
    assert alarms / trials <= rate + 4 * np.sqrt(rate * (1 - rate) / trials)


# ---- rates ----


@pytest.mark.parametrize("fpr", [0, 0.0, 1, 1.0, -1, -0.05, 1.5, 5, float("nan"), float("inf"), True])
def test_rates_outside_0_to_1_are_refused(fpr: float) -> None:
    with pytest.raises(UsageError, match=f"--fpr.*between 0 and 1, not {fpr}"):
        check_fpr(fpr)
    with pytest.raises(UsageError, match="--fpr"):
        threshold(np.arange(100.0), fpr)


@pytest.mark.parametrize("fpr", ["0.05", None, [0.05]])
def test_rates_that_are_no_numbers_are_refused(fpr: object) -> None:
    with pytest.raises(UsageError, match="--fpr"):
        check_fpr(fpr)  # type: ignore[arg-type]


@pytest.mark.parametrize("fpr", [0.05, 0.5, 1e-9, 0.999, np.float64(0.05), np.float32(0.05)])
def test_any_real_number_between_0_and_1_will_do(fpr: float) -> None:
    check_fpr(fpr)


@pytest.mark.parametrize(("fpr", "needed"), [(0.05, 19), (0.01, 99), (1 / 3, 2), (0.5, 1), (0.001, 999), (0.07, 14)])
def test_refusal_names_the_images_needed(fpr: float, needed: int) -> None:
    check_fpr(fpr, needed)
    with pytest.raises(UsageError, match=rf"needs at least {needed} held-out images.*there are {needed - 1}:"):
        check_fpr(fpr, needed - 1)


def test_the_numbers_in_a_refusal_are_right_for_many_rates() -> None:
    """What it says is needed is needed and is enough, and the rate that it offers instead works."""
    rng = np.random.default_rng(0)
    rates = [1 / k for k in range(2, 60)] + [round(float(rate), 4) for rate in rng.uniform(0.0005, 0.9, 200)]
    for fpr in rates:
        smallest = next(n for n in range(1, 5000) if fpr * (n + 1) >= 1 - 1e-9)
        check_fpr(fpr, smallest)
        for n in {smallest - 1, smallest // 2} - {0, smallest}:
            with pytest.raises(UsageError) as caught:
                check_fpr(fpr, n)
            message = str(caught.value)
            assert f"needs at least {smallest} held-out images" in message
            assert f"there are {n}:" in message
            assert "\n" not in message
            offered = re.search(r"ask for --fpr (\S+) or more", message)
            assert offered
            check_fpr(float(offered[1]), n)


def test_a_rate_is_met_by_a_p_value_written_differently() -> None:
    assert flagged(np.array([1 / 20, 3 / 20, 0.1 + 0.2]), 0.15).tolist() == [True, True, False]
    assert flagged(np.array([0.1 + 0.2]), 0.3).tolist() == [True]
    assert flagged(np.array([1 / 20, 1 / 20 + 1e-6]), 0.05).tolist() == [True, False]


# ---- thresholds ----


@pytest.mark.parametrize("ties", [False, True])
def test_flagged_is_the_same_as_above_the_threshold(ties: bool) -> None:
    """For many numbers of calibration images and rates, at, between and beyond the calibration scores."""
    rng = np.random.default_rng(int(ties))
    for _ in range(600):
        n = int(rng.integers(1, 400))
        calibration = np.sort(rng.integers(0, 9, n).astype(float) if ties else rng.normal(size=n))
        between = (calibration[1:] + calibration[:-1]) / 2
        scores = np.concatenate([calibration, between, [calibration[0] - 1, calibration[-1] + 1, -np.inf, np.inf]])
        on_the_grid = float(rng.integers(1, n + 1)) / (n + 1)
        decimal = round(float(rng.uniform(1 / (n + 1), 1)), int(rng.integers(1, 10)))
        for fpr in (on_the_grid, decimal):
            if not 1 / (n + 1) <= fpr < 1:
                continue
            alarms = flagged(p_values(scores, calibration), fpr)
            assert np.array_equal(alarms, scores > threshold(calibration, fpr)), (n, fpr)


@pytest.mark.parametrize(
    ("fpr", "n"), [(0.333333333, 9998), (0.666666667, 9998), (0.0499999995, 9999), (0.679999999, 24)]
)
def test_threshold_and_p_values_agree_when_a_rate_nearly_meets_a_p_value(fpr: float, n: int) -> None:
    calibration = np.arange(float(n))
    scores = np.arange(-1, n + 1, 0.5)
    alarms = flagged(p_values(scores, calibration), fpr)
    assert np.array_equal(alarms, scores > threshold(calibration, fpr))


def test_threshold_of_a_known_set() -> None:
    calibration = np.arange(1.0, 20.0)  # 19 scores
    assert threshold(calibration, 0.05) == 19
    assert threshold(calibration, 0.1) == 18
    assert threshold(calibration, 0.149) == 18
    assert threshold(calibration, 0.95) == 1


def test_threshold_that_the_set_cannot_support_is_refused() -> None:
    with pytest.raises(UsageError, match="needs at least 19"):
        threshold(np.arange(18.0), 0.05)


@pytest.mark.parametrize("fpr", [0.05, 0.1, 0.33])
def test_share_above_the_threshold_is_at_most_the_rate(fpr: float) -> None:
    rng = np.random.default_rng(3)
    calibration = np.sort(rng.normal(size=5000))
    fresh = rng.normal(size=20_000)
    assert np.mean(calibration > threshold(calibration, fpr)) <= fpr
    assert np.mean(fresh > threshold(calibration, fpr)) == pytest.approx(fpr, abs=0.02)


# ---- splits ----


@pytest.mark.parametrize("n", [3, 4, 5, 8, 19, 20, 95, 1000])
@pytest.mark.parametrize(("calibration", "validation"), [(0.2, 0.05), (0.4, 0.4), (0.49, 0.49), (0.01, 0.01)])
def test_split_is_disjoint_whole_sorted_and_never_empty(n: int, calibration: float, validation: float) -> None:
    rows = split(n, calibration, validation, seed=0)
    parts = (rows.training, rows.validation, rows.calibration)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))
    for part in parts:
        assert len(part) >= 1
        assert np.array_equal(part, np.sort(part))


@pytest.mark.parametrize(("n", "sizes"), [(8000, (6000, 400, 1600)), (100, (75, 5, 20)), (3, (1, 1, 1))])
def test_split_sizes(n: int, sizes: tuple[int, int, int]) -> None:
    rows = split(n, 0.2, 0.05, seed=0)
    assert (len(rows.training), len(rows.validation), len(rows.calibration)) == sizes


def test_split_is_capped() -> None:
    rows = split(1_000_000, 0.2, 0.05, seed=0)
    assert len(rows.calibration) == 10_000
    assert len(rows.validation) == 2_000
    assert len(rows.training) == 988_000


@pytest.mark.parametrize("n", [0, 1, 2])
def test_too_few_rows_are_refused(n: int) -> None:
    with pytest.raises(UsageError, match=f"{n} different images are too few"):
        split(n, 0.2, 0.05, seed=0)


def test_split_follows_from_the_seed() -> None:
    first, again, other = (split(100, 0.2, 0.05, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.calibration, again.calibration)
    assert np.array_equal(first.training, again.training)
    assert not np.array_equal(first.calibration, other.calibration)


def test_split_is_random_over_the_rows() -> None:
    """Rows come sorted by path, often by class: no stretch of them may be left out."""
    counts = np.zeros(60)
    for seed in range(400):
        counts[split(60, 0.25, 0.05, seed).calibration] += 1
    assert counts.sum() == 400 * 15
    assert np.abs(counts - 100).max() < 5 * np.sqrt(400 * 0.25 * 0.75)


def test_a_split_by_content_keeps_images_where_they_were() -> None:
    rng = np.random.default_rng(0)
    digests = [rng.bytes(16) for _ in range(2000)]
    few, all_ = split_by_content(digests[:1000], 0.1, 0.05), split_by_content(digests, 0.1, 0.05)
    for rows in (few, all_):
        rows.check(2000)
        assert [len(part) for part in (rows.calibration, rows.validation)] == [
            round(share * sum(map(len, (rows.training, rows.validation, rows.calibration)))) for share in (0.1, 0.05)
        ]
    assert not set(few.training) & set(all_.calibration)
    assert len(set(few.calibration) & set(all_.calibration)) >= 80
    turned = split_by_content(digests[::-1], 0.1, 0.05)  # the order of the images does not matter
    assert set(1999 - turned.calibration) == set(all_.calibration)


@pytest.mark.parametrize("parts", [([0, 1], [1], [2]), ([0], [], [1]), ([0], [1], [3]), ([-1], [1], [2])])
def test_splits_that_make_no_sense(parts: tuple[list[int], ...]) -> None:
    with pytest.raises(UsageError, match="need different rows, at least one each|the split has row 3, counted from 0"):
        Split(*(np.array(part, dtype=np.int64) for part in parts)).check(3)

"""p-values, rates and thresholds: the formulas, their guarantees and their edges."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch

from featdiff.exceptions import UsageError
from featdiff.verdicts.calibration import Calibration, check_fpr, check_supported, is_supported, needed_for, offered


def by_hand(score: float, calibration: np.ndarray) -> float:
    return (1 + sum(1 for value in calibration if value >= score)) / (len(calibration) + 1)


# ---- p-values ----


@pytest.mark.parametrize("n", [1, 2, 7, 19, 200])
@pytest.mark.parametrize("ties", [False, True])
def test_p_values_follow_the_formula(n: int, ties: bool) -> None:
    rng = np.random.default_rng(n)
    draw = (lambda size: rng.integers(0, 4, size).astype(float)) if ties else rng.normal
    calibration = draw(size=n)
    scores = np.concatenate([draw(size=30), calibration, [-1e30, 1e30]])
    expected = [by_hand(score, calibration) for score in scores]
    np.testing.assert_allclose(Calibration(calibration).p_values(scores), expected, rtol=1e-15)


def test_a_tie_counts_against_the_alarm() -> None:
    assert Calibration([1.0, 2.0, 2.0, 3.0]).p_values(np.array([2.0])) == [4 / 5]


def test_range_of_p_values() -> None:
    p = Calibration(np.arange(19.0)).p_values(np.array([-1e300, -1, 0, 18, 18.5, 1e300]))
    np.testing.assert_allclose(p, [1, 1, 1, 2 / 20, 1 / 20, 1 / 20])


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_the_strangest(score: float) -> None:
    """A failed computation must not pass as ordinary."""
    calibration = Calibration(np.arange(9.0))
    p, flagged = calibration.flags(np.array([score, 100.0, -100.0]), 0.5)
    np.testing.assert_allclose(p, [0.1, 0.1, 1])
    assert flagged.tolist() == [True, True, False]

    p, flagged = calibration.flags(torch.tensor([score, 100.0, -100.0]), 0.1)
    np.testing.assert_allclose(p, [0.1, 0.1, 1])
    assert flagged.tolist() == [True, True, False]


def test_no_scores() -> None:
    p, flagged = Calibration(np.arange(9.0)).flags(np.empty(0), 0.5)
    assert p.shape == (0,)
    assert flagged.shape == (0,)


@pytest.mark.parametrize("n", [19, 50])
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_false_alarms_on_exchangeable_data_keep_the_rate(n: int, rate: float) -> None:
    """Over calibration sets, P(p <= a) = floor(a (n + 1)) / (n + 1) <= a; four standard errors of room."""
    rng, trials = np.random.default_rng(1), 4000
    alarms = 0
    for _ in range(trials):
        scores = rng.gumbel(size=n + 1)
        alarms += int(Calibration(scores[1:]).flags(scores[:1], rate)[1][0])
    exact = np.floor(rate * (n + 1) + 1e-9) / (n + 1)
    assert exact <= rate
    assert alarms / trials == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / trials))


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5])
def test_false_alarms_stay_below_the_rate_with_ties(rate: float) -> None:
    rng, trials = np.random.default_rng(2), 3000
    alarms = 0
    for _ in range(trials):
        scores = rng.integers(0, 5, 40).astype(float)
        alarms += int(Calibration(scores[1:]).flags(scores[:1], rate)[1][0])
    assert alarms / trials <= rate + 4 * np.sqrt(rate * (1 - rate) / trials)


# ---- rates ----


@pytest.mark.parametrize("fpr", [0, 0.0, 1, 1.0, -1, -0.05, 1.5, 5, float("nan"), float("inf"), True])
def test_rates_outside_0_to_1_are_refused(fpr: float) -> None:
    with pytest.raises(UsageError, match=f"^fpr, the false-alarm rate, must lie between 0 and 1, not {fpr}") as caught:
        check_fpr(fpr)
    assert caught.value.argument == "fpr"
    for check in (Calibration(np.arange(100.0)).threshold, Calibration(np.arange(100.0)).check):
        with pytest.raises(UsageError, match="^fpr, the false-alarm rate"):
            check(fpr)


@pytest.mark.parametrize("fpr", ["0.05", None, [0.05]])
def test_rates_that_are_no_numbers_are_refused(fpr: object) -> None:
    with pytest.raises(UsageError, match="^fpr, the false-alarm rate"):
        check_fpr(fpr)


@pytest.mark.parametrize("fpr", [0.05, 0.5, 1e-9, 0.999, np.float64(0.05), np.float32(0.05)])
def test_any_real_number_between_0_and_1_will_do(fpr: float) -> None:
    rate = check_fpr(fpr)
    assert type(rate) is float and rate == float(fpr)


@pytest.mark.parametrize(("fpr", "needed"), [(0.05, 19), (0.01, 99), (1 / 3, 2), (0.5, 1), (0.001, 999), (0.07, 14)])
def test_refusal_names_the_images_needed(fpr: float, needed: int) -> None:
    check_supported(fpr, needed)
    Calibration(np.arange(float(needed))).check(fpr)
    with pytest.raises(
        UsageError, match=rf"^fpr .* needs at least {needed} held-out images.*there are {needed - 1}:"
    ) as caught:
        check_supported(fpr, needed - 1)
    assert caught.value.argument == "fpr"


def test_the_numbers_in_a_refusal_are_right_for_many_rates() -> None:
    """What it says is needed is needed and is enough, and the rate that it offers instead works."""
    rng = np.random.default_rng(0)
    rates = [1 / k for k in range(2, 60)] + [round(float(rate), 4) for rate in rng.uniform(0.0005, 0.9, 200)]
    for fpr in rates:
        smallest = next(n for n in range(1, 5000) if fpr * (n + 1) >= 1 - 1e-9)
        check_supported(fpr, smallest)
        for n in {smallest - 1, smallest // 2} - {0, smallest}:
            with pytest.raises(UsageError) as caught:
                check_supported(fpr, n)
            message = str(caught.value)
            assert f"needs at least {smallest} held-out images" in message
            assert f"there are {n}:" in message
            assert "\n" not in message
            offered = re.search(r"ask for fpr (\S+) or more", message)
            assert offered
            check_supported(float(offered[1]), n)


def test_a_rate_is_met_by_a_p_value_written_differently() -> None:
    """Rates that are p-values but for the last bits of a float."""
    calibration = Calibration(np.arange(19.0))  # p-values are multiples of 1/20
    scores = np.array([18.5, 16.5, 13.5, 12.5])
    p, flagged = calibration.flags(scores, 0.15)
    np.testing.assert_allclose(p, [1 / 20, 3 / 20, 6 / 20, 7 / 20])
    assert flagged.tolist() == [True, True, False, False]
    assert 6 / 20 > 0.1 + 0.2 - 1e-9 and 0.1 + 0.2 != 0.3
    for rate in (0.3, 0.1 + 0.2, 0.3 - 1e-12):
        assert calibration.flags(scores, rate)[1].tolist() == [True, True, True, False]
    assert calibration.flags(scores, 0.05 - 1e-6)[1].tolist() == [False] * 4


# ---- thresholds ----


@pytest.mark.parametrize("ties", [False, True])
def test_flagged_is_the_same_as_above_the_threshold(ties: bool) -> None:
    """For many numbers of calibration images and rates, at, between and beyond the calibration scores."""
    rng = np.random.default_rng(int(ties))
    for _ in range(600):
        n = int(rng.integers(1, 400))
        calibration = np.sort(rng.integers(0, 9, n).astype(float) if ties else rng.normal(size=n))
        between = (calibration[1:] + calibration[:-1]) / 2
        scores = np.concatenate([calibration, between, [calibration[0] - 1, calibration[-1] + 1, -1e30, 1e30]])
        on_the_grid = float(rng.integers(1, n + 1)) / (n + 1)
        decimal = round(float(rng.uniform(1 / (n + 1), 1)), int(rng.integers(1, 10)))
        for fpr in (on_the_grid, decimal):
            if not 1 / (n + 1) <= fpr < 1:
                continue
            fitted = Calibration(calibration)
            alarms = fitted.flags(scores, fpr)[1]
            assert np.array_equal(alarms, scores > fitted.threshold(fpr)), (n, fpr)


@pytest.mark.parametrize(
    ("fpr", "n"), [(0.333333333, 9998), (0.666666667, 9998), (0.0499999995, 9999), (0.679999999, 24)]
)
def test_threshold_and_p_values_agree_when_a_rate_nearly_meets_a_p_value(fpr: float, n: int) -> None:
    calibration = Calibration(np.arange(float(n)))
    scores = np.arange(-1, n + 1, 0.5)
    alarms = calibration.flags(scores, fpr)[1]
    assert np.array_equal(alarms, scores > calibration.threshold(fpr))


def test_threshold_of_a_known_set() -> None:
    calibration = Calibration(np.arange(1.0, 20.0))  # 19 scores
    assert calibration.threshold(0.05) == 19
    assert calibration.threshold(0.1) == 18
    assert calibration.threshold(0.149) == 18
    assert calibration.threshold(0.95) == 1


def test_threshold_that_the_set_cannot_support_is_refused() -> None:
    with pytest.raises(UsageError, match="needs at least 19"):
        Calibration(np.arange(18.0)).threshold(0.05)


@pytest.mark.parametrize("fpr", [0.05, 0.1, 0.33])
def test_share_above_the_threshold_is_at_most_the_rate(fpr: float) -> None:
    rng = np.random.default_rng(3)
    held_out = rng.normal(size=5000)
    threshold = Calibration(held_out).threshold(fpr)
    fresh = rng.normal(size=20_000)
    assert np.mean(held_out > threshold) <= fpr
    assert np.mean(fresh > threshold) == pytest.approx(fpr, abs=0.02)


# ---- tensors ----


@pytest.mark.parametrize("n", [1, 19, 200, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_give_the_p_values_of_arrays(n: int, dtype: torch.dtype) -> None:
    """With ties, beyond both ends, and for NaN; in the precision of the scores."""
    rng = np.random.default_rng(n)
    calibration = Calibration(rng.integers(0, 9, n) / 8)
    values = [*rng.integers(-2, 11, 50) / 8, *rng.normal(size=20), -1e30, 1e30, np.nan]
    scores = torch.tensor(values, dtype=dtype)
    p = calibration.p_values(scores)
    assert p.dtype == dtype and p.shape == scores.shape
    expected = calibration.p_values(scores.double().numpy())
    np.testing.assert_allclose(p.double(), expected, rtol=1e-6 if dtype == torch.float32 else 1e-15)
    assert p.min() > 0 and p.max() <= 1


@pytest.mark.parametrize("n", [19, 200, 9_999])
def test_tensors_give_the_verdicts_of_arrays(n: int) -> None:
    """At rates that are p-values, where rounding to float32 would tell."""
    calibration = Calibration(np.arange(float(n)))
    scores = torch.arange(-1.0, n + 1, 0.5)
    for k in {1, 2, n // 7 + 1, n // 2, n}:
        rate = k / (n + 1)
        p, flagged = calibration.flags(scores, rate)
        assert flagged.dtype == torch.bool and torch.equal(p, calibration.p_values(scores))
        assert np.array_equal(flagged, calibration.flags(scores.numpy(), rate)[1])
        assert np.array_equal(flagged, scores > calibration.threshold(rate))
    assert calibration.flags(torch.empty(0), 0.5)[0].shape == (0,)


def test_tensors_can_be_traced_and_scored_in_any_mode() -> None:
    calibration = Calibration(np.arange(19.0))
    scores = torch.tensor([-1.0, 5.0, 18.5])
    with torch.inference_mode():  # what it keeps must outlive this
        expected = calibration.p_values(scores).clone()

    class Module(torch.nn.Module):
        def forward(self, scores: torch.Tensor) -> torch.Tensor:
            return calibration.p_values(scores)

    exported = torch.export.export(Module(), (scores,)).module()
    torch.testing.assert_close(exported(scores), torch.tensor([1.0, 15 / 20, 1 / 20]))
    leaf = scores.clone().requires_grad_()
    assert torch.equal(calibration.p_values(leaf), expected)


# ---- the object ----


def test_scores_are_sorted_and_read_only() -> None:
    given = np.array([3.0, 1.0, 2.0], dtype=np.float32)
    calibration = Calibration(given)
    assert calibration.scores.tolist() == [1, 2, 3] and calibration.scores.dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        calibration.scores[0] = 9
    given[:] = 0  # the caller's array stays the caller's
    assert calibration.scores.tolist() == [1, 2, 3] and given.flags.writeable


@pytest.mark.parametrize(
    "scores", [[], np.empty(0), [np.nan], [1.0, np.inf], [1.0, -np.inf], [[1.0, 2.0]], np.empty((0, 3)), 0.5]
)
def test_scores_that_cannot_calibrate_are_refused(scores: object) -> None:
    with pytest.raises(UsageError, match="at least one score, all finite"):
        Calibration(scores)  # type: ignore[arg-type]


def test_size_repr_and_smallest_rate() -> None:
    calibration = Calibration(np.arange(19.0))
    assert len(calibration) == 19
    assert calibration.smallest_fpr == 1 / 20
    assert repr(calibration) == "Calibration(n=19, smallest_fpr=0.05)"
    calibration.check(calibration.smallest_fpr)
    with pytest.raises(UsageError, match=r"fpr 0.049 needs at least 20 held-out images .*ask for fpr 0.05 or more"):
        calibration.check(0.049)


def test_a_deep_copy_is_the_same_object_for_nothing_about_it_changes() -> None:
    calibration = Calibration(np.arange(9.0))
    calibration.p_values(torch.zeros(1))
    holder = {"calibration": calibration, "again": calibration}
    other = copy.deepcopy(holder)
    assert other["calibration"] is other["again"] is calibration
    assert np.array_equal(other["calibration"].scores, calibration.scores)


# ---- groups ----


def grouped_by_hand(score: float, calibration: np.ndarray, groups: int) -> float:
    at_least = sum(1 for value in calibration if value >= score)
    return (1 + groups / len(calibration) * at_least) / (groups + 1)


@pytest.mark.parametrize(("n", "groups"), [(1, 1), (7, 2), (20, 5), (200, 19), (200, 200), (60, 1)])
@pytest.mark.parametrize("ties", [False, True])
def test_p_values_of_groups_follow_the_formula(n: int, groups: int, ties: bool) -> None:
    rng = np.random.default_rng(n)
    draw = (lambda size: rng.integers(0, 4, size).astype(float)) if ties else rng.normal
    values = draw(size=n)
    scores = np.concatenate([draw(size=30), values, [-1e30, 1e30]])
    expected = [grouped_by_hand(score, values, groups) for score in scores]
    calibration = Calibration(values, groups)
    np.testing.assert_allclose(calibration.p_values(scores), expected, rtol=1e-14)
    traced = calibration.p_values(torch.tensor(scores, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(traced, expected, rtol=1e-14)


@pytest.mark.parametrize("n", [1, 7, 19, 200, 333])
def test_as_many_groups_as_images_are_no_groups(n: int) -> None:
    """Bit by bit."""
    rng = np.random.default_rng(n)
    values = rng.normal(size=n)
    scores = np.concatenate([rng.normal(size=50), values])
    plain = Calibration(values)
    grouped = Calibration(values, groups=n)
    at_least = n - np.searchsorted(np.sort(values), scores, side="left")
    assert np.array_equal(plain.p_values(scores), (1 + at_least) / (n + 1))
    assert np.array_equal(grouped.p_values(scores), plain.p_values(scores))
    single = torch.tensor(scores, dtype=torch.float32)
    assert torch.equal(grouped.p_values(single), plain.p_values(single))
    for fpr in (0.5, 0.9):
        assert grouped.threshold(fpr) == plain.threshold(fpr)


@pytest.mark.parametrize(("n", "groups"), [(40, 19), (40, 39), (100, 20), (100, 99), (57, 19), (400, 33)])
def test_groups_thresholds_and_verdicts_agree(n: int, groups: int) -> None:
    rng = np.random.default_rng(groups)
    calibration = Calibration(rng.integers(0, 60, n).astype(float), groups)
    scores = np.concatenate([np.arange(-1, 61.0), np.arange(60) + 0.5])
    for fpr in (calibration.smallest_fpr, 0.05, 0.1, 0.2, 0.25, 0.5, 0.9):
        if fpr < calibration.smallest_fpr - 1e-12:
            continue
        p, flagged = calibration.flags(scores, fpr)
        assert np.array_equal(flagged, scores > calibration.threshold(fpr))
        p_single, flagged_single = calibration.flags(torch.tensor(scores, dtype=torch.float32), fpr)
        np.testing.assert_allclose(p_single, p, rtol=1e-6)
        assert flagged_single.tolist() == flagged.tolist()
        assert flagged.any() and not flagged.all()


def test_smallest_rate_is_that_of_the_groups() -> None:
    calibration = Calibration(np.arange(100.0), groups=19)
    assert calibration.groups == 19
    assert calibration.smallest_fpr == 1 / 20
    assert repr(calibration) == "Calibration(n=100, groups=19, smallest_fpr=0.05)"
    assert "groups" not in repr(Calibration(np.arange(100.0)))
    calibration.check(0.05)
    with pytest.raises(UsageError, match="needs at least 99 held-out groups of images.*there are 19: ") as caught:
        calibration.check(0.01)
    assert "ask for fpr 0.05 or more" in str(caught.value)
    assert calibration.p_values(np.array([1e9]))[0] == 1 / 20


@pytest.mark.parametrize("groups", [0, -1, 5])
def test_impossible_numbers_of_groups_are_refused(groups: int) -> None:
    with pytest.raises(UsageError, match=f"4 scores cannot come from {groups} groups"):
        Calibration(np.arange(4.0), groups)


@pytest.mark.parametrize(("groups", "size"), [(19, 1), (19, 5), (40, 3), (9, 30)])
@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5])
def test_false_alarms_keep_the_rate_where_members_of_a_group_are_copies(groups: int, size: int, rate: float) -> None:
    """Perfectly dependent members of groups of one size: P(p <= a) = floor(a (G + 1)) / (G + 1), as for G images."""
    rng = np.random.default_rng(groups)
    trials = 4000
    alarms = 0
    for _ in range(trials):
        levels = rng.gumbel(size=groups + 1)
        calibration = Calibration(np.repeat(levels[1:], size), groups)
        alarms += int(calibration.flags(levels[:1], rate)[1][0])
    exact = np.floor(rate * (groups + 1) + 1e-9) / (groups + 1)
    assert exact <= rate
    assert alarms / trials == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / trials))


@pytest.mark.parametrize("within", [0.1, 1.0])
def test_false_alarms_keep_the_rate_where_members_of_a_group_are_alike(within: float) -> None:
    """The level of a group and the place of a member in it: a member of a new group is flagged at most at the rate."""
    rng = np.random.default_rng(7)
    rate, groups, size, trials = 0.1, 19, 6, 4000
    alarms = 0
    for _ in range(trials):
        scores = rng.normal(size=(groups + 1, 1)) + within * rng.normal(size=(groups + 1, size))
        alarms += int(Calibration(scores[1:].ravel(), groups).flags(scores[0, :1], rate)[1][0])
    assert alarms / trials <= rate + 4 * np.sqrt(rate * (1 - rate) / trials)


# ---- advice ----


@pytest.mark.parametrize(
    ("n", "advice"), [(0, "nothing yet"), (1, "fpr 0.5 or more"), (9, "fpr 0.1 or more"), (18, "fpr 0.053 or more")]
)
def test_the_rate_that_is_offered(n: int, advice: str) -> None:
    assert offered(n) == advice


def test_the_rate_that_is_offered_is_supported_and_near_the_smallest() -> None:
    for n in range(1, 3000):
        rate = float(offered(n).removeprefix("fpr ").removesuffix(" or more"))
        assert is_supported(rate, n)
        assert rate <= 1.12 / (n + 1)


def test_the_number_that_is_needed_is_the_smallest() -> None:
    for fpr in (0.5, 0.3, 0.1, 0.05, 0.053, 0.01, 0.001, 1 / 3, 1 / 7):
        needed = needed_for(fpr)
        assert is_supported(fpr, needed)
        assert not is_supported(fpr, needed - 1)

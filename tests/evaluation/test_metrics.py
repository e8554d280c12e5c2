"""Metrics against scikit-learn and brute force."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from featdiff.evaluation.metrics import auroc, bootstrap_auroc, evaluate, fpr_at_tpr
from featdiff.exceptions import UsageError


def make(
    ties: bool, n_id: int = 120, n_ood: int = 77, shift: float = 0.8, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    home, away = rng.normal(size=n_id), rng.normal(shift, 1.5, size=n_ood)
    return (np.round(home), np.round(away)) if ties else (home, away)


def labelled(home: np.ndarray, away: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(1 for OOD, scores)."""
    return np.r_[np.zeros(len(home)), np.ones(len(away))], np.r_[home, away]


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_is_the_share_of_pairs_in_the_right_order(ties: bool) -> None:
    home, away = make(ties)
    pairs = np.mean([(b > a) + 0.5 * (b == a) for a in home for b in away])
    assert auroc(home, away) == pytest.approx(pairs, abs=1e-12)
    assert evaluate(home, away, resamples=2).auroc == auroc(home, away)
    assert auroc(home, away) == pytest.approx(roc_auc_score(*labelled(home, away)), abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_aupr_equals_scikit_learn_for_either_class(ties: bool) -> None:
    home, away = make(ties)
    is_ood, scores = labelled(home, away)
    metrics = evaluate(home, away, resamples=2)
    assert metrics.aupr_out == pytest.approx(average_precision_score(is_ood, scores), abs=1e-12)
    assert metrics.aupr_in == pytest.approx(average_precision_score(1 - is_ood, -scores), abs=1e-12)
    assert metrics.aupr_in != pytest.approx(metrics.aupr_out, abs=0.01)


def test_aupr_by_hand() -> None:
    """OOD scores 4 and 2 among 3 and 1: precision 1/1 at the first, 2/3 at the second."""
    metrics = evaluate(np.array([1.0, 3.0]), np.array([2.0, 4.0]), resamples=2)
    assert metrics.aupr_out == pytest.approx((1 + 2 / 3) / 2)
    assert metrics.aupr_in == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n_id", [1, 2, 19, 20, 21, 100, 1000])
@pytest.mark.parametrize("tpr", [0.95, 0.8])
def test_fpr_equals_the_roc_curve_of_scikit_learn(ties: bool, n_id: int, tpr: float) -> None:
    """ID is the positive class: the first point of the curve that accepts 95 % of it."""
    for seed in range(5):
        home, away = make(ties, n_id, seed=seed)
        is_ood, scores = labelled(home, away)
        fpr, found_tpr, _ = roc_curve(1 - is_ood, -scores, drop_intermediate=False)
        expected = fpr[np.flatnonzero(found_tpr >= tpr - 1e-12)[0]]
        assert fpr_at_tpr(home, away, tpr) == pytest.approx(expected, abs=1e-12)
        if tpr == 0.95:
            assert evaluate(home, away, resamples=2).fpr95 == pytest.approx(expected, abs=1e-12)


def test_fpr95_by_hand() -> None:
    home = np.arange(20.0)  # 95 % are at or below 18
    assert fpr_at_tpr(home, np.array([0.0, 18.0, 18.5, 30.0])) == 0.5


def test_perfect_and_reversed_separation() -> None:
    home, away = np.array([0.0, 1, 2]), np.array([5.0, 6])
    best, worst = evaluate(home, away), evaluate(away, home)
    assert (best.auroc, best.aupr_in, best.aupr_out, best.fpr95, best.auroc_ci) == (1, 1, 1, 0, (1, 1))
    assert (worst.auroc, worst.fpr95, worst.auroc_ci) == (0, 1, (0, 0))


def test_scores_that_are_all_the_same_say_nothing() -> None:
    metrics = evaluate(np.ones(10), np.ones(30))
    assert metrics.auroc == 0.5
    assert metrics.auroc_ci == (0.5, 0.5)
    assert metrics.fpr95 == 1
    assert (metrics.aupr_in, metrics.aupr_out) == (0.25, 0.75)


def test_metrics_depend_on_the_order_of_scores_only() -> None:
    home, away = make(ties=False)
    plain, bent = evaluate(home, away), evaluate(np.exp(home), np.exp(away))
    assert plain == bent


def test_metrics_do_not_depend_on_the_order_of_images() -> None:
    home, away = make(ties=True)
    shuffled = np.random.default_rng(1).permutation(home)
    first, second = evaluate(home, away, resamples=2), evaluate(shuffled, away, resamples=2)
    assert (first.auroc, first.aupr_in, first.aupr_out, first.fpr95) == pytest.approx(
        (second.auroc, second.aupr_in, second.aupr_out, second.fpr95)
    )


# ---- the interval ----


def test_interval_is_reproducible_and_holds_the_estimate() -> None:
    home, away = make(ties=False)
    metrics = evaluate(home, away)
    assert evaluate(home, away) == metrics
    assert evaluate(home, away, seed=1).auroc_ci != metrics.auroc_ci
    assert metrics.auroc_ci[0] < metrics.auroc < metrics.auroc_ci[1]
    assert evaluate(home, away, seed=1).auroc_ci == pytest.approx(metrics.auroc_ci, abs=0.02)


@pytest.mark.parametrize("ties", [False, True])
def test_interval_is_near_a_bootstrap_by_hand_with_scikit_learn(ties: bool) -> None:
    home, away = make(ties, 150, 100)
    rng = np.random.default_rng(5)
    areas = [roc_auc_score(*labelled(rng.choice(home, len(home)), rng.choice(away, len(away)))) for _ in range(300)]
    expected = np.quantile(areas, [0.025, 0.975])
    assert bootstrap_auroc(home, away, resamples=2000) == pytest.approx(tuple(expected), abs=0.02)


def test_interval_level() -> None:
    home, away = make(ties=False)
    narrow, wide = (bootstrap_auroc(home, away, level=level) for level in (0.5, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    widths = narrow[1] - narrow[0], wide[1] - wide[0]
    assert widths[1] / widths[0] == pytest.approx(2.576 / 0.674, rel=0.2)  # as of a normal distribution


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """N(0, 1) against N(1, 1): AUROC = Phi(1 / sqrt 2)."""
    truth = 0.5 * (1 + math.erf(0.5))
    rng, hits = np.random.default_rng(0), 0
    for seed in range(150):
        low, high = bootstrap_auroc(rng.normal(size=60), rng.normal(1, 1, 60), resamples=120, seed=seed)
        hits += low <= truth <= high
    assert 0.88 <= hits / 150 <= 0.99


def test_interval_narrows_with_more_images() -> None:
    small, large = (np.ptp(bootstrap_auroc(*make(False, n, n), resamples=400)) for n in (50, 5000))
    assert large < small / 5


def test_interval_leaves_the_global_random_state_untouched() -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    bootstrap_auroc(*make(ties=False), resamples=5)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


# ---- groups ----


def bursty(groups: int, size: int, shift: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores that are all but equal within a group, and the group of each."""
    rng = np.random.default_rng(seed)
    numbers = rng.permutation(np.repeat(np.arange(groups), size))
    return shift + rng.normal(size=groups)[numbers] + 0.05 * rng.normal(size=groups * size), numbers


def width(interval: tuple[float, float]) -> float:
    return interval[1] - interval[0]


def test_intervals_of_bursts_are_wider_by_groups() -> None:
    """Bursts of ten are a tenth of the evidence: by the square root of ten, about."""
    home, home_groups = bursty(30, 10, 0, seed=0)
    away, away_groups = bursty(30, 10, 1, seed=1)
    by_image = evaluate(home, away)
    by_group = evaluate(home, away, id_groups=home_groups, ood_groups=away_groups)
    assert 2.5 < width(by_group.auroc_ci) / width(by_image.auroc_ci) < 4
    assert by_group.auroc_ci[0] < by_group.auroc < by_group.auroc_ci[1]
    for name in ("auroc", "aupr_in", "aupr_out", "fpr95"):
        assert getattr(by_group, name) == getattr(by_image, name)


def test_intervals_of_bursts_hold_by_groups() -> None:
    """The true AUROC lies in about 95 % of the intervals by groups, and in far fewer of those by images."""
    truth = 0.7602  # P(N(1, 1) > N(0, 1)), for scores of different groups
    inside = np.zeros(2)
    for seed in range(60):
        home, home_groups = bursty(25, 8, 0, seed=2 * seed)
        away, away_groups = bursty(25, 8, 1, seed=2 * seed + 1)
        by_image = bootstrap_auroc(home, away, 200)
        by_group = bootstrap_auroc(home, away, 200, id_groups=home_groups, ood_groups=away_groups)
        for i, (low, high) in enumerate((by_image, by_group)):
            inside[i] += low <= truth <= high
    assert inside[0] / 60 < 0.7
    assert inside[1] / 60 > 0.85


def test_groups_of_one_image_give_the_interval_of_images() -> None:
    home, away = make(ties=False)
    by_image = bootstrap_auroc(home, away, 500)
    by_group = bootstrap_auroc(home, away, 500, id_groups=np.arange(len(home)), ood_groups=np.arange(len(away)))
    assert by_group == pytest.approx(by_image, abs=0.01)


def test_intervals_by_groups_follow_from_the_seed() -> None:
    home, home_groups = bursty(20, 5, 0, seed=0)
    away, away_groups = bursty(20, 5, 1, seed=1)
    intervals = [
        bootstrap_auroc(home, away, 100, seed, id_groups=home_groups, ood_groups=away_groups) for seed in (3, 3, 4)
    ]
    assert intervals[0] == intervals[1] != intervals[2]


def test_one_side_may_have_groups() -> None:
    home, home_groups = bursty(20, 10, 0, seed=0)
    away, _ = bursty(200, 1, 1, seed=1)
    both = bootstrap_auroc(home, away, 300)
    one = bootstrap_auroc(home, away, 300, id_groups=home_groups)
    assert width(one) > 1.5 * width(both)


def test_ties_and_groups_of_other_sizes_by_hand() -> None:
    """All resamples of two groups: each once, or one of them twice."""
    home, away = np.array([0.0, 1.0, 1.0]), np.array([1.0])
    found = {
        bootstrap_auroc(home, away, 1, seed, id_groups=np.array([0, 1, 1]), ood_groups=np.zeros(1, dtype=int))[0]
        for seed in range(40)
    }
    assert found == {1.0, 0.5, 2 / 3}


# ---- refusals and output ----


@pytest.mark.parametrize(
    ("home", "away", "message"),
    [
        ([], [1.0], "ID scores are empty"),
        ([1.0], [], "OOD scores are empty"),
        ([1.0, np.nan], [1.0], "ID scores are not all numbers"),
        ([1.0], [np.nan, 2.0], "OOD scores are not all numbers"),
        ([1.0, np.inf], [1.0], "ID scores are not all numbers"),
        ([1.0], [-np.inf], "OOD scores are not all numbers"),
    ],
)
def test_scores_that_make_no_sense_are_refused(home: list[float], away: list[float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(np.array(home), np.array(away))


def test_one_image_on_each_side_is_enough() -> None:
    metrics = evaluate(np.array([0.0]), np.array([1.0]))
    assert (metrics.auroc, metrics.fpr95, metrics.auroc_ci) == (1, 0, (1, 1))


def test_single_precision_scores_work() -> None:
    home, away = make(ties=False)
    single = evaluate(home.astype(np.float32), away.astype(np.float32))
    assert single.auroc == pytest.approx(auroc(home, away), abs=1e-6)


def test_json_form() -> None:
    metrics = evaluate(*make(ties=True))
    text = json.loads(json.dumps(metrics.to_dict()))
    assert list(text) == ["auroc", "aupr_in", "aupr_out", "fpr95", "auroc_ci"]
    assert text["auroc"] == metrics.auroc
    assert text["auroc_ci"] == list(metrics.auroc_ci)

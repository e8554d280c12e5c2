"""Images of one group stay on one side of a split; few groups all calibrate, by folds."""

from __future__ import annotations

import numpy as np
import pytest

from featdiff.data import splits
from featdiff.data.splits import FEW, FOLDS, Plan, Split, make_plan, split
from featdiff.exceptions import UsageError


def random_groups(n: int, count: int, seed: int, huge: bool = False) -> np.ndarray:
    """``count`` groups with numbers that have holes, in no order; one of them may hold half of the rows."""
    rng = np.random.default_rng(seed)
    names = rng.permutation(10 * count)[:count]
    labels = np.concatenate([np.arange(count), rng.integers(0, count, n - count)])
    if huge:
        labels[count : count + n // 2] = 0
    return names[rng.permutation(labels)]


def sides(part: Split, groups: np.ndarray) -> list[set[int]]:
    return [set(groups[rows].tolist()) for rows in (part.training, part.validation, part.calibration)]


def assert_apart(part: Split, groups: np.ndarray) -> None:
    """Parts share neither rows nor groups, and are sorted."""
    training, validation, calibration = sides(part, groups)
    assert not training & validation
    assert not training & calibration
    assert not validation & calibration
    for rows in (part.training, part.validation, part.calibration):
        assert np.array_equal(rows, np.unique(rows))


# ---- one split ----


@pytest.mark.parametrize("huge", [False, True])
@pytest.mark.parametrize(("n", "count"), [(3, 3), (9, 3), (40, 5), (60, 30), (300, 100), (300, 300), (1000, 7)])
def test_no_group_is_on_two_sides(n: int, count: int, huge: bool) -> None:
    for seed in range(20):
        groups = random_groups(n, count, seed, huge and n > 2 * count)
        part = split(n, 0.2, 0.05, seed, groups)
        part.check(n)
        assert_apart(part, groups)
        everything = np.concatenate([part.training, part.validation, part.calibration])
        assert np.array_equal(np.sort(everything), np.arange(n))


@pytest.mark.parametrize(
    ("count", "sizes"), [(100, (75, 5, 20)), (20, (12, 4, 4)), (5, (3, 1, 1)), (3, (1, 1, 1)), (1000, (750, 50, 200))]
)
def test_shares_count_groups(count: int, sizes: tuple[int, int, int]) -> None:
    """As many groups on each side as there would be images, were each a group."""
    groups = np.repeat(np.arange(count), 3)
    part = split(3 * count, 0.2, 0.05, 0, groups)
    assert tuple(map(len, sides(part, groups))) == sizes
    alone = split(count, 0.2, 0.05, 0)
    assert (len(alone.training), len(alone.validation), len(alone.calibration)) == sizes


def test_groups_of_one_image_change_nothing() -> None:
    for seed in range(5):
        plain = split(50, 0.2, 0.05, seed)
        grouped = split(50, 0.2, 0.05, seed, np.arange(50))
        for name in ("training", "validation", "calibration"):
            assert np.array_equal(getattr(plain, name), getattr(grouped, name))


def test_each_group_calibrates_about_as_often_as_any_other() -> None:
    groups = np.repeat(np.arange(40), np.arange(1, 41))
    counts = np.zeros(40)
    for seed in range(400):
        counts[np.unique(groups[split(len(groups), 0.25, 0.05, seed, groups).calibration])] += 1
    assert counts.sum() == 400 * 10
    assert np.abs(counts - 100).max() < 5 * np.sqrt(400 * 0.25 * 0.75)


def test_many_rows_are_capped_by_whole_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "MOST_CALIBRATION", 100)
    monkeypatch.setattr(splits, "MOST_VALIDATION", 40)
    groups = np.repeat(np.arange(300), 7)
    part = split(len(groups), 0.2, 0.1, 0, groups)
    assert len(part.calibration) == 98  # 14 groups of 7
    assert len(part.validation) == 35
    assert_apart(part, groups)
    for rows in (part.calibration, part.validation):
        assert set(np.bincount(groups[rows])) <= {0, 7}


def test_one_huge_group_is_capped_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "MOST_CALIBRATION", 50)
    groups = np.repeat(np.arange(3), 400)
    part = split(1200, 0.2, 0.05, 0, groups)
    assert len(part.calibration) == 50
    assert len(set(groups[part.calibration])) == 1
    assert_apart(part, groups)


def test_which_groups_are_kept_under_a_cap_is_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those that come first in a sorted list."""
    monkeypatch.setattr(splits, "MOST_CALIBRATION", 20)
    groups = np.repeat(np.arange(100), 2)
    firsts = [split(200, 0.4, 0.05, seed, groups).calibration.mean() for seed in range(30)]
    assert np.mean(firsts) == pytest.approx(99.5, abs=15)


# ---- plans ----


@pytest.mark.parametrize("huge", [False, True])
@pytest.mark.parametrize(("n", "count"), [(3, 3), (4, 4), (12, 4), (17, 17), (60, 9), (120, 120), (800, 500)])
def test_each_row_calibrates_once_by_a_model_that_has_not_seen_its_group(n: int, count: int, huge: bool) -> None:
    for seed in range(10):
        groups = random_groups(n, count, seed, huge and n > 2 * count)
        plan = make_plan(n, "auto", 0.05, seed, groups)
        assert plan.groups == count
        assert len(plan.folds) == min(FOLDS, count)
        assert np.array_equal(np.sort(plan.calibration), np.arange(n))

        for fold in plan.folds:
            fold.check(n)
            assert_apart(fold, groups)
            whole = np.concatenate([fold.training, fold.validation, fold.calibration])
            assert np.array_equal(np.sort(whole), np.arange(n))
        held_out = [len(set(groups[fold.calibration].tolist())) for fold in plan.folds]
        assert max(held_out) - min(held_out) <= 1

        assert len(plan.final.calibration) == 0
        assert_apart(plan.final, groups)
        assert len(plan.final.training) and len(plan.final.validation)
        final = np.concatenate([plan.final.training, plan.final.validation])
        assert np.array_equal(np.sort(final), np.arange(n))


def test_calibration_lists_folds_in_the_order_in_which_they_are_scored() -> None:
    plan = make_plan(11)
    assert plan.calibration.tolist() == [row for fold in plan.folds for row in fold.calibration.tolist()]
    single = make_plan(100, calibration=0.3)
    assert single.folds == ()
    assert single.calibration is single.final.calibration
    assert (len(single.calibration), single.groups) == (30, 30)


def test_folds_up_to_500_groups_and_a_fifth_of_more() -> None:
    assert FEW == 500
    assert len(make_plan(500).folds) == 5
    more = make_plan(501)
    assert more.folds == ()
    assert len(more.calibration) == more.groups == 100

    groups = np.repeat(np.arange(500), 4)
    assert len(make_plan(2000, groups=groups).folds) == 5
    groups = np.repeat(np.arange(600), 4)
    plan = make_plan(2400, groups=groups)
    assert plan.folds == ()
    assert (plan.groups, len(plan.calibration)) == (120, 480)


def test_a_share_that_is_given_makes_no_folds() -> None:
    plan = make_plan(60, calibration=0.25)
    assert plan.folds == ()
    assert np.array_equal(plan.final.calibration, split(60, 0.25, 0.05, 0).calibration)


def test_plans_follow_from_the_seed() -> None:
    def calibration(plan: Plan) -> list[int]:
        return plan.calibration.tolist()

    groups = random_groups(60, 12, 0)
    assert calibration(make_plan(60, seed=1, groups=groups)) == calibration(make_plan(60, seed=1, groups=groups))
    assert calibration(make_plan(60, seed=1, groups=groups)) != calibration(make_plan(60, seed=2, groups=groups))


# ---- too few ----


@pytest.mark.parametrize("calibration", ["auto", 0.2])
@pytest.mark.parametrize("count", [1, 2])
def test_fewer_than_three_groups_are_refused(count: int, calibration: float | str) -> None:
    groups = np.arange(30) % count
    with pytest.raises(UsageError, match=f"^too few groups of images, {count}: one each is needed to train.*about 20"):
        make_plan(30, calibration, groups=groups)


@pytest.mark.parametrize("calibration", ["auto", 0.2])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_fewer_than_three_images_are_refused(n: int, calibration: float | str) -> None:
    with pytest.raises(UsageError, match=f"^too few different images, {n}: one each is needed to train.*about 20"):
        make_plan(n, calibration)

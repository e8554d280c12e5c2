"""Differences of AUROC, FPR95 and verdicts, compared with definitions, bootstraps and other implementations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, norm

from featdiff.evaluation.metrics import auroc, fpr_at_tpr
from featdiff.evaluation.paired import Changes, Difference, auroc_difference, fpr95_difference
from featdiff.exceptions import UsageError

Pair = tuple[np.ndarray, np.ndarray]


def drawn(n_id: int, n_ood: int, better: float, seed: int = 0, ties: bool = False) -> tuple[Pair, Pair]:
    """Scores by A and by B, which see much the same; B sees OOD images ``better``."""
    rng = np.random.default_rng(seed)
    sets = []
    for count, shift in ((n_id, 0.0), (n_ood, 1.0)):
        own = rng.normal(size=count)
        by_a = own + shift + 0.5 * rng.normal(size=count)
        by_b = own + shift * (1 + better) + 0.5 * rng.normal(size=count)
        sets.append((by_a, np.round(by_b, 1) if ties else by_b))
    return sets[0], sets[1]


def by_definition(id_scores: Pair, ood_scores: Pair) -> float:
    """The standard error of the difference as DeLong et al. write it, with the matrices S10 and S01."""
    above = []
    for normal, strange in zip(id_scores, ood_scores, strict=True):
        above.append((strange[:, None] > normal) + 0.5 * (strange[:, None] == normal))
    s10 = np.cov([kernel.mean(1) for kernel in above])
    s01 = np.cov([kernel.mean(0) for kernel in above])
    contrast = np.array([-1.0, 1.0])
    variance = contrast @ (s10 / len(ood_scores[0]) + s01 / len(id_scores[0])) @ contrast
    return float(np.sqrt(variance))


def error_of(found: Difference) -> float:
    return (found.interval[1] - found.interval[0]) / 2 / float(norm.ppf(0.975))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("n_id", "n_ood"), [(30, 20), (200, 350)])
def test_the_interval_is_that_of_delong(n_id: int, n_ood: int, ties: bool) -> None:
    id_scores, ood_scores = drawn(n_id, n_ood, 0.3, ties=ties)
    found = auroc_difference(id_scores, ood_scores)
    assert found.values == (auroc(id_scores[0], ood_scores[0]), auroc(id_scores[1], ood_scores[1]))
    assert error_of(found) == pytest.approx(by_definition(id_scores, ood_scores), rel=1e-9)
    assert sum(found.interval) / 2 == pytest.approx(found.difference, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_as_another_package_has_it(ties: bool) -> None:
    other = pytest.importorskip("MLstatkit", reason="NOT COMPARED WITH ANOTHER DELONG: no mlstatkit")
    id_scores, ood_scores = drawn(150, 90, 0.2, ties=ties)
    found = auroc_difference(id_scores, ood_scores)
    is_ood = np.repeat([0, 1], [150, 90])
    by_a, by_b = (np.concatenate(part) for part in zip(id_scores, ood_scores, strict=True))
    z, p, *_ = other.Delong_test(is_ood, by_a, by_b)
    assert found.difference / error_of(found) == pytest.approx(z, rel=1e-9)
    assert found.is_shown == (p < 0.05)


def test_the_interval_is_about_that_of_a_bootstrap() -> None:
    id_scores, ood_scores = drawn(400, 300, 0.3)
    rng = np.random.default_rng(1)
    differences = []
    for _ in range(600):
        normal, strange = rng.integers(400, size=400), rng.integers(300, size=300)
        areas = [auroc(id_scores[i][normal], ood_scores[i][strange]) for i in (0, 1)]
        differences.append(areas[1] - areas[0])
    expected = np.quantile(differences, [0.025, 0.975])
    assert auroc_difference(id_scores, ood_scores).interval == pytest.approx(expected, abs=0.004)


def test_the_interval_holds_the_truth() -> None:
    """Of 400 pairs of equal models, about 5 % seem to differ; models that differ do so nearly always."""
    equal = [auroc_difference(*drawn(100, 80, 0.0, seed)).is_shown for seed in range(400)]
    assert 0.02 <= np.mean(equal) <= 0.08
    better = [auroc_difference(*drawn(300, 300, 0.6, seed)) for seed in range(50)]
    assert all(found.is_shown and found.difference > 0 for found in better)


def test_the_same_scores_do_not_differ() -> None:
    normal, strange = np.arange(30.0), np.arange(20.0, 50.0)
    for measure in (auroc_difference, fpr95_difference):
        found = measure((normal, normal), (strange, strange))
        assert found.interval == (0.0, 0.0)
        assert not found.is_shown


def test_groups_count_as_one() -> None:
    """Each image four times is as much evidence as once; taken for independent, it seems twice as precise."""
    id_scores, ood_scores = drawn(60, 50, 0.3)
    many: list[Pair] = [(np.repeat(a, 4), np.repeat(b, 4)) for a, b in (id_scores, ood_scores)]
    id_groups, ood_groups = np.repeat(np.arange(60), 4), np.repeat(np.arange(50), 4)
    once = auroc_difference(id_scores, ood_scores)
    grouped = auroc_difference(*many, id_groups, ood_groups)
    assert grouped.interval == pytest.approx(once.interval, rel=1e-9)
    assert error_of(auroc_difference(*many)) == pytest.approx(error_of(once) / 2, rel=0.02)

    alone = fpr95_difference(*many, np.arange(240), np.arange(200))
    assert alone == fpr95_difference(*many)
    wide, narrow = fpr95_difference(*many, id_groups, ood_groups).interval, alone.interval
    assert wide[1] - wide[0] > 1.3 * (narrow[1] - narrow[0])


def test_fpr95() -> None:
    id_scores, ood_scores = drawn(200, 300, 1.0)
    found = fpr95_difference(id_scores, ood_scores)
    assert found.values == tuple(fpr_at_tpr(id_scores[i], ood_scores[i]) for i in (0, 1))
    low, high = found.interval
    assert low < found.difference < high < 0  # B is better
    assert found == fpr95_difference(id_scores, ood_scores)
    # half as wide with four times the images
    narrow = fpr95_difference(*drawn(800, 1200, 1.0)).interval
    assert (narrow[1] - narrow[0]) / (high - low) == pytest.approx(0.5, abs=0.2)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (3, 3), (0, 5), (2, 9), (40, 12)])
def test_verdicts_that_changed(only_a: int, only_b: int) -> None:
    flags_a = np.repeat([True, True, False, False], [7, only_a, only_b, 20])
    flags_b = np.repeat([True, False, True, False], [7, only_a, only_b, 20])
    changes = Changes.of(flags_a, flags_b)
    count, least = only_a + only_b, min(only_a, only_b)
    p = min(1.0, 2 * float(binom.cdf(least, count, 0.5)))
    assert (changes.only_a, changes.only_b, changes.p) == (only_a, only_b, pytest.approx(p, rel=1e-12))


@pytest.mark.parametrize(
    ("id_scores", "ood_scores", "message"),
    [
        ((np.arange(3.0), np.arange(4.0)), (np.arange(3.0), np.arange(3.0)), "the ID images have 3 scores by A and 4"),
        ((np.arange(3.0), np.arange(3.0)), (np.arange(1.0), np.arange(1.0)), "at least 2 OOD images, and there are 1"),
        ((np.arange(3.0), np.array([0, 1, np.nan])), (np.arange(3.0), np.arange(3.0)), "ID scores are not all numbers"),
    ],
)
def test_what_cannot_be_compared(id_scores: Pair, ood_scores: Pair, message: str) -> None:
    for measure in (auroc_difference, fpr95_difference):
        with pytest.raises(UsageError, match=message):
            measure(id_scores, ood_scores)


def test_one_group_says_nothing() -> None:
    id_scores, ood_scores = drawn(10, 10, 0.3)
    with pytest.raises(UsageError, match="all in one group"):
        auroc_difference(id_scores, ood_scores, np.zeros(10, dtype=int))

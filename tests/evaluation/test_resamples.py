"""Resamples as counts, compared with the drawn images themselves."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from featdiff.evaluation.metrics import bootstrap_auroc, fpr_at_tpr
from featdiff.evaluation.resamples import draw_counts, percentiles, resampled_aurocs, resampled_fprs

RESAMPLES = 150  # more than are computed at once


def scores(n_id: int, n_ood: int, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    normal, strange = rng.normal(size=n_id), rng.normal(1, 1, n_ood)
    return (np.round(normal), np.round(strange)) if ties else (normal, strange)


def drawn(sizes: tuple[int, int], groups: tuple[np.ndarray, np.ndarray] | None) -> list[tuple[np.ndarray, np.ndarray]]:
    """The images of each resample, by the same random numbers."""
    rng = np.random.default_rng(3)
    found = []
    for _ in range(RESAMPLES):
        sides = []
        for k, size in enumerate(sizes):
            if groups is None:
                sides.append(rng.integers(size, size=size))
                continue
            independent = len(np.unique(groups[k]))
            chosen = rng.integers(independent, size=independent)
            sides.append(np.concatenate([np.flatnonzero(groups[k] == group) for group in chosen]))
        found.append((sides[0], sides[1]))
    return found


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("sizes", [(40, 25), (33, 90)])
def test_every_resample_is_that_of_the_images(sizes: tuple[int, int], grouped: bool, ties: bool) -> None:
    normal, strange = scores(*sizes, ties)
    groups = (np.arange(sizes[0]) % 7, np.arange(sizes[1]) % 5) if grouped else None
    counts = draw_counts(sizes, RESAMPLES, 3, groups)
    areas, rates = resampled_aurocs(normal, strange, *counts), resampled_fprs(normal, strange, *counts)

    for i, (inside, outside) in enumerate(drawn(sizes, groups)):
        assert np.array_equal(counts[0][:, i], np.bincount(inside, minlength=sizes[0]))
        assert np.array_equal(counts[1][:, i], np.bincount(outside, minlength=sizes[1]))
        is_ood = np.repeat([0, 1], [len(inside), len(outside)])
        area = roc_auc_score(is_ood, np.concatenate([normal[inside], strange[outside]]))
        assert areas[i] == pytest.approx(area, abs=1e-12)
        assert rates[i] == pytest.approx(fpr_at_tpr(normal[inside], strange[outside]), abs=1e-12)
    assert bootstrap_auroc(normal, strange, RESAMPLES, 3, 0.9, *(groups or ())) == percentiles(areas, 0.9)


def test_rates_at_another_threshold() -> None:
    normal, strange = scores(60, 50, ties=False)
    counts = draw_counts((60, 50), RESAMPLES, 3)
    expected = [fpr_at_tpr(normal[a], strange[b], 0.8) for a, b in drawn((60, 50), None)]
    assert resampled_fprs(normal, strange, *counts, tpr=0.8) == pytest.approx(expected, abs=1e-12)


def test_draws_follow_from_the_seed() -> None:
    first, again, other = (draw_counts([30], 20, seed)[0] for seed in (0, 0, [0, 1]))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert (first.sum(0) == 30).all()

"""Which images train, validate and calibrate."""

from __future__ import annotations

import numpy as np
import pytest

from featdiff.data.splits import Split, split, split_by_content
from featdiff.exceptions import UsageError


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
    with pytest.raises(UsageError, match=f"too few different images, {n}:"):
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

"""Near-copies and odd images, on seeded features of which it is known who belongs together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_stores import in_memory
from torch import Tensor

from featdiff.scores import near_copies
from featdiff.scores.near_copies import NearCopies, find_near_copies, nearest_outside, oddness


def itself(x: Tensor) -> Tensor:
    """The space of the features themselves."""
    return x


def find(rows: np.ndarray) -> NearCopies:
    return find_near_copies(in_memory(rows), [itself])


def gaussian(n: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, width))


def bursts(n: int, size: int, width: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows around random centres, shuffled, and the burst of each."""
    rng = np.random.default_rng(seed)
    burst = rng.permutation(np.repeat(np.arange(n // size), size))
    centres = rng.normal(size=(n // size, width))
    return centres[burst] + noise * rng.normal(size=(len(burst), width)), burst


def precision_and_recall(found: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Of pairs that are put into one group."""
    upper = np.triu_indices(len(true), 1)
    together = (found[:, None] == found)[upper]
    belong = (true[:, None] == true)[upper]
    both = (together & belong).sum()
    return float(both / together.sum()), float(both / belong.sum())


# ---- independent images ----


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("n", [100, 600])
@pytest.mark.parametrize("width", [2, 4, 8, 32, 128])
def test_independent_images_have_few_near_copies(width: int, n: int, seed: int) -> None:
    near = find(gaussian(n, width, seed))
    assert near.copied <= (0.3 if width <= 8 else 0.05)
    assert near.false_alarms == pytest.approx(0.05, abs=0.02)
    assert not near.spoil_a_split
    assert np.bincount(near.groups).max() <= 10  # nothing is chained


@pytest.mark.parametrize("width", [4, 32])
def test_classes_are_no_bursts(width: int) -> None:
    """Five kinds of things, whose centres lie as far from each other as their members."""
    rng = np.random.default_rng(0)
    kind = np.repeat(np.arange(5), 100)
    rows = rng.normal(size=(5, width))[kind] + rng.normal(size=(500, width))
    near = find(rows)
    assert near.copied < 0.5
    assert near.false_alarms < 0.1
    assert not near.spoil_a_split


# ---- bursts ----


@pytest.mark.parametrize("size", [4, 30, 40])
@pytest.mark.parametrize(("width", "noise"), [(4, 0.05), (8, 0.1), (32, 0.3), (128, 0.3)])
def test_bursts_are_found(width: int, noise: float, size: int) -> None:
    """Short ones, ones that hold the 20th neighbour, too, and ones of a sixth of all."""
    rows, burst = bursts(240, size, width, noise)
    near = find(rows)
    precision, recall = precision_and_recall(near.groups, burst)
    assert precision > 0.94
    assert recall > 0.98
    assert near.copied > 0.98
    assert near.spoil_a_split
    assert near.false_alarms > 0.9


@pytest.mark.parametrize("size", [4, 30, 100])
def test_bursts_among_more_images(size: int) -> None:
    rows, burst = bursts(600, size, 16, 0.15, seed=3)
    near = find(rows)
    precision, recall = precision_and_recall(near.groups, burst)
    assert precision > 0.94
    assert recall > 0.98
    assert near.spoil_a_split


def test_vague_bursts_are_not_taken_for_more_than_they_are() -> None:
    """What is linked belongs together, though much is missed."""
    rows, burst = bursts(240, 30, 8, 0.3)
    precision, recall = precision_and_recall(find(rows).groups, burst)
    assert precision > 0.99
    assert 0.05 < recall < 0.9


def test_a_few_pairs_do_not_spoil_a_split() -> None:
    rows = gaussian(300, 32)
    rows[280:] = rows[:20] + 0.01 * gaussian(20, 32, seed=9)
    near = find(rows)
    assert (near.groups[280:] == near.groups[:20]).all()
    assert 40 / 300 <= near.copied < 0.2
    assert not near.spoil_a_split


def test_half_of_the_images_in_bursts() -> None:
    """They are found; but the limit is set by the others, and holds."""
    together, burst = bursts(150, 5, 32, 0.1)
    rows = np.concatenate([together, gaussian(150, 32, seed=5)])
    near = find(rows)
    assert 0.5 <= near.copied < 0.55
    assert precision_and_recall(near.groups[:150], burst) == (1, 1)
    assert 0.05 < near.false_alarms < 0.1
    assert not near.spoil_a_split


def test_the_rate_of_false_alarms_is_estimated() -> None:
    """What a split by chance gives: the share of new bursts that are farther than 95 % of images that have siblings."""
    independent = find(gaussian(400, 16)).false_alarms
    bursty = find(bursts(400, 8, 16, 0.1)[0]).false_alarms
    assert independent == pytest.approx(0.05, abs=0.01)
    assert bursty == 1


def test_what_spoils_a_split() -> None:
    groups = np.arange(4)
    for copied, false_alarms, spoils in ((0.4, 0.2, True), (0.3, 0.2, False), (0.4, 0.09, False), (1.0, 0.05, False)):
        assert NearCopies(groups, copied, groups, false_alarms).spoil_a_split is spoils


# ---- what is returned ----


def test_the_nearest_image_lies_outside_the_own_group() -> None:
    rows, _ = bursts(120, 6, 16, 0.1)
    near = find(rows)
    assert near.groups.shape == near.nearest.shape == (120,)
    assert (near.groups[near.nearest] != near.groups).all()

    distances = np.linalg.norm(rows[:, None] - rows, axis=2)
    distances[near.groups[:, None] == near.groups] = np.inf
    assert np.array_equal(near.nearest, distances.argmin(1))


@pytest.mark.parametrize("size", [1, 4, 60, 119])
def test_the_nearest_image_outside_groups_that_are_given(size: int) -> None:
    """Also groups that are larger than the number of neighbours that are looked at."""
    rows = gaussian(120, 16)
    groups = np.arange(120) // size
    distances = np.linalg.norm(rows[:, None] - rows, axis=2)
    distances[groups[:, None] == groups] = np.inf
    found = nearest_outside(in_memory(rows), [itself], groups)
    assert np.array_equal(found, distances.argmin(1))
    assert (nearest_outside(in_memory(rows), [itself], np.zeros(120, dtype=int)) == -1).all()


def test_groups_are_numbered_without_holes() -> None:
    near = find(bursts(120, 6, 16, 0.1)[0])
    assert np.array_equal(np.unique(near.groups), np.arange(20))
    assert near.copied == 1


def test_the_order_and_the_scale_of_images_do_not_matter() -> None:
    rows, _ = bursts(200, 5, 16, 0.25)
    order = np.random.default_rng(1).permutation(200)
    plain = find(rows)
    for other in (find(rows[order]), find(1000 * rows[order]), find(1e-4 * rows[order])):
        assert other.copied == pytest.approx(plain.copied, abs=0.02)
        assert other.false_alarms == pytest.approx(plain.false_alarms, abs=0.02)
        moved = plain.groups[order]
        assert np.mean((other.groups[:, None] == other.groups) != (moved[:, None] == moved)) < 0.002


def test_each_space_counts_alike() -> None:
    """Bursts in a space of small numbers are seen beside a space of large ones."""
    rows, burst = bursts(240, 6, 16, 0.05)
    other, _ = bursts(240, 6, 16, 0.05)
    both = in_memory(np.concatenate([1e-3 * rows, 1e3 * other], axis=1))
    near = find_near_copies(both, [lambda x: x[:, :16], lambda x: x[:, 16:]])
    assert precision_and_recall(near.groups, burst) == (1, 1)

    noise = in_memory(np.concatenate([rows, gaussian(240, 16, seed=4)], axis=1))
    assert find_near_copies(noise, [lambda x: x[:, :16]]).copied == 1
    assert find_near_copies(noise, [lambda x: x[:, 16:]]).copied < 0.2


def test_wide_spaces_are_projected() -> None:
    rows, burst = bursts(120, 6, 3000, 0.3)
    precision, recall = precision_and_recall(find(rows).groups, burst)
    assert precision == recall == 1


# ---- hard cases ----


@pytest.mark.parametrize("copies", [2, 64, 65, 66, 100, 150])
def test_copies_at_distance_0(copies: int) -> None:
    """More of them than neighbours are looked at."""
    rows = gaussian(200, 16)
    rows[:copies] = rows[0]
    near = find(rows)
    assert len(set(near.groups[:copies].tolist())) == 1
    assert near.copied >= copies / 200
    assert (near.groups[near.nearest] != near.groups).all()
    assert np.isfinite(near.false_alarms)


def test_all_images_are_copies() -> None:
    near = find(np.ones((80, 8)))
    assert len(set(near.groups.tolist())) == 1
    assert near.copied == 1
    assert (near.nearest == -1).all()


def test_everything_is_a_copy_of_one_of_two_images() -> None:
    rows = np.repeat(gaussian(2, 8), 60, axis=0)
    near = find(rows)
    assert precision_and_recall(near.groups, np.repeat([0, 1], 60)) == (1, 1)
    assert (near.nearest[:60] >= 60).all()
    assert (near.nearest[60:] < 60).all()


@pytest.mark.parametrize("width", [1, 2, 32])
@pytest.mark.parametrize("n", [*range(4, 26)])
def test_few_images(n: int, width: int) -> None:
    for seed in range(3):
        near = find(gaussian(n, width, seed))
        assert near.groups.shape == near.nearest.shape == (n,)
        assert 0 <= near.copied <= 1
        assert 0 <= near.false_alarms <= 1
        others = near.nearest >= 0
        assert (near.groups[near.nearest[others]] != near.groups[others]).all()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_so_few_images_are_no_near_copies(n: int) -> None:
    near = find(np.ones((n, 5)) + 1e-6 * gaussian(n, 5))
    assert near.groups.tolist() == list(range(n))
    assert (near.copied, near.false_alarms, near.spoil_a_split) == (0, 0, False)
    if n == 1:
        assert near.nearest.tolist() == [-1]
    else:
        assert (near.nearest != near.groups).all() and (near.nearest >= 0).all()


def test_a_pair_among_few_images() -> None:
    rows = gaussian(20, 32)
    rows[19] = rows[3] + 1e-3
    groups = find(rows).groups
    assert groups[19] == groups[3]
    assert len(set(groups.tolist())) >= 17


# ---- odd images ----


def odd_rows(rows: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    return oddness(in_memory(rows), [itself], np.arange(len(rows)) if groups is None else groups)


@pytest.mark.parametrize("width", [4, 32])
def test_planted_odd_images_are_the_oddest(width: int) -> None:
    """Though they are as like each other as ordinary images are."""
    rows = gaussian(250, width)
    planted = np.arange(40, 55)
    rows[planted] = 3 + gaussian(15, width, seed=8)
    found = np.argsort(-odd_rows(rows))[:15]
    assert len(np.intersect1d(found, planted)) >= 14


@pytest.mark.parametrize("width", [4, 32])
def test_near_copies_of_odd_images_do_not_hide_them(width: int) -> None:
    """Three bursts of five odd images: found where near-copies are left out."""
    rows = gaussian(250, width)
    planted = np.arange(40, 55)
    rows[planted] = np.repeat(4 + gaussian(3, width, seed=8), 5, axis=0) + 0.01 * gaussian(15, width, seed=9)
    near = find(rows)
    found = np.argsort(-odd_rows(rows, near.groups))[:15]
    assert set(found.tolist()) == set(planted.tolist())
    of_burst = near.groups[planted].reshape(3, 5)
    assert (of_burst == of_burst[:, :1]).all()


def test_a_burst_of_odd_images_does_not_hide_in_itself() -> None:
    """Its group is left out: nine of 100 are all but the same."""
    rows = gaussian(100, 16)
    rows[:9] = 12 + 0.01 * gaussian(9, 16, seed=2)
    groups = np.concatenate([np.zeros(9, dtype=int), np.arange(1, 92)])
    score = odd_rows(rows, groups)
    assert score[:9].min() > score[9:].max()
    assert score[:9].min() > 3


def test_a_group_as_large_as_the_usual_is_compared_with_itself() -> None:
    """Half of all images in one group are no odd ones."""
    rows = gaussian(200, 16)
    rows[:100] = 0.1 * rows[:100]
    rows[199] = 6
    groups = np.concatenate([np.zeros(100, dtype=int), np.arange(1, 101)])
    score = odd_rows(rows, groups)
    assert score.argmax() == 199
    assert score[:100].max() < score[100:].max()


def test_oddness_is_0_and_1_for_the_bulk() -> None:
    score = odd_rows(gaussian(1000, 16))
    assert np.median(score) == pytest.approx(0, abs=1e-9)
    assert 1.4826 * np.median(np.abs(score)) == pytest.approx(1, abs=1e-6)
    assert np.mean(score > 3) < 0.03


def test_oddness_follows_the_distance() -> None:
    rows = gaussian(200, 16)
    rows[:4] = np.array([0.0, 2.0, 4.0, 8.0])[:, None]
    score = odd_rows(rows)
    assert score[0] < score[1] < score[2] < score[3]
    assert score[0] < 0


def test_oddness_does_not_depend_on_the_order() -> None:
    rows = gaussian(300, 16)
    rows[:10] += 3
    groups = np.concatenate([np.zeros(5, dtype=int), np.arange(1, 296)])
    order = np.random.default_rng(2).permutation(300)
    np.testing.assert_allclose(odd_rows(rows[order], groups[order]), odd_rows(rows, groups)[order], atol=1e-4)


def test_oddness_of_many_images_compares_with_some(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = gaussian(900, 16)
    rows[::100] += 4
    plain = odd_rows(rows)
    monkeypatch.setattr(near_copies, "_REFERENCE", 300)
    some = odd_rows(rows)
    assert set(np.argsort(-some)[:9].tolist()) == set(np.argsort(-plain)[:9].tolist()) == set(range(0, 900, 100))
    assert np.corrcoef(plain, some)[0, 1] > 0.9


def test_oddness_adds_spaces_of_any_scale() -> None:
    left = gaussian(200, 8)
    right = gaussian(200, 8, seed=1)
    left[3] += 8
    right[5] += 8
    rows = in_memory(np.concatenate([1e-3 * left, 1e3 * right], axis=1))
    score = oddness(rows, [lambda x: x[:, :8], lambda x: x[:, 8:]], np.arange(200))
    assert set(np.argsort(-score)[:2].tolist()) == {3, 5}


@pytest.mark.parametrize("n", [1, 2, 4, 5, 9, 20, 25])
def test_oddness_of_few_images(n: int) -> None:
    score = odd_rows(gaussian(n, 8))
    assert score.shape == (n,)
    assert np.isfinite(score).all()


def test_oddness_of_copies_is_finite() -> None:
    rows = gaussian(100, 8)
    rows[:90] = rows[0]
    groups = np.concatenate([np.zeros(90, dtype=int), np.arange(1, 11)])
    score = odd_rows(rows, groups)
    assert np.isfinite(score).all()
    assert score[:90].max() < score[90:].min()
    assert np.isfinite(odd_rows(np.ones((50, 4)))).all()


def test_oddness_reads_in_chunks() -> None:
    """More rows than a chunk has, in a space on its own device and type."""
    rows = torch.randn(1500, 4, generator=torch.Generator().manual_seed(0))
    rows[1200] = 9
    assert int(odd_rows(rows.numpy()).argmax()) == 1200

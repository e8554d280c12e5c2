"""The choice of a bank: how many vectors, which ones, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from featdiff.exceptions import UsageError
from featdiff.scores.neighbors import CORESETS, check_coreset, coreset


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", CORESETS)
@pytest.mark.parametrize(("n", "size"), [(200, 1), (200, 30), (200, 199)])
def test_a_coreset_has_unique_ascending_indices(method: str, n: int, size: int) -> None:
    indices = coreset(normal(n, 6), size, method)
    assert len(indices) == size
    assert (np.diff(indices) > 0).all()
    assert 0 <= indices[0] <= indices[-1] < n


@pytest.mark.parametrize("method", CORESETS)
@pytest.mark.parametrize("size", [50, 51, 10_000])
def test_a_small_set_is_kept_whole(method: str, size: int) -> None:
    assert coreset(normal(50, 6), size, method).tolist() == list(range(50))


@pytest.mark.parametrize("method", CORESETS)
def test_a_coreset_follows_from_the_seed(method: str) -> None:
    vectors = normal(300, 6)
    first, again, other = (coreset(vectors, 20, method, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_random_keeps_the_density() -> None:
    """Every vector equally often over seeds, within five standard errors."""
    vectors, counts = torch.zeros(40, 1), np.zeros(40)
    for seed in range(400):
        counts[coreset(vectors, 10, "random", seed)] += 1
    assert counts.sum() == 400 * 10
    assert np.abs(counts - 100).max() < 5 * np.sqrt(400 * 0.25 * 0.75)


def farthest_first(vectors: np.ndarray, size: int, start: int) -> list[int]:
    """k-center greedy by its definition, slow."""
    chosen = [start]
    while len(chosen) < size:
        gaps = [min(np.linalg.norm(v - vectors[c]) for c in chosen) for v in vectors]
        chosen.append(int(np.argmax(gaps)))
    return sorted(chosen)


@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_takes_the_farthest_vector_each_time(seed: int) -> None:
    vectors = normal(50, 3)
    chosen = coreset(vectors, 9, "greedy", seed).tolist()
    assert chosen in [farthest_first(vectors.double().numpy(), 9, start) for start in chosen]


@pytest.mark.parametrize("seed", range(5))
def test_greedy_covers_a_far_outlier(seed: int) -> None:
    vectors = normal(300, 6)
    vectors[123] += 40
    assert 123 in coreset(vectors, 2, "greedy", seed)


@pytest.mark.parametrize("method", ["greedy", "cluster"])
def test_every_group_has_its_vector(method: str) -> None:
    groups = torch.arange(5).repeat_interleave(torch.tensor([200, 100, 50, 30, 20]))
    vectors = 100 * torch.eye(5)[groups] + normal(400, 5)
    assert groups[coreset(vectors, 5, method)].tolist() == [0, 1, 2, 3, 4]


def test_cluster_takes_the_vectors_in_the_middle() -> None:
    """Of a group of vectors around one in their middle, that one."""
    offsets = torch.cat([torch.zeros(1, 3), torch.eye(3), -torch.eye(3)])
    vectors = torch.cat([offsets, offsets + 100, offsets - 100])
    assert coreset(vectors, 3, "cluster").tolist() == [0, 7, 14]


@pytest.mark.parametrize("method", CORESETS)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_copies_still_fill_the_bank(method: str) -> None:
    vectors = torch.ones(60, 4)
    vectors[[20, 40]] = torch.tensor([[5.0], [-5.0]])
    for seed in range(3):
        indices = coreset(vectors, 10, method, seed)
        assert len(set(indices.tolist())) == 10
        if method == "greedy":  # what differs comes before any copy
            assert {20, 40} <= set(indices.tolist())


@pytest.mark.parametrize("method", CORESETS)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_vectors_that_are_all_the_same_give_different_indices(method: str) -> None:
    indices = coreset(torch.full((30, 4), 0.3), 12, method)
    assert len(set(indices.tolist())) == 12


def test_coreset_refuses_what_makes_no_sense() -> None:
    with pytest.raises(UsageError, match="unknown coreset 'kmeans'; known: random, greedy, cluster"):
        coreset(normal(9, 2), 3, "kmeans")
    for method in CORESETS:
        check_coreset(method)
        for size in (0, -3):
            with pytest.raises(UsageError, match=f"size of a bank must be above 0, not {size}"):
                coreset(normal(9, 2), size, method)


@pytest.mark.parametrize("method", ["greedy", "cluster"])
def test_coreset_names_the_row_of_a_nan(method: str) -> None:
    vectors = normal(20, 3)
    vectors[11, 1] = torch.nan
    with pytest.raises(UsageError, match="the vectors of a bank hold NaN or infinite values, first in row 11"):
        coreset(vectors, 5, method)


def test_random_refuses_nan() -> None:
    with pytest.raises(UsageError, match="NaN"):
        coreset(torch.full((9, 2), torch.nan), 3, "random")


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_cluster_fills_up_at_random() -> None:
    assert len({tuple(coreset(torch.ones(60, 4), 10, "cluster", seed)) for seed in range(4)}) > 1

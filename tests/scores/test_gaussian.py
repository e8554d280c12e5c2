"""Gaussian heads against numpy and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import OAS, EmpiricalCovariance
from sklearn.decomposition import PCA
from torch import Tensor

from featdiff.exceptions import UsageError
from featdiff.scores.gaussian import Mahalanobis, Moments, PrincipalResidual, moments, shrunk


def correlated(n: int, width: int, seed: int = 0) -> np.ndarray:
    """Vectors (n, width), float64, off the origin, of uneven variances and correlated."""
    mixing = np.random.default_rng(99).normal(size=(width, width)) * np.geomspace(3, 0.1, width)[:, None]
    return np.random.default_rng(seed).normal(size=(n, width)) @ mixing + np.arange(width)


def of(vectors: np.ndarray) -> Moments:
    return moments([torch.from_numpy(vectors)], vectors.shape[1])


# ---- moments ----


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("sizes", [[500], [1, 499], [7, 0, 200, 1, 1, 91, 200], [1] * 500])
def test_chunks_of_any_size_give_the_moments_of_the_whole(sizes: list[int], offset: float) -> None:
    vectors = correlated(500, 6) + offset
    actual = moments(torch.from_numpy(vectors).split(sizes), 6)
    assert actual.n == 500
    np.testing.assert_allclose(actual.mean.numpy(), vectors.mean(0), rtol=1e-14 if offset else 1e-12, atol=1e-12)
    expected = np.cov(vectors - offset, rowvar=False, ddof=0)
    np.testing.assert_allclose(actual.covariance.numpy(), expected, rtol=1e-8, atol=1e-8)


def test_single_precision_is_summed_in_double() -> None:
    vectors = (correlated(3000, 4) + 1e4).astype(np.float32)
    actual = moments(torch.from_numpy(vectors).split(17), 4)
    assert actual.mean.dtype == actual.covariance.dtype == torch.float64
    np.testing.assert_allclose(actual.mean.numpy(), vectors.astype(float).mean(0), rtol=1e-13)
    expected = np.cov(vectors.astype(float), rowvar=False, ddof=0)
    np.testing.assert_allclose(actual.covariance.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_moments_leave_the_chunks_alone() -> None:
    chunk = torch.from_numpy(correlated(10, 3))
    before = chunk.clone()
    moments([chunk, chunk], 3)
    assert torch.equal(chunk, before)


@pytest.mark.parametrize("shape", [(5, 2), (5, 4), (3,), (1, 5, 3)])
def test_chunks_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"vectors must have shape \(B, 3\)"):
        Moments(3).update(torch.zeros(shape))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused_and_not_added(value: float) -> None:
    actual = of(correlated(20, 3))
    mean, covariance = actual.mean.clone(), actual.covariance
    bad = torch.zeros(4, 3)
    bad[2, 1] = value
    with pytest.raises(UsageError, match="NaN or infinite"):
        actual.update(bad)
    assert actual.n == 20
    assert torch.equal(actual.mean, mean)
    assert torch.equal(actual.covariance, covariance)


@pytest.mark.parametrize("head", [Mahalanobis, PrincipalResidual])
def test_no_vectors_are_refused(head: type[Mahalanobis] | type[PrincipalResidual]) -> None:
    for chunks in ([], [torch.empty(0, 3)]):
        with pytest.raises(UsageError, match="no vectors"):
            head(3).fit(moments(chunks, 3))


# ---- shrinkage ----


@pytest.mark.parametrize(("n", "width"), [(2, 5), (10, 40), (40, 40), (200, 8), (5000, 3), (50, 1)])
def test_shrinkage_is_that_of_scikit_learn(n: int, width: int) -> None:
    vectors = correlated(n, width)
    actual = of(vectors)
    expected = OAS().fit(vectors).covariance_
    np.testing.assert_allclose(shrunk(actual.covariance, n).numpy(), expected, rtol=1e-8, atol=1e-10)


def test_shrinkage_keeps_the_trace_and_makes_few_vectors_invertible() -> None:
    actual = of(correlated(6, 30))
    covariance = shrunk(actual.covariance, actual.n)
    assert covariance.trace().item() == pytest.approx(actual.covariance.trace().item(), rel=1e-12)
    assert torch.linalg.eigvalsh(actual.covariance)[0].item() == pytest.approx(0, abs=1e-9)
    assert torch.linalg.eigvalsh(covariance)[0] > 0


@pytest.mark.parametrize(("n", "width"), [(5, 4), (30, 3)])
def test_shrinkage_goes_no_further_than_the_identity(n: int, width: int) -> None:
    """White vectors, where the formula itself asks for more than all."""
    vectors = np.random.default_rng(3).normal(size=(n, width))
    vectors = np.concatenate([vectors, -vectors])
    actual = shrunk(of(vectors).covariance, len(vectors) // 20 + 1)
    assert torch.count_nonzero(actual - actual.diag().diag()) == 0
    np.testing.assert_allclose(actual.diag().numpy(), vectors.var(0).mean(), rtol=1e-12)


def test_a_multiple_of_the_identity_stays_as_it_is() -> None:
    torch.testing.assert_close(shrunk(3 * torch.eye(5).double(), 100), 3 * torch.eye(5).double())


def test_vectors_that_are_all_the_same_are_refused() -> None:
    for n in (1, 7):
        with pytest.raises(UsageError, match="all the same"):
            Mahalanobis(4).fit(moments([torch.full((n, 4), 0.3)], 4))


# ---- Mahalanobis ----


@pytest.mark.parametrize(("n", "width"), [(5, 20), (30, 30), (400, 8), (50, 1)])
def test_distance_is_that_of_scikit_learn(n: int, width: int) -> None:
    vectors, fresh = correlated(n, width), 2 * correlated(60, width, seed=1)
    head = Mahalanobis(width).double().fit(of(vectors))
    expected = OAS().fit(vectors).mahalanobis(fresh)
    np.testing.assert_allclose(head(torch.from_numpy(fresh)).numpy(), expected, rtol=1e-8)


def test_distance_in_single_precision() -> None:
    vectors, fresh = correlated(400, 8), correlated(60, 8, seed=1)
    actual = Mahalanobis(8).fit(of(vectors))(torch.from_numpy(fresh).float())
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.numpy(), OAS().fit(vectors).mahalanobis(fresh), rtol=1e-3)


def test_of_many_vectors_shrinkage_leaves_the_plain_distance() -> None:
    vectors = np.random.default_rng(0).normal(size=(20_000, 4)) * [1, 2, 3, 4] + 5
    head = Mahalanobis(4).double().fit(of(vectors))
    expected = EmpiricalCovariance().fit(vectors).mahalanobis(vectors[:200])
    np.testing.assert_allclose(head(torch.from_numpy(vectors[:200])).numpy(), expected, rtol=1e-2)


def test_distance_by_hand() -> None:
    """Uncorrelated: the sum of squared z-scores, up to the shrinkage of 100 000 vectors."""
    vectors = np.random.default_rng(0).normal(size=(100_000, 2)) * [1, 10] + [3, -4]
    head = Mahalanobis(2).fit(of(vectors))
    actual = head(torch.tensor([[3.0, -4.0], [5.0, -4.0], [3.0, 26.0], [5.0, 26.0]]))
    np.testing.assert_allclose(actual.numpy(), [0, 4, 9, 13], rtol=0.02, atol=1e-3)


def test_in_domain_distances_follow_chi_square() -> None:
    """Mean d, variance 2 d, of correlated vectors whose variances are not too uneven for 8000 to tell."""
    mixing = np.eye(12) + 0.1 * np.tri(12)
    first, other = (np.random.default_rng(seed).normal(size=(8000, 12)) @ mixing + 3 for seed in (0, 1))
    scores = Mahalanobis(12).double().fit(of(first))(torch.from_numpy(other))
    assert scores.mean().item() == pytest.approx(12, rel=0.02)
    assert scores.var().item() == pytest.approx(24, rel=0.1)


def test_fewer_vectors_than_dimensions_give_finite_distances() -> None:
    """Also with far fewer, in single precision, and for vectors outside of what they span."""
    head = Mahalanobis(64).fit(moments([torch.from_numpy(correlated(3, 64)).float()], 64))
    near, far = torch.from_numpy(correlated(9, 64, seed=1)).float(), torch.full((9, 64), 1e4)
    assert torch.isfinite(head(near)).all()
    assert (head(far) > head(near).max()).all()


def test_a_constant_dimension_is_no_harm() -> None:
    vectors = correlated(100, 3)
    vectors[:, 1] = 5
    head = Mahalanobis(3).double().fit(of(vectors))
    expected = OAS().fit(vectors).mahalanobis(vectors)
    np.testing.assert_allclose(head(torch.from_numpy(vectors)).numpy(), expected, rtol=1e-8)


# ---- the residual of a principal subspace ----


def residual_by_scikit_learn(vectors: np.ndarray, fresh: np.ndarray, share: float) -> tuple[np.ndarray, int]:
    plain = PCA(n_components=share, svd_solver="full").fit(vectors)
    return np.linalg.norm(fresh - plain.inverse_transform(plain.transform(fresh)), axis=1), plain.n_components_


@pytest.mark.parametrize(("n", "width"), [(300, 10), (12, 30)])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.95])
def test_residual_is_that_of_scikit_learn(n: int, width: int, share: float) -> None:
    vectors, fresh = correlated(n, width), correlated(40, width, seed=1)
    head = PrincipalResidual(width, share).double().fit(of(vectors))
    expected, components = residual_by_scikit_learn(vectors, fresh, share)
    assert (head.basis.norm(dim=0) < 1e-9).sum() == components
    np.testing.assert_allclose(head(torch.from_numpy(fresh)).numpy(), expected, rtol=1e-8)


def test_default_share_is_nine_tenths() -> None:
    vectors = correlated(300, 10)
    fresh = torch.from_numpy(vectors[:5])
    assert torch.equal(PrincipalResidual(10).fit(of(vectors)).basis, PrincipalResidual(10, 0.9).fit(of(vectors)).basis)
    expected, _ = residual_by_scikit_learn(vectors, vectors[:5], 0.9)
    np.testing.assert_allclose(PrincipalResidual(10).fit(of(vectors))(fresh.float()).numpy(), expected, rtol=1e-3)


def flat(n: int, seed: int = 0) -> Tensor:
    """Vectors (n, 6) of a plane off the origin, of equal variances in it."""
    plane = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(5)).double()).Q
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)).double() @ plane.T + 4


def test_residual_is_zero_inside_the_subspace_and_the_distance_outside() -> None:
    head = PrincipalResidual(6, 0.99).double().fit(moments([flat(500)], 6))
    inside = 30 * (flat(20, seed=1) - 4) + 4
    torch.testing.assert_close(head(inside), torch.zeros(20).double(), atol=1e-9, rtol=0)
    normal = torch.linalg.svd(flat(500) - flat(500).mean(0)).Vh[-1]  # at a right angle to the plane
    torch.testing.assert_close(head(inside + 2.5 * normal), torch.full((20,), 2.5).double())


def test_some_direction_is_left_to_measure_in() -> None:
    """Two equal variances and nearly all to be kept: the smaller one is left."""
    vectors = torch.tensor([[2.0, 0], [-2, 0], [0, 1.9], [0, -1.9]])
    head = PrincipalResidual(2, 0.99).fit(moments([vectors], 2))
    torch.testing.assert_close(head(torch.tensor([[7.0, 0], [7, -3]])), torch.tensor([0.0, 3.0]), atol=1e-5, rtol=1e-5)
    line = PrincipalResidual(1, 0.5).fit(moments([torch.tensor([[1.0], [3.0]])], 1))
    torch.testing.assert_close(line(torch.tensor([[2.0], [7.0]])), torch.tensor([0.0, 5.0]))


def test_of_vectors_that_are_all_the_same_the_residual_is_the_distance_to_them() -> None:
    head = PrincipalResidual(3).fit(moments([torch.full((4, 3), 2.0)], 3))
    torch.testing.assert_close(head(torch.tensor([[2.0, 2, 2], [2, 5, 6]])), torch.tensor([0.0, 5.0]))


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan")])
def test_shares_outside_0_to_1_are_refused(share: float) -> None:
    with pytest.raises(UsageError, match=f"must lie between 0 and 1, not {share}"):
        PrincipalResidual(4, share)


# ---- both ----


@pytest.mark.parametrize("head", [Mahalanobis, PrincipalResidual])
def test_a_fitted_head_comes_back_from_its_state(head: type[Mahalanobis] | type[PrincipalResidual]) -> None:
    fitted, fresh = head(8).fit(of(correlated(100, 8))), torch.from_numpy(correlated(9, 8, seed=1)).float()
    state = {name: value.clone() for name, value in fitted.state_dict().items()}
    assert set(state) == {"mean", "whitening" if head is Mahalanobis else "basis"}
    other = head(8)
    assert not torch.equal(other(fresh), fitted(fresh))
    other.load_state_dict(state)
    assert torch.equal(other(fresh), fitted(fresh))


@pytest.mark.parametrize("head", [Mahalanobis, PrincipalResidual])
def test_a_second_fit_forgets_the_first(head: type[Mahalanobis] | type[PrincipalResidual]) -> None:
    fresh = torch.from_numpy(correlated(9, 8, seed=1)).float()
    twice = head(8).fit(of(3 * correlated(100, 8, seed=2))).fit(of(correlated(100, 8)))
    assert torch.equal(twice(fresh), head(8).fit(of(correlated(100, 8)))(fresh))
    assert list(twice.parameters()) == []

"""Fusion of heads, by hand and with scipy's normal distribution."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from featdiff.exceptions import UsageError
from featdiff.scores.fusion import FUSIONS, Fusion

ROWS = np.array([[0.0, 0, 0], [1, 2, -0.5], [-3, -2, -4], [3.5, 0.1, -1], [6, 6, 6], [-8, 9, 0]])

BY_HAND: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda z: z.sum(1) / np.sqrt(z.shape[1]),
    "max": lambda z: z.max(1),
    "fisher": lambda z: -norm.logsf(z).sum(1),
    "tippett": lambda z: -np.log(norm.sf(z).min(1)),
    "covariance": lambda z: z.sum(1) / np.sqrt(z.shape[1]),  # before a fit, all heads alike
}


def normal(n: int, heads: int, seed: int = 0) -> Tensor:
    return torch.randn(n, heads, generator=torch.Generator().manual_seed(seed))


def paired(n: int = 5000) -> Tensor:
    """z-scores of three heads, of which the first two say the same."""
    z = normal(n, 2)
    return torch.stack([z[:, 0], z[:, 0], z[:, 1]], 1)


def test_methods_in_their_order() -> None:
    assert FUSIONS == ("mean", "max", "fisher", "tippett", "covariance")
    assert set(BY_HAND) == set(FUSIONS)
    assert Fusion(2).method == "mean"


@pytest.mark.parametrize("method", FUSIONS)
def test_values_by_hand(method: str) -> None:
    found = Fusion(3, method)(torch.from_numpy(ROWS).float())
    assert found.shape == (6,)
    np.testing.assert_allclose(found.numpy(), BY_HAND[method](ROWS), rtol=2e-5, atol=1e-6)


def test_known_values() -> None:
    """p = 1/2 of each head: -log p = log 2."""
    z = torch.zeros(1, 4)
    assert Fusion(4, "fisher")(z).item() == pytest.approx(4 * np.log(2))
    assert Fusion(4, "tippett")(z).item() == pytest.approx(np.log(2))
    assert Fusion(4, "mean")(z + 1).item() == pytest.approx(2)


@pytest.mark.parametrize("method", ["fisher", "tippett"])
def test_far_in_the_tail_scores_are_finite_exact_and_ordered(method: str) -> None:
    """Where p itself is 0 in single precision (z > 14) and in double (z > 38)."""
    z = np.array([5.0, 10, 14, 20, 38, 40, 41, 100, 1000])
    found = Fusion(2, method)(torch.from_numpy(np.stack([z, np.zeros(9)], 1)).float())
    expected = -norm.logsf(z) + (np.log(2) if method == "fisher" else 0)
    assert torch.isfinite(found).all()
    assert (found.diff() > 0).all()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    assert found[5].item() == pytest.approx(804.608 + (np.log(2) if method == "fisher" else 0), rel=1e-5)


@pytest.mark.parametrize("method", FUSIONS)
def test_far_below_scores_are_finite(method: str) -> None:
    found = Fusion(2, method)(torch.tensor([[-40.0, -40.0], [0.0, 0.0]]))
    assert torch.isfinite(found).all()
    assert found[0] < found[1]


@pytest.mark.parametrize("method", FUSIONS)
def test_a_higher_head_never_lowers_the_score(method: str) -> None:
    fusion, z = Fusion(3, method).fit(paired()), normal(200, 3, seed=1)
    for head in range(3):
        higher = z.clone()
        higher[:, head] += 0.5
        assert (fusion(higher) >= fusion(z)).all()
    assert (fusion(z + 0.5) > fusion(z)).all()


@pytest.mark.parametrize("method", FUSIONS)
def test_the_order_of_heads_does_not_matter(method: str) -> None:
    z, fresh, order = paired(), normal(50, 3, seed=1), [2, 0, 1]
    found = Fusion(3, method).fit(z[:, order])(fresh[:, order])
    torch.testing.assert_close(found, Fusion(3, method).fit(z)(fresh))


@pytest.mark.parametrize("method", FUSIONS)
def test_a_row_has_one_score_whatever_the_batch(method: str) -> None:
    fusion, fresh = Fusion(3, method).fit(paired()), normal(50, 3, seed=1)
    torch.testing.assert_close(torch.cat([fusion(row) for row in fresh.split(1)]), fusion(fresh))


# ---- one head ----


@pytest.mark.parametrize("method", ["mean", "max", "covariance"])
def test_one_head_is_itself(method: str) -> None:
    z = torch.tensor([[1.5], [-2.0], [40.0]])
    assert torch.equal(Fusion(1, method).fit(normal(100, 1))(z), z[:, 0])


@pytest.mark.parametrize("method", ["fisher", "tippett"])
def test_one_head_is_its_own_tail(method: str) -> None:
    z = torch.tensor([[1.5], [-2.0], [30.0]])
    found = Fusion(1, method).fit(normal(100, 1))(z)
    np.testing.assert_allclose(found.numpy(), -norm.logsf(z[:, 0].double().numpy()), rtol=1e-5)


# ---- weights by covariance ----


def test_two_heads_that_say_the_same_share_their_vote() -> None:
    weights = Fusion(3, "covariance").fit(paired()).weights
    assert weights[0].item() == pytest.approx(weights[1].item(), rel=1e-5)
    ratio = weights[2] / weights[0]
    assert 1.8 < ratio < 2.05  # exactly 2, but for the tenth of the identity: 2.1 / 1.1


@pytest.mark.parametrize("n", [3, 40, 2000])
def test_weights_solve_the_covariance(n: int) -> None:
    z = normal(n, 4) @ torch.tensor([[1.0, 0.5, 0, 0], [0, 1, 0.2, 0], [0, 0, 1, 0.3], [0.1, 0, 0, 1]])
    fusion, fresh = Fusion(4, "covariance").fit(z), normal(20, 4, seed=1)
    expected = np.linalg.inv(np.cov(z.double().numpy(), rowvar=False) + 0.1 * np.eye(4)).sum(1).clip(0)
    np.testing.assert_allclose(fusion.weights.numpy(), expected, rtol=1e-5, atol=1e-7)
    by_hand = fresh.double().numpy() @ expected / np.linalg.norm(expected)
    np.testing.assert_allclose(fusion(fresh).numpy(), by_hand, rtol=1e-4, atol=1e-5)


def test_a_negative_weight_is_set_to_zero() -> None:
    """A louder copy of the first head, plus noise: the best sum would subtract it."""
    z = normal(5000, 2)
    z = torch.stack([z[:, 0], 2 * z[:, 0] + 0.3 * z[:, 1]], 1)
    fusion, fresh = Fusion(2, "covariance").fit(z), normal(20, 2, seed=1)
    assert fusion.weights[1] == 0
    torch.testing.assert_close(fusion(fresh), fresh[:, 0])


def test_independent_heads_count_alike() -> None:
    z, fresh = normal(50_000, 4), normal(20, 4, seed=1)
    found = Fusion(4, "covariance").fit(z)(fresh)
    torch.testing.assert_close(found, Fusion(4, "mean")(fresh), atol=0.05, rtol=0)


def test_heads_that_never_change_are_no_harm() -> None:
    fusion = Fusion(3, "covariance").fit(torch.zeros(10, 3))
    torch.testing.assert_close(fusion(torch.ones(2, 3)), torch.full((2,), 3**0.5))


@pytest.mark.parametrize("method", [name for name in FUSIONS if name != "covariance"])
def test_other_methods_learn_nothing(method: str) -> None:
    assert torch.equal(Fusion(3, method).fit(paired()).weights, torch.ones(3))


def test_one_held_out_row_gives_finite_weights() -> None:
    assert torch.isfinite(Fusion(3, "covariance").fit(torch.ones(1, 3)).weights).all()


# ---- storage and refusals ----


@pytest.mark.parametrize("method", FUSIONS)
def test_a_fitted_fusion_comes_back_from_its_state(method: str) -> None:
    fitted, fresh = Fusion(3, method).fit(paired()), normal(20, 3, seed=1)
    assert set(fitted.state_dict()) == {"weights"}
    other = Fusion(3, method)
    other.load_state_dict(fitted.state_dict())
    assert torch.equal(other(fresh), fitted(fresh))


@pytest.mark.parametrize("method", ["median", "Mean", ""])
def test_an_unknown_method_is_refused(method: str) -> None:
    with pytest.raises(UsageError, match=f"unknown fusion '{method}'; known: mean, max, fisher, tippett, covariance"):
        Fusion(3, method)

"""Distances by layer against NumPy and scikit-learn; higher = more out-of-distribution everywhere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import paired_cosine_distances
from torch import Tensor

from featdiff.scores.residuals import likelihood_regret, mfsim, mse

WIDTHS = (3, 1, 6)
ENDS = ((0, 3), (3, 4), (4, 10))


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    return torch.randn(8, 10, generator=source), torch.randn(8, 10, generator=source)


def test_mse_equals_numpy_layer_by_layer(pair: tuple[Tensor, Tensor]) -> None:
    x, x_hat = pair
    a, b = x.double().numpy(), x_hat.double().numpy()
    expected = np.stack([np.mean((a[:, i:j] - b[:, i:j]) ** 2, axis=1) for i, j in ENDS], axis=1)
    np.testing.assert_allclose(mse(x, x_hat, WIDTHS).numpy(), expected, rtol=1e-5)


def test_mfsim_equals_the_cosine_distance_of_scikit_learn(pair: tuple[Tensor, Tensor]) -> None:
    x, x_hat = pair
    expected = np.stack([paired_cosine_distances(x[:, i:j].numpy(), x_hat[:, i:j].numpy()) for i, j in ENDS], axis=1)
    np.testing.assert_allclose(mfsim(x, x_hat, WIDTHS).numpy(), expected, atol=1e-6)


def test_mean_of_mfsim_is_one_plus_the_papers(pair: tuple[Tensor, Tensor]) -> None:
    """MFsim = - (1 / M) sum of cosines over all M layers, the first included."""
    x, x_hat = (part.double().numpy() for part in pair)
    cosines = [
        np.sum(x[:, i:j] * x_hat[:, i:j], 1)
        / (np.linalg.norm(x[:, i:j], axis=1) * np.linalg.norm(x_hat[:, i:j], axis=1))
        for i, j in ENDS
    ]
    np.testing.assert_allclose(mfsim(*pair, WIDTHS).mean(-1).numpy(), 1 - np.mean(cosines, axis=0), atol=1e-6)


def test_known_values() -> None:
    x = torch.tensor([[1.0, 0.0, 2.0, 0.0]])
    x_hat = torch.tensor([[0.0, 1.0, -2.0, 0.0]])
    assert mse(x, x_hat, [2, 2]).tolist() == [[1.0, 8.0]]
    assert mfsim(x, x_hat, [2, 2]).tolist() == [[1.0, 2.0]]


def test_a_perfect_reconstruction_has_no_distance(pair: tuple[Tensor, Tensor]) -> None:
    x, _ = pair
    assert torch.equal(mse(x, x, WIDTHS), torch.zeros(8, 3))
    torch.testing.assert_close(mfsim(x, x, WIDTHS), torch.zeros(8, 3), atol=1e-6, rtol=0)
    assert torch.equal(likelihood_regret(x, x, x, WIDTHS), torch.zeros(8, 3))


def test_mfsim_ignores_the_length_and_mse_does_not(pair: tuple[Tensor, Tensor]) -> None:
    x, x_hat = pair
    torch.testing.assert_close(mfsim(x, 5 * x_hat, WIDTHS), mfsim(x, x_hat, WIDTHS), atol=1e-6, rtol=0)
    assert (mse(x, 50 * x_hat, WIDTHS) > mse(x, x_hat, WIDTHS)).float().mean() > 0.9


def test_an_all_zero_layer_has_cosine_zero() -> None:
    """A dead layer (constant features normalise to zero) gives a number, not NaN."""
    x = torch.tensor([[0.0, 0.0, 1.0]])
    assert mfsim(x, torch.ones(1, 3), [2, 1]).tolist() == [[1.0, 0.0]]


def test_likelihood_regret_falls_for_what_training_learned(pair: tuple[Tensor, Tensor]) -> None:
    """MSE(end) - MSE(first epoch): higher = more OOD, as everywhere. The paper's has the other sign."""
    x, noise = pair
    early, late_id, late_ood = x + noise, x + 0.1 * noise, x + 0.9 * noise
    learned, not_learned = (likelihood_regret(x, late, early, WIDTHS) for late in (late_id, late_ood))
    assert (learned < not_learned).all()
    assert (not_learned < 0).all()
    torch.testing.assert_close(learned, (0.1**2 - 1) * mse(x, early, WIDTHS))


@pytest.mark.parametrize("distance", [mse, mfsim], ids=["mse", "mfsim"])
def test_leading_dimensions_are_kept(distance: Callable[..., Tensor], pair: tuple[Tensor, Tensor]) -> None:
    x, x_hat = pair
    flat = distance(x, x_hat, WIDTHS)
    actual = distance(x.reshape(2, 4, 10), x_hat.reshape(2, 4, 10), WIDTHS)
    assert actual.shape == (2, 4, 3)
    torch.testing.assert_close(actual.reshape(8, 3), flat)
    assert distance(x[:0], x_hat[:0], WIDTHS).shape == (0, 3)


@pytest.mark.parametrize("distance", [mse, mfsim], ids=["mse", "mfsim"])
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_layer_is_measured_by_itself(
    distance: Callable[..., Tensor], changed: int, pair: tuple[Tensor, Tensor]
) -> None:
    x, x_hat = pair
    other = x_hat.clone()
    other[:, slice(*ENDS[changed])] = -x[:, slice(*ENDS[changed])]
    before, after = distance(x, x_hat, WIDTHS), distance(x, other, WIDTHS)
    same = [torch.equal(before[:, i], after[:, i]) for i in range(3)]
    assert same == [i != changed for i in range(3)]


@pytest.mark.parametrize("distance", [mse, mfsim], ids=["mse", "mfsim"])
def test_widths_that_do_not_fit_are_refused(distance: Callable[..., Tensor], pair: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(RuntimeError, match="split"):
        distance(*pair, (3, 1, 5))

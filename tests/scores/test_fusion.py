"""The parts of every fusion: statistics of in-domain scores, and weighted sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from featdiff.scores.fusion import log, log_statistics, log_z, statistics, weighted_sum


@pytest.fixture
def errors() -> torch.Tensor:
    """(N, start times, layers) of positive errors on very different scales."""
    source = torch.Generator().manual_seed(0)
    return torch.exp(torch.randn(200, 3, 2, generator=source) * torch.tensor([0.5, 2.0]) - 4)


def test_statistics_are_those_of_the_logarithms(errors: torch.Tensor) -> None:
    mean, deviation = log_statistics(errors)
    logs = np.log(errors.double().numpy())
    assert mean.shape == deviation.shape == (3, 2)
    np.testing.assert_allclose(mean.numpy(), logs.mean(0), rtol=1e-5)
    np.testing.assert_allclose(deviation.numpy(), logs.std(0), rtol=1e-5)


def test_in_domain_errors_become_standard(errors: torch.Tensor) -> None:
    z = log_z(errors, *log_statistics(errors))
    assert z.shape == errors.shape
    torch.testing.assert_close(z.mean(0), torch.zeros(3, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(3, 2), atol=1e-5, rtol=0)


def test_z_does_not_depend_on_the_scale_of_a_layer(errors: torch.Tensor) -> None:
    other = errors * torch.tensor([1e-3, 1e4])
    torch.testing.assert_close(
        log_z(other, *log_statistics(other)), log_z(errors, *log_statistics(errors)), atol=1e-4, rtol=1e-4
    )


def test_known_values() -> None:
    z = log_z(torch.tensor([[math.e, math.e**3]]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 4.0]))
    torch.testing.assert_close(z, torch.tensor([[1.0, 0.5]]))


def test_greater_errors_have_greater_z(errors: torch.Tensor) -> None:
    statistics = log_statistics(errors)
    assert (log_z(errors * 1.01, *statistics) > log_z(errors, *statistics)).all()


def test_a_perfect_reconstruction_is_the_lowest_finite_score(errors: torch.Tensor) -> None:
    z = log_z(torch.zeros(1, 3, 2), *log_statistics(errors))
    assert torch.isfinite(z).all()
    assert (z < log_z(errors, *log_statistics(errors)).amin(0)).all()


def test_statistics_of_errors_that_are_zero_or_all_the_same_are_finite() -> None:
    for errors in (torch.zeros(5, 1, 2), torch.full((5, 1, 2), 0.3), torch.full((1, 1, 2), 0.3)):
        mean, deviation = log_statistics(errors)
        assert torch.isfinite(mean).all()
        assert (deviation > 0).all()
        assert torch.isfinite(log_z(errors + 1, mean, deviation)).all()


def test_weighted_sum_is_normalised_by_the_length_of_the_weights() -> None:
    z = torch.tensor([[1.0, 2.0], [0.0, -5.0]])
    value = weighted_sum(z, torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(value, torch.tensor([(3 + 8) / 5, -20 / 5]))
    torch.testing.assert_close(weighted_sum(z, torch.tensor([30.0, 40.0])), value)


def test_weighted_sum_of_independent_layers_has_variance_one() -> None:
    z = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0))
    assert weighted_sum(z, torch.tensor([1.0, 5.0, 0.2, 3.0])).std().item() == pytest.approx(1, abs=0.02)


def test_one_layer_is_itself() -> None:
    z = torch.tensor([[1.5], [-2.0]])
    torch.testing.assert_close(weighted_sum(z, torch.tensor([24.0]).sqrt()), z[:, 0])


def test_a_higher_score_raises_the_sum_and_order_does_not_matter() -> None:
    z = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
    weights = torch.tensor([0.75, 1.0, 2.0])
    for column in range(3):
        higher = z.clone()
        higher[:, column] += 0.5
        assert (weighted_sum(higher, weights) > weighted_sum(z, weights)).all()
    order = [2, 0, 1]
    torch.testing.assert_close(weighted_sum(z[:, order], weights[order]), weighted_sum(z, weights))


def test_equal_weights_give_the_sum_over_the_root_of_their_number() -> None:
    z = torch.tensor([[0.0, 0, 0], [1, 2, -0.5], [-3, -2, -4], [6, 6, 6], [-40, -40, -40]])
    torch.testing.assert_close(weighted_sum(z, torch.ones(3)), z.sum(1) / 3**0.5)
    assert weighted_sum(torch.ones(1, 4), torch.ones(4)).item() == pytest.approx(2)


def test_a_row_has_one_sum_whatever_the_batch() -> None:
    z = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    together = weighted_sum(z, torch.ones(3))
    torch.testing.assert_close(torch.cat([weighted_sum(row, torch.ones(3)) for row in z.split(1)]), together)


def test_statistics_of_scores_as_they_are() -> None:
    """Like those of logarithms, without the logarithm; the deviation is never below 0.05."""
    scores = torch.tensor([[1.0, 5.0], [3.0, 5.0], [5.0, 5.0]])
    mean, deviation = statistics(scores)
    assert torch.equal(mean, torch.tensor([3.0, 5.0]))
    torch.testing.assert_close(deviation, torch.tensor([(8 / 3) ** 0.5, 0.05]))
    for by_log, plain in zip(log_statistics(scores), statistics(log(scores)), strict=True):
        assert torch.equal(by_log, plain)


def test_logarithm_of_zero_is_finite_and_the_lowest() -> None:
    values = log(torch.tensor([0.0, 1e-37, 1.0, math.e]))
    assert torch.isfinite(values).all()
    assert (values.diff() > 0).all()
    torch.testing.assert_close(values[2:], torch.tensor([0.0, 1.0]))

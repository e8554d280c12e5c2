"""Maps, tokens and vectors -> vectors, and their normalisation."""

from __future__ import annotations

import pytest
import torch

from featdiff.exceptions import UsageError
from featdiff.features.hooks import pool
from featdiff.features.layout import block_normalise


def test_pool() -> None:
    values = torch.arange(24.0)
    assert pool(values.reshape(1, 2, 3, 4)).tolist() == [[5.5, 17.5]]
    assert pool(values.reshape(1, 4, 6)).tolist() == [[9.0, 10.0, 11.0, 12.0, 13.0, 14.0]]
    assert pool(values.reshape(2, 12)).tolist() == values.reshape(2, 12).tolist()
    for wrong in (values, values.reshape(1, 1, 2, 3, 4), None):
        with pytest.raises(UsageError, match=r"layer 'x' gives .*featdiff needs"):
            pool(wrong, "x")  # type: ignore[arg-type]


def test_block_normalise_is_per_sample_and_layer() -> None:
    generator = torch.Generator().manual_seed(3)
    sizes = (40, 8, 300)
    scales = torch.repeat_interleave(torch.tensor([1.0, 50.0, 0.1]), torch.tensor(sizes))
    features = torch.randn(5, sum(sizes), generator=generator) * scales + 7 * scales
    normalised = block_normalise(features, sizes)
    assert normalised.shape == features.shape
    for part in normalised.split(list(sizes), 1):
        torch.testing.assert_close(part.mean(1), torch.zeros(5), atol=1e-4, rtol=0)
        torch.testing.assert_close(part.var(1, correction=0), torch.ones(5), atol=1e-3, rtol=0)
    expected = (features[2, 40:48] - features[2, 40:48].mean()) / features[2, 40:48].std(correction=0)
    torch.testing.assert_close(normalised[2, 40:48], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(block_normalise(features[2:3], sizes), normalised[2:3])  # no matter the batch


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e4])
def test_block_normalise_of_constant_features_is_zero(value: float) -> None:
    normalised = block_normalise(torch.full((2, 7), value), (6, 1))
    assert normalised.isfinite().all()
    assert normalised.abs().max() < 1e-3

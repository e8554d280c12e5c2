"""Seeded random numbers, and a random state that is left alone."""

from __future__ import annotations

import doctest

import pytest
import torch

from featdiff.runtime import randomness
from featdiff.runtime.randomness import seeded


def test_numbers_follow_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    with seeded(7):
        first = torch.rand(5)
    torch.manual_seed(2)
    with seeded(7):
        again = torch.rand(5)
    with seeded(8):
        other = torch.rand(5)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first, torch.rand(5, generator=torch.Generator().manual_seed(7)))


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_state_of_the_caller_is_as_before(error: type[BaseException] | None) -> None:
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    if error is None:
        with seeded(0):
            torch.rand(100)
    else:
        with pytest.raises(error), seeded(0):
            torch.rand(100)
            raise error
    assert torch.equal(torch.rand(5), expected)


def test_the_example_is_true() -> None:
    assert doctest.testmod(randomness).failed == 0

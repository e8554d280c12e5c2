"""Random numbers that follow from a seed and leave the caller's random state alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's CPU generator starts from ``seed``; afterwards its state is as it was before.

    For the initial weights of networks, which are drawn on the CPU. Generators of GPUs are not touched:
    ``torch.manual_seed`` would seed them all.

    Parameters
    ----------
    seed : int
        0 or more.

    Examples
    --------
    >>> import torch
    >>> from featdiff.runtime.randomness import seeded
    >>> with seeded(0):
    ...     first = torch.rand(2)
    >>> with seeded(0):
    ...     print(torch.equal(first, torch.rand(2)))
    True
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield

"""A small network, its data and a short training, for tests of the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featdiff.diffusion.lfdn import LFDN
from featdiff.diffusion.schedules import make_scheduler
from featdiff.diffusion.training import Recipe, Step, TrainingState, train

WIDTH = 4
SHORT: dict[str, Any] = {"epochs": 4, "batch_size": 16, "min_steps": 1, "check_steps": 1}


def network(seed: int = 0, hidden: int = 16) -> LFDN:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LFDN(width=WIDTH, hidden=hidden, blocks=1, time_width=8)


def data(count: int = 96, seed: int = 0) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def reader(x: Tensor) -> Callable[[np.ndarray], Tensor]:
    return lambda indices: x[torch.from_numpy(indices)]


def run(
    state: TrainingState, recipe: Recipe, x: Tensor, seed: int = 0, held_out: Tensor | None = None
) -> Iterator[Step]:
    validation = data(32, seed=9) if held_out is None else held_out
    return train(state, reader(x), len(x), validation, make_scheduler(), recipe, seed)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

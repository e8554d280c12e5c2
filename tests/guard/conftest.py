"""A fitted guard that several files of tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from classifiers import (
    RECIPE,
    loader,
    resnet,
    some_images,
)
from torch import Tensor

from featdiff import Guard


@pytest.fixture(scope="session")
def guard() -> Guard:
    """A fitted guard that asks logits, too; do not change it."""
    heads = ("energy", "msp", "vim")
    guard = Guard(resnet(), recipe=RECIPE, extra_heads=heads, fpr=0.1, calibration=0.2)
    return guard.fit(loader(some_images(200, seed=1)))


@pytest.fixture(scope="session")
def saved(guard: Guard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guard") / "model"
    guard.save_pretrained(folder)
    return folder


@pytest.fixture
def images() -> Tensor:
    return torch.cat([some_images(4, seed=2), torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))])

"""What the tests of the default mode share: pictures, a network of one's own, and arguments that fit in a moment."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from featdiff import Detector

COLUMNS = ["path", "status", "reason", "ood_score", "p_value", "is_ood"]


def pictures(files: list[str]) -> list[Image.Image]:
    return [Image.open(file).convert("RGB") for file in files]


def stack(files: list[str]) -> np.ndarray:
    """(N, 32, 32, 3) uint8."""
    return np.stack([np.asarray(picture) for picture in pictures(files)])


class TinyNet(nn.Module):
    """Somebody's own network."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 5, stride=2)
        self.act = activation or nn.ReLU()
        self.body = nn.Conv2d(12, 24, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.act(self.stem(x)))


def tiny_net(activation: nn.Module | None = None) -> TinyNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return TinyNet(activation)


def to_tensor(picture: Image.Image) -> Tensor:
    """The preprocessing that goes with ``TinyNet``."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255 - 0.5


MODULE: dict[str, Any] = {
    "layers": ["stem", "body"],
    "transform": to_tensor,
    "hidden_max": 32,
    "blocks": 1,
    "fpr": 0.2,
    "recipe": {"epochs": 2, "min_steps": 1, "batch_size": 16},
    "calibration": 0.2,
}


def loader(files: list[str], detector: Detector, labels: bool) -> DataLoader[Any]:
    pixels = torch.stack([detector.extractor_.transform(picture) for picture in pictures(files)])
    parts = [pixels, torch.arange(len(pixels))] if labels else [pixels]
    return DataLoader(TensorDataset(*parts), batch_size=16)

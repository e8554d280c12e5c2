"""Tiny seeded backbones, images for them, and what a row of their features holds."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from featdiff.features.backbones import Backbone, load_backbone
from featdiff.features.extractor import FeatureExtractor

#: A real Swin of 0.2 M weights (maps are NHWC inside, and its input size is fixed).
SWIN = "swin_tiny_patch4_window7_224"


SWIN_ARGS = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}


RESNET_LAYERS = ("act1", "layer1", "layer2", "layer3", "layer4")


@functools.cache
def backbone(name: str) -> Backbone:
    """A seeded tiny backbone, made once."""
    torch.manual_seed(0)
    return load_backbone(name, pretrained=False, model_args=SWIN_ARGS if name == SWIN else None)


@functools.cache
def images(name: str) -> Tensor:
    """Two images of the size that the backbone wants."""
    size = backbone(name).data_config["input_size"]
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(1))


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def widths(extractor: FeatureExtractor) -> tuple[int, ...]:
    """Widths of the layers, without spatial standard deviations and logits."""
    return tuple(part.width for part in extractor.layout.layers)


def columns(extractor: FeatureExtractor) -> dict[str, slice]:
    """Where each part lies in a row, by name."""
    return {part.name: part.columns for part in extractor.layout.parts}


def means(extractor: FeatureExtractor, pixels: Tensor) -> Tensor:
    """The layers' part of the features, without the spatial standard deviations that follow."""
    return extractor(pixels)[:, : sum(widths(extractor))]


def to_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture.resize((32, 32)), dtype=np.float32) / 255).permute(2, 0, 1)

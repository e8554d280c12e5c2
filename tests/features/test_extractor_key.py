"""The key of the cache: the same for the same work, another one for anything that changes features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_backbones import images, to_tensor
from torch import Tensor, nn

from featdiff.features.backbones import load_backbone
from featdiff.features.extractor import FeatureExtractor


def test_key_is_the_same_for_the_same_work(seeded_backbone: Path) -> None:
    first, second = (
        FeatureExtractor(load_backbone("test_resnet", weights=seeded_backbone), "layer1,-1") for _ in range(2)
    )
    assert first.key() == first.key() == second.key()
    assert first.key() == FeatureExtractor(second.backbone, ["layer1", "layer4"]).key()
    assert first.key("matched 32") == second.key("matched 32")
    assert len(first.key()) == 16 and first.key().isalnum()


def test_key_does_not_depend_on_the_name_of_the_file(seeded_backbone: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(seeded_backbone.read_bytes())
    keys = {FeatureExtractor(load_backbone("test_resnet", weights=file)).key() for file in (seeded_backbone, copy)}
    assert len(keys) == 1


def test_key_changes_with_weights_layers_transform_and_note(seeded_backbone: Path, tmp_path: Path) -> None:
    state = load_file(seeded_backbone)
    state["layer1.0.conv1.weight"].view(-1)[0] += 1e-3
    other = tmp_path / "other.safetensors"
    save_file(state, other)

    def extractor(
        weights: Path = seeded_backbone, layers: Any = "layer1,layer2", view: str = "whole", **transform: Any
    ) -> FeatureExtractor:
        backbone = load_backbone("test_resnet", weights=weights, transform=transform, view=view)
        return FeatureExtractor(backbone, layers)

    keys = [
        extractor().key(),
        extractor().key("matched 32"),
        extractor(other).key(),
        extractor(layers="layer1").key(),
        extractor(layers="layer2,layer1").key(),
        extractor(input_size=(3, 96, 96)).key(),
        extractor(mean=(0.5, 0.5, 0.4)).key(),
        extractor(interpolation="nearest").key(),
        extractor(view="squash").key(),
        extractor(view="crop").key(),
        extractor(view="crop", crop_pct=0.9).key(),
    ]
    assert len(set(keys)) == len(keys)


def test_key_changes_with_arguments_that_leave_the_weights_alone() -> None:
    """Padding is not in the weights, yet it changes features: another cache."""
    keys, features = [], []
    for kind in ("", "same"):
        torch.manual_seed(0)
        found = load_backbone("test_efficientnet", pretrained=False, model_args={"pad_type": kind})
        extractor = FeatureExtractor(found)
        keys.append(extractor.key())
        features.append(extractor(images("test_efficientnet")))
    assert not torch.allclose(features[0], features[1], rtol=1e-2)
    assert keys[0] != keys[1]


def test_key_changes_with_the_kind_of_module() -> None:
    """Two networks may have equal weights under equal names and still compute different things."""

    def key(activation: nn.Module) -> str:
        torch.manual_seed(0)
        return FeatureExtractor(nn.Sequential(nn.Conv2d(3, 4, 3), activation), ["1"]).key()

    assert key(nn.ReLU()) == key(nn.ReLU())
    assert key(nn.ReLU()) != key(nn.Sigmoid())


class Scale:
    """A user's transform; like most, it has no ``repr`` of its own."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, picture: Image.Image) -> Tensor:
        return self.factor * to_tensor(picture)


def test_key_follows_what_the_transform_of_a_module_does() -> None:
    """Not where it lies in memory: that would compute everything again in each process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3))

    def key(transform: Callable[[Image.Image], Tensor]) -> str:
        return FeatureExtractor(model, ["0"], transform=transform).key()

    assert key(Scale(1.0)) != key(Scale(2.0))
    first, second = Scale(1.0), Scale(1.0)  # both alive: two addresses
    assert key(first) == key(second)


def test_key_tells_transforms_of_equal_repr_apart() -> None:
    """torchvision prints every ``Lambda`` as ``Lambda()``."""
    from torchvision.transforms import Compose, Lambda

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    transforms = [Compose([Lambda(Scale(factor))]) for factor in (1.0, 2.0)]
    keys = [FeatureExtractor(model, ["0"], transform=transform).key() for transform in transforms]
    assert keys[0] != keys[1]

"""Small classifiers of several kinds, images for them, and what tests ask of a guard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from conftest import TINY
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import squeezenet1_1
from transformers import ViTConfig, ViTForImageClassification

from featdiff import Verdict

RECIPE = TINY["recipe"]


def some_images(count: int, seed: int, side: int = 64, channels: int = 3) -> Tensor:
    """Smooth coloured pictures: seeded noise of 8 x 8, blown up."""
    small = torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(small, size=(side, side), mode="bilinear")


def loader(images: Tensor) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(images, torch.zeros(len(images))), batch_size=32)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def resnet() -> nn.Module:
    return seeded(lambda: timm.create_model("test_resnet", pretrained=False, num_classes=5))


def huggingface() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    return seeded(lambda: ViTForImageClassification(ViTConfig(image_size=64, patch_size=16, num_labels=4, **sizes)))


class OwnCode(nn.Module):
    """Two maps, then a mean; logits of 3 classes in a dictionary if asked for."""

    def __init__(self, channels: int = 3, output: str = "tensor") -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 8, 5, 2)
        self.second = nn.Conv2d(8, 16, 5, 2)
        self.last = nn.Linear(16, 3)
        self.output = output

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        x = torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3))
        logits = self.last(x) * scale
        kinds: dict[str, Any] = {
            "tensor": logits,
            "dict": {"logits": logits},
            "text": "cat",
            "fewer": logits[1:],
            "map": logits[:, :, None],
        }
        return kinds[self.output]


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(2)


def own_code() -> nn.Module:
    return seeded(OwnCode)


OWN_LAYERS = ["first", "second", "pre_logits"]


CLASSIFIERS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "timm": (resnet, "auto"),
    "torchvision": (lambda: seeded(lambda: squeezenet1_1(num_classes=4)), ["features.3", "features.7"]),
    "huggingface": (huggingface, ["vit.embeddings", "vit.layernorm", "pre_logits"]),
    "own": (own_code, OWN_LAYERS),
}


def hooks_of(model: nn.Module) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def same(a: Verdict | None, b: Verdict | None) -> None:
    assert a is not None
    assert b is not None
    torch.testing.assert_close(a.ood_score, b.ood_score, rtol=1e-4, atol=1e-4)
    assert a.is_ood.tolist() == b.is_ood.tolist()

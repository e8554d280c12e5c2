"""Pooled features of any module, through hooks in its own forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from einops import rearrange
from PIL import Image
from tiny_backbones import SWIN, SWIN_ARGS, backbone, columns, images, one_line, to_tensor, widths
from torch import Tensor, nn

from featdiff.exceptions import UsageError
from featdiff.features.backbones import load_backbone
from featdiff.features.extractor import FeatureExtractor

# ---------------------------------------- any module


class Several(nn.Module):
    """A network whose layers give outputs of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.maps = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.tokens = Tokens()
        self.last = ChannelsLast()
        self.pair = Pair()
        self.named = Named()
        self.cube = Cube()
        self.vector = nn.Linear(4, 6)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.maps(x))
        self.tokens(x), self.last(x), self.pair(x), self.named(x), self.cube(x)
        return self.vector(x.mean((2, 3)))


class Tokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class ChannelsLast(nn.Module):
    output_fmt = "NHWC"

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(x, "b c h w -> b h w c")


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return 2 * x, "attention"


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": x}


class Cube(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, None]


PIXELS = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "name",
    [
        "test_resnet",
        "test_efficientnet",
        "test_convnext",
        "test_nfnet",
        "test_byobnet",
        "test_maxvit",
        "test_vit",
        SWIN,
    ],
)
def test_a_classifier_gives_in_passing_what_its_backbone_gives(name: str) -> None:
    """Read by hooks in the pass that ends in logits: the same columns and numbers, and the logits themselves."""
    bare = backbone(name)
    args = {"num_classes": 7, **(SWIN_ARGS if name == SWIN else {})}
    classifier = load_backbone(name, pretrained=False, model_args=args).model
    classifier.load_state_dict(bare.model.state_dict(), strict=False)
    size = bare.data_config["input_size"]
    named, passing = FeatureExtractor(bare), FeatureExtractor(classifier, input_size=size, logits=True)
    assert list(columns(passing)) == [*columns(named), "logits"]
    expected, found = named(images(name)), passing(images(name))
    torch.testing.assert_close(found[:, : named.width], expected, rtol=1e-3, atol=1e-4)
    with torch.inference_mode():
        assert torch.equal(found[:, named.width :], classifier(images(name)))


def test_stages_that_are_no_modules_are_refused() -> None:
    """HRNet's first stage is a few lines of its forward pass."""
    network = timm.create_model("hrnet_w18_small", pretrained=False)
    with pytest.raises(UsageError, match="layer 'stem' of HighResolutionNet is no module of its own"):
        FeatureExtractor(network)


def test_module_layers_of_every_kind() -> None:
    model = Several()
    extractor = FeatureExtractor(model, ["maps", "norm", "tokens", "last", "pair", "vector"])
    assert extractor.layers == ("maps", "norm", "tokens", "last", "pair", "vector")
    assert widths(extractor) == (4, 4, 4, 4, 4, 6)
    model.eval()
    with torch.no_grad():
        first = model.maps(PIXELS)
        normed = model.norm(first).mean((2, 3))
        expected = torch.cat([first.mean((2, 3)), normed, normed, normed, 2 * normed, model.vector(normed)], 1)
    torch.testing.assert_close(extractor(PIXELS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ("unused", ["'unused'", "not reached"]),
        ("cube", ["'cube'", "(1, 1, 4, 222, 222)"]),
        ("named", ["'named'", "dict"]),
        ("vectr", ["did you mean", "vector"]),
        ("auto", ["finds no stages in Several", "maps (4, 222, 222), vector (6)"]),
        ([0], ["name them"]),
    ],
)
def test_module_layers_that_cannot_be_used(layer: Any, words: list[str]) -> None:
    model = Several()
    with pytest.raises(UsageError) as error:
        FeatureExtractor(model, layer)
    text = one_line(error)
    assert all(word in text for word in words)
    assert not any(module._forward_hooks for module in model.modules())  # even after an error


class Flat(nn.Module):
    """A LeNet of the old school: ``view`` and a linear layer, so one image size only."""

    def __init__(self, size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 5, stride=4)
        self.fc = nn.Linear(4 * ((size - 5) // 4 + 1) ** 2, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.fc(x.view(x.size(0), -1))


def test_module_that_needs_contiguous_maps() -> None:
    model = Flat(224)
    with torch.no_grad():
        expected = torch.cat([model.conv(PIXELS).mean((2, 3)), model(PIXELS)], 1)
    torch.testing.assert_close(FeatureExtractor(model, "conv,fc")(PIXELS), expected, rtol=1e-4, atol=1e-5)


def test_module_of_another_image_size() -> None:
    """The size of a module's images is that of its transform, not 224."""
    model = Flat(32)
    extractor = FeatureExtractor(model, "conv,fc", transform=to_tensor)
    assert widths(extractor) == (4, 7)
    pixels = extractor.transform(Image.new("RGB", (50, 60), "red"))[None]
    with torch.no_grad():
        expected = torch.cat([model.conv(pixels).mean((2, 3)), model(pixels)], 1)
    torch.testing.assert_close(extractor(pixels), expected, rtol=1e-4, atol=1e-5)


def test_numbered_layers_of_a_sequential() -> None:
    """In a module without stages, ``"0,2"`` are names."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    assert widths(FeatureExtractor(model, ["0", "2"])) == (4, 5)
    assert widths(FeatureExtractor(model, "0,2")) == (4, 5)


def test_module_without_transform_cannot_read_pictures() -> None:
    extractor = FeatureExtractor(Several(), "maps")
    with pytest.raises(UsageError, match=r"transform=.*DataLoader"):
        extractor.transform(Image.new("RGB", (8, 8)))


# ---------------------------------------- nothing is left behind


def test_module_is_used_in_eval_mode() -> None:
    """Batch norm and dropout must not depend on the batch, nor learn from it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    extractor = FeatureExtractor(model, ["2"])
    together = extractor(PIXELS)
    alone = torch.cat([extractor(PIXELS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)
    assert model[1].num_batches_tracked == 0
    assert model[1].running_mean.abs().max() == 0

"""``layers="auto"`` for networks that do not name their stages: torchvision, Hugging Face, and the user's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vgg import VGG, make_layers
from torchvision.models.vision_transformer import VisionTransformer
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from featdiff import FeatureExtractor
from featdiff.exceptions import UsageError
from featdiff.features.stages import maps_with_channels_last, watch


def auto(model: nn.Module, *sides: int) -> tuple[str, ...]:
    """The layers that are chosen for images of 64 x 64, or of ``sides``."""
    height, width = (sides * 2)[:2] if sides else (64, 64)
    return FeatureExtractor(model.eval(), input_size=(3, height, width)).layers


def vgg() -> nn.Module:
    model = VGG(make_layers([4, "M", 8, "M", 8, 8, "M", 8, 8, "M", 8, 8, "M"]), num_classes=4, init_weights=False)
    model.classifier = nn.Sequential(nn.Linear(8 * 49, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 4))
    return model


def convnext() -> nn.Module:
    return ConvNeXt([CNBlockConfig(8, 12, 2), CNBlockConfig(12, 16, 2), CNBlockConfig(16, None, 2)], num_classes=4)


def vit(blocks: int = 12) -> nn.Module:
    return VisionTransformer(64, 16, blocks, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=4)


VIT = {"image_size": 64, "patch_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
SWIN = {"image_size": 64, "embed_dim": 8, "depths": [2, 2, 2], "num_heads": [2, 2, 2], "window_size": 4}
WIDTHS = {"hidden_sizes": [8, 12, 16, 20], "num_labels": 4}
BLOCKS = (1, 4, 6, 9, 11)  # of twelve, five that are evenly spaced and end with the last
STEM_AND_STAGES = ("resnet.embedder.embedder", *(f"resnet.encoder.stages.{i}" for i in range(4)), "pre_logits")

EXPECTED: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "resnet18": (
        lambda: models.resnet18(num_classes=4),
        ("relu", "layer1", "layer2", "layer3", "layer4", "pre_logits"),
    ),
    "mobilenet_v3_small": (
        lambda: models.mobilenet_v3_small(num_classes=4),
        ("features.0", "features.1", "features.3", "features.8", "features.12", "pre_logits"),
    ),
    "squeezenet1_1": (  # its logits are pooled, so no linear layer gives them
        lambda: models.squeezenet1_1(num_classes=4),
        ("features.1", "features.4", "features.7", "features.12"),
    ),
    "vgg11": (vgg, ("features.1", "features.4", "features.9", "features.14", "features.19", "pre_logits")),
    "densenet": (
        lambda: DenseNet(4, (2, 2, 2, 2), num_init_features=8, num_classes=4),
        ("features.relu0", *(f"features.denseblock{i}" for i in (1, 2, 3, 4)), "pre_logits"),
    ),
    "convnext": (convnext, ("features.1", "features.3", "features.5", "pre_logits")),
    "vit": (vit, (*(f"encoder.layers.encoder_layer_{i}" for i in BLOCKS), "pre_logits")),
    "swin": (
        lambda: SwinTransformer([4, 4], 8, [2, 2, 2], [2, 2, 2], [4, 4], num_classes=4),
        ("features.1", "features.3", "features.5", "pre_logits"),
    ),
    "huggingface resnet": (
        lambda: ResNetForImageClassification(ResNetConfig(embedding_size=8, depths=[2, 2, 1, 1], **WIDTHS)),
        STEM_AND_STAGES,
    ),
    "huggingface resnet of basic blocks": (
        lambda: ResNetForImageClassification(
            ResNetConfig(embedding_size=8, depths=[2, 1, 1, 1], layer_type="basic", **WIDTHS)
        ),
        STEM_AND_STAGES,
    ),
    "huggingface vit": (
        lambda: ViTForImageClassification(ViTConfig(num_hidden_layers=12, num_labels=4, **VIT)),
        (*(f"vit.layers.{i}" for i in BLOCKS), "pre_logits"),
    ),
    "huggingface vit without a head": (
        lambda: ViTModel(ViTConfig(num_hidden_layers=3, **VIT)),
        ("layers.0", "layers.1", "layers.2"),
    ),
    "huggingface swin": (  # a stage ends by merging tokens, so what it gives has the next resolution
        lambda: SwinForImageClassification(SwinConfig(num_labels=4, **SWIN)),
        (
            *("swin.encoder.layers.0.blocks.1", "swin.encoder.layers.1.blocks.1", "swin.encoder.layers.2"),
            "pre_logits",
        ),
    ),
    "huggingface convnext": (
        lambda: ConvNextForImageClassification(ConvNextConfig(depths=[1, 1, 2, 1], **WIDTHS)),
        (*(f"convnext.encoder.stages.{i}" for i in range(4)), "pre_logits"),
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_stages_that_are_found(name: str) -> None:
    make, expected = EXPECTED[name]
    model = make()
    assert auto(model) == expected
    assert auto(model) == expected
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("sides", [(32,), (96, 160), (100, 163)])
def test_stages_are_the_same_for_other_sizes(sides: tuple[int, ...]) -> None:
    """At 32 pixels the last stage has a single position."""
    assert auto(models.resnet18(num_classes=4), *sides) == EXPECTED["resnet18"][1]


def test_bottlenecks_begin_at_the_former_resolution_and_are_no_stage_of_it() -> None:
    assert auto(models.resnet50(num_classes=4)) == EXPECTED["resnet18"][1]


# ---- modules of the user's own ----


class Normalised(nn.Module):
    """A classifier that prepares its images itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.prepare = nn.BatchNorm2d(3)
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.prepare(x))


def block(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width), nn.GELU(), nn.Conv2d(width, width, 1))


def convmixer() -> nn.Module:
    blocks = [block(8) for _ in range(7)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 8, 8), nn.GELU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )


def test_blocks_of_one_resolution_are_taken_from_a_plain_sequence() -> None:
    assert auto(convmixer()) == ("2", "4", "5", "7", "8", "pre_logits")
    assert auto(Normalised(convmixer()))[0] == "model.2"


@pytest.mark.parametrize("name", ["resnet18", "vit", "swin"])
def test_a_wrapper_that_normalises_changes_no_more_than_the_names(name: str) -> None:
    make, expected = EXPECTED[name]
    assert auto(Normalised(make())) == tuple(f"model.{layer}" for layer in expected[:-1]) + ("pre_logits",)


def test_timm_models_keep_their_own_stages() -> None:
    model = timm.create_model("test_resnet", pretrained=False, num_classes=4)
    stages = [info["module"] for info in model.feature_info]
    assert auto(model) == (*stages, "pre_logits") == ("act1", "layer1", "layer2", "layer3", "layer4", "pre_logits")


def test_many_resolutions_are_thinned_out_and_the_last_is_kept() -> None:
    convs = [nn.Conv2d(3 if i == 0 else 4, 4, 3, stride=2, padding=1) for i in range(8)]
    model = nn.Sequential(*convs, nn.Flatten(), nn.Linear(16, 2))
    layers = auto(model, 512)
    assert layers == ("1", "2", "4", "5", "7", "pre_logits")


def test_a_layer_that_is_called_again_and_again_stands_where_it_was_called_last() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()
            self.first = nn.Conv2d(3, 4, 3, 2, 1)
            self.second = nn.Conv2d(4, 4, 3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.second(self.relu(self.first(x)))).mean((2, 3))

    assert auto(Shared()) == ("first", "relu")


def test_maps_with_channels_last_are_averaged_over_space() -> None:
    """Swin of torchvision gives (B, H, W, C), and its maps are averaged over H and W, by name as by ``auto``."""
    torch.manual_seed(0)
    model = EXPECTED["swin"][0]().eval()
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        maps = model.features[:4](pixels)  # type: ignore[index, operator]
    assert maps.shape == (2, 8, 8, 16)

    named = FeatureExtractor(model, ["features.3"], input_size=(3, 64, 64))
    chosen = FeatureExtractor(model, "auto", input_size=(3, 64, 64))
    torch.testing.assert_close(named(pixels)[:, :16], maps.mean((1, 2)))
    torch.testing.assert_close(chosen(pixels)[:, 8:24], maps.mean((1, 2)))
    torch.testing.assert_close(named(pixels)[:, 16:], maps.std((1, 2), correction=0))


@pytest.mark.parametrize(("kind", "expected"), [("swin", True), ("convnext", False)])
def test_a_map_as_high_and_wide_as_it_has_channels_is_read_like_the_others(kind: str, expected: bool) -> None:
    """Patches of 4 and 8 channels: at 32 pixels the first stage gives 8 x 8 x 8."""
    model = EXPECTED[kind][0]().eval()
    pixels = torch.rand(1, 3, 32, 32)
    outputs = watch(model, lambda: model(pixels), pixels)
    assert outputs["features.1"].shape == (8, 8, 8)
    assert outputs["features.1"].channels_last is None
    assert ("features.1" in maps_with_channels_last(outputs)) is expected


# ---- where nothing is found ----


def mlp() -> nn.Module:
    layers = [nn.Sequential(nn.Linear(48 if i == 0 else 8, 8), nn.ReLU()) for i in range(24)]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(8, 2))


def test_a_network_without_stages_is_refused_with_candidates() -> None:
    with pytest.raises(UsageError, match=r"finds no stages in Sequential.*layers=\['3'\]: 3 \(8\), 6 \(8\)") as error:
        auto(mlp(), 4)
    text = str(error.value)
    assert "\n" not in text
    assert text.count("(8)") == 8
    assert error.value.argument == "layers"
    assert auto_named(mlp(), ["3", "6"]) == ("3", "6")


def auto_named(model: nn.Module, layers: list[str]) -> tuple[str, ...]:
    return FeatureExtractor(model.eval(), layers, input_size=(3, 4, 4)).layers


def test_a_network_of_one_resolution_and_no_blocks_is_refused_with_candidates() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(UsageError, match=r"layers=\['0'\]: 0 \(4, 62, 62\)"):
        auto(model)


def test_a_network_that_gives_no_features_at_all_is_refused() -> None:
    with pytest.raises(UsageError, match=r"its modules give no features"):
        auto(nn.Identity())

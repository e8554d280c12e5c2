"""Pooled features: one path for every timm family, hooks for any other module, and the key of the cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from featdiff.exceptions import UsageError
from featdiff.features.backbones import Backbone, load_backbone
from featdiff.features.extractor import FeatureExtractor
from featdiff.features.hooks import pool
from featdiff.features.layers import AUTO_LAYERS, resolve_layers
from featdiff.features.layout import block_normalise

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


# ---------------------------------------- timm backbones


@pytest.mark.parametrize(
    "name",
    ["test_resnet", "test_efficientnet", "test_convnext", "test_nfnet", "test_maxvit", "test_vit", SWIN],
)
def test_features_are_the_means_of_timm_intermediates(name: str) -> None:
    found = backbone(name)
    extractor = FeatureExtractor(found)
    features = extractor(images(name))
    with torch.inference_mode():
        maps = found.model.forward_intermediates(images(name), output_fmt="NCHW", intermediates_only=True)
        seen = found.model.forward_head(found.model.forward_features(images(name)), pre_logits=True)
    assert extractor.layers == (*(info["module"] for info in found.model.feature_info), "pre_logits")
    assert widths(extractor) == (*(info["num_chs"] for info in found.model.feature_info), seen.shape[1])
    assert features.shape == (2, extractor.width) and features.dtype == torch.float32
    expected = torch.cat([*(m.mean((2, 3)) for m in maps), seen], 1)
    torch.testing.assert_close(features[:, : sum(widths(extractor))], expected, rtol=1e-4, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 1e-3  # the images matter


@pytest.mark.parametrize(
    ("name", "stage", "deep"),
    [
        ("test_resnet", "layer4", True),
        ("test_efficientnet", "blocks.4", True),
        ("test_vit", "blocks.5", True),
        (SWIN, "layers.3", True),
        ("mobilenetv3_small_050", "blocks.5", False),  # a convolution after pooling: pre-logits are no map's mean
    ],
)
def test_deep_layers_come_with_their_spatial_std(name: str, stage: str, deep: bool) -> None:
    found = backbone(name)
    extractor = FeatureExtractor(found)
    with torch.inference_mode():
        last = found.model.forward_intermediates(images(name), output_fmt="NCHW", intermediates_only=True)[-1]
        final = found.model.forward_features(images(name))
    names = [*extractor.layers, f"{stage}:std", *(["pre_logits:std"] if deep else [])]
    where = columns(extractor)
    assert list(where) == names
    assert [part.start for part in where.values()][1:] == [part.stop for part in where.values()][:-1]
    features = extractor(images(name))
    assert extractor.width == features.shape[1] == where[names[-1]].stop
    std = features[:, where[f"{stage}:std"]]
    torch.testing.assert_close(std, last.std((2, 3), correction=0), rtol=1e-3, atol=1e-5)
    if deep:
        places = {"test_vit": (1,), SWIN: (1, 2)}.get(name, (2, 3))
        std = features[:, where["pre_logits:std"]]
        torch.testing.assert_close(std, final.std(places, correction=0), rtol=1e-3, atol=1e-5)


def test_pre_logits_can_be_asked_for_or_left_out() -> None:
    pixels = images("test_resnet")
    whole = FeatureExtractor(backbone("test_resnet"))
    some = FeatureExtractor(backbone("test_resnet"), "pre_logits,layer2")
    assert list(columns(some)) == ["pre_logits", "layer2", "layer2:std", "pre_logits:std"]
    for name in ("pre_logits", "layer2", "pre_logits:std"):
        found, expected = some(pixels)[:, columns(some)[name]], whole(pixels)[:, columns(whole)[name]]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert list(columns(FeatureExtractor(backbone("test_resnet"), "layer2"))) == ["layer2", "layer2:std"]
    inner = FeatureExtractor(backbone("test_resnet"), "layer2.0,pre_logits")
    assert list(columns(inner)) == ["layer2.0", "pre_logits", "layer2.0:std", "pre_logits:std"]
    torch.testing.assert_close(
        inner(pixels)[:, columns(inner)["pre_logits"]], whole(pixels)[:, columns(whole)["pre_logits"]]
    )
    with pytest.raises(UsageError, match="another layer beside 'pre_logits'"):
        FeatureExtractor(backbone("test_resnet"), "pre_logits")


def test_vit_auto_takes_evenly_spaced_blocks_to_the_last() -> None:
    found = backbone("test_vit3")
    extractor = FeatureExtractor(found)
    assert extractor.layers == (*(f"blocks.{i}" for i in (1, 3, 4, 6, 8)), "pre_logits")
    with torch.inference_mode():
        maps = found.model.forward_intermediates(images("test_vit3"), output_fmt="NCHW", intermediates_only=True)
    expected = torch.cat([maps[i].mean((2, 3)) for i in (1, 3, 4, 6, 8)], 1)
    found_means = extractor(images("test_vit3"))[:, : expected.shape[1]]
    torch.testing.assert_close(found_means, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [7, 8, 9, 12, 14, 18, 24, 27, 32, 40])
def test_auto_spacing(depth: int) -> None:
    blocks = [f"blocks.{i}" for i in range(depth)]
    chosen = [blocks.index(name) for name in resolve_layers("auto", blocks, [])]
    gaps = np.diff([-1, *chosen])
    assert len(chosen) == AUTO_LAYERS == 5
    assert chosen[-1] == depth - 1
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


def test_auto_never_names_a_layer_twice() -> None:
    """Some families (coat) list one module under several stages."""
    layers = resolve_layers("auto", ["serial", "parallel", "parallel", "parallel"], [])
    assert len(set(layers)) == len(layers)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("auto", (*RESNET_LAYERS, "pre_logits")),
        (["auto"], (*RESNET_LAYERS, "pre_logits")),
        ("layer1,layer3", ("layer1", "layer3")),
        (" layer1 , layer3 ,", ("layer1", "layer3")),
        ("layer3,layer1", ("layer3", "layer1")),
        ("-1", ("layer4",)),
        ([-1, 0], ("layer4", "act1")),
        ("0,-2", ("act1", "layer3")),
        ([0, "layer2"], ("act1", "layer2")),
        ("0,layer2,-1", ("act1", "layer2", "layer4")),
        (("layer1", "layer1.0.conv1"), ("layer1", "layer1.0.conv1")),
        ([np.int64(1), np.str_("layer4")], ("layer1", "layer4")),
    ],
    ids=str,
)
def test_layers_by_name_and_index(layers: Any, expected: tuple[str, ...]) -> None:
    extractor = FeatureExtractor(backbone("test_resnet"), layers)
    assert extractor.layers == expected
    by_name = dict(zip(RESNET_LAYERS, (32, 32, 48, 192, 96), strict=True)) | {"layer1.0.conv1": 32, "pre_logits": 96}
    assert widths(extractor) == tuple(by_name[name] for name in expected)


def test_columns_follow_the_order_asked_for() -> None:
    whole = FeatureExtractor(backbone("test_resnet"))
    parts = means(whole, images("test_resnet")).split(widths(whole), 1)
    by_name = dict(zip(whole.layers, parts, strict=True))
    for layers in ("layer3,layer1", "-1,0,layer2", "layer2"):
        extractor = FeatureExtractor(backbone("test_resnet"), layers)
        expected = torch.cat([by_name[name] for name in extractor.layers], 1)
        torch.testing.assert_close(means(extractor, images("test_resnet")), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("layer9", ["'layer9'", "did you mean", "layer4"]),
        ("layr1", ["did you mean", "layer1"]),
        ("layer1.0.cnv1", ["did you mean", "layer1.0.conv1"]),
        ("xyz", ["'xyz'", "act1", "layer4"]),
        ("auto,layer1", ["auto"]),
        ("5", ["no layer 5", "5 (act1, layer1"]),
        ("-6", ["no layer -6", "layer4"]),
        ("layer1,layer1", ["each layer once"]),
        ("layer4,-1", ["each layer once"]),
        ("", ["at least one layer"]),
        ([], ["at least one layer"]),
        ("--1", ["--1"]),
        ("²", ["²"]),
        (3, ["3"]),
        ([1.5], ["1.5"]),
        ([None], ["None"]),
    ],
    ids=str,
)
def test_wrong_layers(layers: Any, words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        FeatureExtractor(backbone("test_resnet"), layers)
    text = one_line(error)
    assert all(word in text for word in words)


def test_did_you_mean_names_each_layer_once() -> None:
    with pytest.raises(UsageError) as error:
        FeatureExtractor(backbone("test_resnet"), "layer9")
    offered = one_line(error).split("did you mean ")[1].rstrip("?").split(" or ")
    assert len(set(offered)) == len(offered)


# ---------------------------------------- inner layers, through hooks


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("test_resnet", "conv1"),
        ("test_resnet", "layer2.0"),
        ("test_resnet", "layer1.0.act1"),
        ("test_resnet", "layer1.0.bn1"),  # the next layer, act1, works in place
        ("test_resnet", "layer1.0.bn2"),  # the shortcut is added in place
        ("test_convnext", "stages.1.downsample.0"),  # a LayerNorm2d: (B, C, H, W), unlike nn.LayerNorm
        ("test_vit", "blocks.2.mlp.fc1"),
        ("test_vit", "head_drop"),
    ],
)
def test_inner_layer_equals_a_manual_hook(name: str, layer: str) -> None:
    """What counts is what the layer gave, not what later layers made of that memory."""
    model = backbone(name).model
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        mean = {4: (2, 3), 3: (1,)}.get(output.dim())
        seen.append(output.mean(mean) if mean else output.clone())

    handle = model.get_submodule(layer).register_forward_hook(keep)
    with torch.inference_mode():
        model(images(name))
    handle.remove()
    features = means(FeatureExtractor(backbone(name), layer), images(name))
    torch.testing.assert_close(features, seen[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "layer", "inner"),
    [
        ("test_resnet", "layer1", "layer1.0.conv1"),
        ("test_convnext", "stages.1", "stages.3.blocks.0"),
        ("test_vit", "blocks.3", "blocks.5.norm1"),
        (SWIN, "layers.1", "layers.3.blocks.0"),
    ],
)
def test_a_stage_gives_the_same_beside_an_inner_layer(name: str, layer: str, inner: str) -> None:
    alone = FeatureExtractor(backbone(name), layer)
    beside = FeatureExtractor(backbone(name), f"{layer},{inner}")
    expected = means(alone, images(name))
    found = beside(images(name))[:, : widths(alone)[0]]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "stage", "later"),
    [
        ("test_resnet", "layer4", "global_pool"),
        ("test_vit", "blocks.5", "head_drop"),
        (SWIN, "layers.0", "norm"),
    ],
)
def test_stage_beside_a_layer_after_the_last_stage(name: str, stage: str, later: str) -> None:
    """Pooling and head are part of the network too, also when a stage is asked for with them."""
    both = means(FeatureExtractor(backbone(name), f"{stage},{later}"), images(name))
    parts = [means(FeatureExtractor(backbone(name), layer), images(name)) for layer in (stage, later)]
    torch.testing.assert_close(both, torch.cat(parts, 1), rtol=1e-4, atol=1e-5)


def test_channels_last_maps_of_a_linear_layer() -> None:
    """Inside ConvNeXt, ``mlp.fc1`` gives (B, H, W, C)."""
    layer = backbone("test_convnext").model.get_submodule("stages.0.blocks.0.mlp.fc1")
    extractor = FeatureExtractor(backbone("test_convnext"), "stages.0.blocks.0.mlp.fc1")
    assert widths(extractor) == (layer.out_features,)


def test_layer_that_folds_windows_into_the_batch_is_refused() -> None:
    """Swin's attention gives (B * windows, N, C): not a vector per image."""
    with pytest.raises(UsageError, match=r"layers\.0\.blocks\.0\.attn"):
        FeatureExtractor(backbone(SWIN), "layers.0.blocks.0.attn")


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
        ("auto", ["name the layers"]),
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


def to_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture.resize((32, 32)), dtype=np.float32) / 255).permute(2, 0, 1)


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


@pytest.mark.parametrize("layers", ["layer1,layer4", "layer1.0.bn1,layer4"])
def test_extraction_leaves_no_hooks_gradients_or_changed_weights(layers: str) -> None:
    model = backbone("test_resnet").model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    features = FeatureExtractor(backbone("test_resnet"), layers)(images("test_resnet"))
    assert not features.requires_grad
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_module_is_used_in_eval_mode() -> None:
    """Batch norm and dropout must not depend on the batch, nor learn from it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    extractor = FeatureExtractor(model, ["2"])
    together = extractor(PIXELS)
    alone = torch.cat([extractor(PIXELS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)
    assert model[1].num_batches_tracked == 0
    assert model[1].running_mean.abs().max() == 0


def test_autocast_is_for_gpus_only() -> None:
    assert FeatureExtractor(backbone("test_resnet"), mixed_precision=True).mixed_precision is False


# ---------------------------------------- images of the wrong size


@pytest.mark.parametrize("name", [SWIN, "test_maxvit", "test_vit_relpos"])
def test_fixed_size_family_refuses_other_transforms(name: str) -> None:
    args = SWIN_ARGS if name == SWIN else None
    found = load_backbone(name, pretrained=False, model_args=args, transform={"input_size": (3, 96, 96)})
    with pytest.raises(UsageError) as error:
        FeatureExtractor(found)
    text = one_line(error)
    assert f"{found.tag} cannot take images of 96 x 96 pixels" in text
    assert text[-1] != ":"  # a reason follows


@pytest.mark.parametrize("shape", [(2, 3, 96, 96), (2, 1, 224, 224)], ids=["96 px", "grey"])
def test_ready_tensors_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    """As a user's DataLoader may give them."""
    extractor = FeatureExtractor(backbone(SWIN), "layers.0")
    with pytest.raises(UsageError) as error:
        extractor(torch.zeros(shape))
    text = one_line(error)
    assert f"{shape[2]} x {shape[3]}" in text or str(shape) in text


# ---------------------------------------- the key of the cache


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

    def extractor(weights: Path = seeded_backbone, layers: Any = "layer1,layer2", **transform: Any) -> FeatureExtractor:
        return FeatureExtractor(load_backbone("test_resnet", weights=weights, transform=transform), layers)

    keys = [
        extractor().key(),
        extractor().key("matched 32"),
        extractor(other).key(),
        extractor(layers="layer1").key(),
        extractor(layers="layer2,layer1").key(),
        extractor(input_size=(3, 96, 96)).key(),
        extractor(mean=(0.5, 0.5, 0.4)).key(),
        extractor(interpolation="nearest").key(),
        extractor(crop_pct=0.9).key(),
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


# ---------------------------------------- pooling and normalising


def test_pool() -> None:
    values = torch.arange(24.0)
    assert pool(values.reshape(1, 2, 3, 4)).tolist() == [[5.5, 17.5]]
    assert pool(values.reshape(1, 4, 6)).tolist() == [[9.0, 10.0, 11.0, 12.0, 13.0, 14.0]]
    assert pool(values.reshape(2, 12)).tolist() == values.reshape(2, 12).tolist()
    for wrong in (values, values.reshape(1, 1, 2, 3, 4), None):
        with pytest.raises(UsageError, match=r"layer 'x' gives .*featdiff needs"):
            pool(wrong, "x")  # type: ignore[arg-type]


def test_block_normalise_is_per_sample_and_layer() -> None:
    generator = torch.Generator().manual_seed(3)
    sizes = (40, 8, 300)
    scales = torch.repeat_interleave(torch.tensor([1.0, 50.0, 0.1]), torch.tensor(sizes))
    features = torch.randn(5, sum(sizes), generator=generator) * scales + 7 * scales
    normalised = block_normalise(features, sizes)
    assert normalised.shape == features.shape
    for part in normalised.split(list(sizes), 1):
        torch.testing.assert_close(part.mean(1), torch.zeros(5), atol=1e-4, rtol=0)
        torch.testing.assert_close(part.var(1, correction=0), torch.ones(5), atol=1e-3, rtol=0)
    expected = (features[2, 40:48] - features[2, 40:48].mean()) / features[2, 40:48].std(correction=0)
    torch.testing.assert_close(normalised[2, 40:48], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(block_normalise(features[2:3], sizes), normalised[2:3])  # no matter the batch


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e4])
def test_block_normalise_of_constant_features_is_zero(value: float) -> None:
    normalised = block_normalise(torch.full((2, 7), value), (6, 1))
    assert normalised.isfinite().all()
    assert normalised.abs().max() < 1e-3

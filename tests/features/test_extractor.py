"""Pooled features of timm backbones: one path for every family, stages and inner layers, and what is left behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_backbones import RESNET_LAYERS, SWIN, SWIN_ARGS, backbone, columns, images, means, one_line, widths
from torch import Tensor, nn

from featdiff.exceptions import UsageError
from featdiff.features.backbones import load_backbone
from featdiff.features.extractor import FeatureExtractor
from featdiff.features.layers import AUTO_LAYERS, resolve_layers

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
        options = {"output_fmt": "NCHW", "intermediates_only": True, "norm": name == "test_vit"}
        maps = found.model.forward_intermediates(images(name), **options)
        seen = found.model.forward_head(found.model.forward_features(images(name)), pre_logits=True)
    assert extractor.layers == (*(info["module"] for info in found.model.feature_info), "pre_logits")
    assert widths(extractor) == (*(info["num_chs"] for info in found.model.feature_info), seen.shape[1])
    assert features.shape == (2, extractor.width) and features.dtype == torch.float32
    expected = torch.cat([*(m.mean((2, 3)) for m in maps), seen], 1)
    torch.testing.assert_close(features[:, : sum(widths(extractor))], expected, rtol=1e-4, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 1e-3  # the images matter


@pytest.mark.parametrize(
    "name",
    ["test_resnet", "test_efficientnet", "test_convnext", "test_nfnet", "test_maxvit", "test_vit", SWIN],
)
def test_features_do_not_depend_on_how_channels_lie_in_memory(name: str) -> None:
    """On a GPU they come last."""
    extractor = FeatureExtractor(backbone(name))
    extractor.keep_maps()
    expected, maps = extractor(images(name)), extractor.maps_of(images(name))
    extractor.model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(extractor(images(name)), expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(extractor.maps_of(images(name)), maps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


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
        options = {"output_fmt": "NCHW", "intermediates_only": True, "norm": name == "test_vit"}
        last = found.model.forward_intermediates(images(name), **options)[-1]
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
        final = final[:, 1:] if name == "test_vit" else final  # without the class token
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
        maps = found.model.forward_intermediates(
            images("test_vit3"), output_fmt="NCHW", intermediates_only=True, norm=True
        )
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


def test_precision_is_whole_unless_asked() -> None:
    pixels = images("test_resnet")
    plain = FeatureExtractor(backbone("test_resnet"))
    whole = FeatureExtractor(backbone("test_resnet"), precision="fp32")
    half = FeatureExtractor(backbone("test_resnet"), precision="bf16")
    assert [plain.precision, whole.precision, half.precision] == ["float32", "float32", "bfloat16 autocast"]
    assert plain.key() == whole.key() != half.key()
    assert torch.equal(plain(pixels), whole(pixels))

    rows = half(pixels)
    assert rows.dtype == torch.float32
    change = (rows - plain(pixels)).abs().max() / plain(pixels).abs().max()
    assert 1e-5 < change < 3e-2  # bfloat16 has 8 bits
    alone = torch.cat([half(pixels[i : i + 1]) for i in range(len(pixels))])
    torch.testing.assert_close(alone, rows, rtol=0, atol=1e-6)


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

"""What is read of DINOv2, DINOv3, SigLIP and CLIP: the real architectures, small, with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from featdiff.exceptions import UsageError
from featdiff.features.backbones import Backbone, load_backbone
from featdiff.features.extractor import FeatureExtractor
from featdiff.features.layout import PRE_LOGITS, Kind
from featdiff.features.recommended import RECOMMENDED, facts_of

SMALL = {"embed_dim": 48, "num_heads": 3, "depth": 3}
DINOV2 = "vit_small_patch14_reg4_dinov2"
DINOV3 = "vit_small_patch16_dinov3"
SIGLIP = "vit_base_patch16_siglip_224"
CLIP = "vit_base_patch16_clip_224"
#: Side of the images, and tokens before those of the patches.
TOWERS = {DINOV2: (56, 5), DINOV3: (64, 5), SIGLIP: (64, 0), CLIP: (64, 1)}


def tower(name: str) -> Backbone:
    side, _ = TOWERS[name]
    found = load_backbone(name, pretrained=False, model_args=SMALL, size=side)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a norm of its own scale, which a test can see
        for parameter in found.model.norm.parameters():  # type: ignore[union-attr]
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return found


def rows_of(backbone: Any, name: str, **options: Any) -> tuple[FeatureExtractor, Tensor, Tensor]:
    side, _ = TOWERS[name]
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    extractor = FeatureExtractor(backbone, **options)
    return extractor, extractor(pixels), pixels


def tokens_by_hand(model: Any, pixels: Tensor, block: int) -> Tensor:
    """Tokens after a block, all of them, by a hook of the test's own; then the final norm."""
    kept: list[Tensor] = []
    handle = model.blocks[block].register_forward_hook(lambda _, args, output: kept.append(output))
    with torch.no_grad():
        model(pixels)
        handle.remove()
        normed: Tensor = model.norm(kept[0])
    return normed


def part(extractor: FeatureExtractor, rows: Tensor, layer: str, kind: Kind) -> Tensor:
    (found,) = [part for part in extractor.layout.parts if (part.layer, part.kind) == (layer, kind)]
    return rows[:, found.columns]


@pytest.mark.parametrize("name", TOWERS)
def test_stages_are_means_of_normed_patches(name: str) -> None:
    """Of every block; class tokens and registers are left out."""
    backbone = tower(name)
    extractor, rows, pixels = rows_of(backbone, name)
    _, prefix = TOWERS[name]
    assert extractor.layers == ("blocks.0", "blocks.1", "blocks.2", PRE_LOGITS)
    for i in range(3):
        patches = tokens_by_hand(backbone.model, pixels, i)[:, prefix:]
        assert patches.shape[1] == 16
        torch.testing.assert_close(part(extractor, rows, f"blocks.{i}", Kind.MEAN), patches.mean(1))
    std = part(extractor, rows, "blocks.2", Kind.SPATIAL_STD)
    torch.testing.assert_close(std, patches.std(1, correction=0))


@pytest.mark.parametrize("name", TOWERS)
def test_pre_logits_are_what_the_head_sees(name: str) -> None:
    """The class token after the norm; SigLIP has none, and pools by attention."""
    backbone = tower(name)
    model: Any = backbone.model
    extractor, rows, pixels = rows_of(backbone, name)
    tokens = tokens_by_hand(model, pixels, 2)
    with torch.no_grad():
        expected = model.attn_pool(tokens) if name == SIGLIP else tokens[:, 0]
    torch.testing.assert_close(part(extractor, rows, PRE_LOGITS, Kind.PRE_LOGITS), expected)
    std = part(extractor, rows, PRE_LOGITS, Kind.SPATIAL_STD)  # of the patches alone
    torch.testing.assert_close(std, tokens[:, TOWERS[name][1] :].std(1, correction=0))


@pytest.mark.parametrize("name", TOWERS)
def test_maps_are_normed(name: str) -> None:
    backbone = tower(name)
    extractor, _, pixels = rows_of(backbone, name)
    extractor.keep_maps(["blocks.1"])
    (found,) = extractor.maps_of(pixels)
    patches = tokens_by_hand(backbone.model, pixels, 1)[:, TOWERS[name][1] :]
    torch.testing.assert_close(found, patches.unflatten(1, (4, 4)).permute(0, 3, 1, 2))


@pytest.mark.parametrize("name", TOWERS)
def test_a_module_of_ones_own_gives_the_same_stages(name: str) -> None:
    backbone = tower(name)
    extractor, rows, pixels = rows_of(backbone, name)
    own = FeatureExtractor(backbone.model, input_size=tuple(pixels.shape[1:]))
    own_rows = own(pixels)
    for i in range(3):
        layer = f"blocks.{i}"
        torch.testing.assert_close(part(own, own_rows, layer, Kind.MEAN), part(extractor, rows, layer, Kind.MEAN))
    for layer in ("blocks.2", PRE_LOGITS):
        both = (part(own, own_rows, layer, Kind.SPATIAL_STD), part(extractor, rows, layer, Kind.SPATIAL_STD))
        torch.testing.assert_close(*both)


def test_dinov2_looks_at_224_pixels_unless_told() -> None:
    """Positions come from those of 518 pixels, so a file of weights fits as it is."""
    assert load_backbone(DINOV2, pretrained=False, model_args=SMALL).data_config["input_size"] == (3, 224, 224)
    assert load_backbone(DINOV2, pretrained=False, model_args=SMALL, size=518).data_config["input_size"][1] == 518


@pytest.mark.parametrize(("name", "side"), [(DINOV2, 14), (DINOV3, 16), (SIGLIP, 16), (CLIP, 16)])
def test_odd_sizes_are_refused_in_one_line(name: str, side: int) -> None:
    with pytest.raises(UsageError, match=f"not of 225 x 225: the side must be a multiple of {side}") as error:
        load_backbone(name, pretrained=False, model_args=SMALL, size=225)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "mode"), [(DINOV2, "squash"), (DINOV3, "rectangle"), (CLIP, "squash")])
def test_the_whole_picture_is_seen(name: str, mode: str) -> None:
    """DINOv3 takes any size, so pictures keep their shape."""
    assert load_backbone(name, pretrained=False, model_args=SMALL).data_config["crop_mode"] == mode


def test_costs_are_those_of_the_architectures() -> None:
    """A small DINOv2 has 21 M weights and 257 + 4 tokens: 12 blocks of 12 D^2 and 2 N D for each token, and patches."""
    tokens, width = 261, 384
    by_hand = 12 * tokens * (12 * width**2 + 2 * tokens * width) + 256 * 3 * 14 * 14 * width
    facts = facts_of("vit_small_patch14_reg4_dinov2.lvd142m")
    assert facts.gmacs == pytest.approx(by_hand / 1e9, rel=0.01)
    assert (facts.size, facts.license) == (224, "apache-2.0")
    assert facts.megabytes == pytest.approx(4 * facts.parameters)


def test_recommended_backbones_exist_with_a_licence() -> None:
    import timm

    assert set(RECOMMENDED) <= set(timm.list_pretrained())
    assert all(timm.get_pretrained_cfg(name).license for name in RECOMMENDED)

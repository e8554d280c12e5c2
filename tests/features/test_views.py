"""How much of a picture is seen: rectangles, squashes and crops, and which network gets which."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from tiny_backbones import SWIN, SWIN_ARGS

from featdiff import Detector
from featdiff.exceptions import UsageError
from featdiff.features.backbones import Backbone, load_backbone
from featdiff.features.extractor import FeatureExtractor
from featdiff.features.views import (
    Squash,
    in_words,
    make_transform,
    most_cells,
    rectangle,
    settings_of,
    takes_any_size,
    view_of,
)

USUAL = [1, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 9 / 16]
VIT = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}


def load(name: str = "test_resnet", **options: Any) -> Backbone:
    return load_backbone(name, pretrained=False, **options)


def vit(**options: Any) -> Backbone:
    """A plain ViT, which takes images of one size."""
    model_args = {key: value for key, value in VIT.items() if key != "img_size"}
    return load("vit_tiny_patch16_224", model_args=model_args, **options)


def gradient(width: int, height: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom, from 0 to 255."""
    red = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    green = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([red, green, np.zeros_like(red)], axis=-1).round().astype(np.uint8))


# ---- the rectangle ----


@pytest.mark.parametrize("size", [160, 192, 224, 288, 300, 384, 448])
def test_usual_photographs_have_about_the_inputs_area(size: int) -> None:
    shapes = [rectangle(round(1200 * aspect), 1200, size * size) for aspect in USUAL]
    areas = [height * width / size**2 for height, width in shapes]
    assert abs(np.mean(areas) - 1) < 0.03
    assert max(areas) <= 1.25
    assert all(side % 32 == 0 for shape in shapes for side in shape)


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (224, 224, (224, 224)),
        (4000, 3000, (192, 256)),
        (3000, 4000, (256, 192)),
        (600, 400, (192, 288)),
        (1920, 1080, (160, 288)),
        (900, 300, (128, 384)),
        (3000, 10, (64, 960)),
        (10, 3000, (960, 64)),
        (1, 1, (224, 224)),
    ],
)
def test_rectangles_at_224(width: int, height: int, expected: tuple[int, int]) -> None:
    assert rectangle(width, height, 224 * 224) == expected


@pytest.mark.parametrize("size", [64, 96, 160, 224, 384])
def test_no_other_rectangle_is_nearer(size: int) -> None:
    """By a search of its own over all that are allowed."""
    area = size * size

    def error(shape: tuple[int, int], aspect: float) -> float:
        height, width = shape
        return math.log(width / height / aspect) ** 2 + math.log(height * width / area) ** 2

    sides = range(64, 3000, 32)
    allowed = [(height, width) for height in sides for width in sides if height * width <= 1.25 * area]
    for aspect in [*USUAL, 0.1, 1.234, 5, 40]:
        chosen = rectangle(round(1000 * aspect), 1000, area)
        assert chosen in allowed
        assert error(chosen, aspect) <= min(error(shape, aspect) for shape in allowed) + 1e-3


def test_a_turned_picture_gives_the_turned_rectangle() -> None:
    rng = np.random.default_rng(0)
    for width, height in rng.integers(1, 3000, (200, 2)).tolist():
        assert rectangle(width, height, 224 * 224) == rectangle(height, width, 224 * 224)[::-1]


def test_the_longest_side() -> None:
    longest = max(max(rectangle(width, 10, 224 * 224)) for width in range(10, 3000, 10))
    assert longest == 32 * most_cells(49)


# ---- what is seen ----


@pytest.mark.parametrize(
    ("width", "height", "shape"), [(300, 100, (96, 288)), (100, 300, (288, 96)), (90, 90, (160,) * 2)]
)
def test_a_rectangle_shows_all_four_edges(width: int, height: int, shape: tuple[int, int]) -> None:
    backbone = load(transform={"mean": [0, 0, 0], "std": [1, 1, 1]})
    pixels = backbone.transform(gradient(width, height))
    assert view_of(backbone.data_config) == "rectangle"
    assert tuple(pixels.shape[1:]) == shape
    assert pixels[0, :, 0].max() < 0.02 and pixels[0, :, -1].min() > 0.98
    assert pixels[1, 0].max() < 0.02 and pixels[1, -1].min() > 0.98


def test_a_squash_shows_all_four_edges_and_a_crop_does_not() -> None:
    plain = {"mean": [0, 0, 0], "std": [1, 1, 1]}
    picture = gradient(300, 100)
    squash = load(view="squash", transform=plain).transform(picture)
    assert squash.shape == (3, 160, 160)
    assert squash[0, :, 0].max() < 0.02 and squash[0, :, -1].min() > 0.98
    crop = load(view="crop", transform=plain).transform(picture)
    assert crop.shape == (3, 160, 160)
    assert crop[0, :, 0].min() > 0.3 and crop[0, :, -1].max() < 0.7


def test_the_crop_is_timms_own() -> None:
    import timm

    backbone = load(view="crop")
    config = timm.data.resolve_model_data_config(backbone.model)
    assert backbone.data_config == config
    picture = gradient(300, 200)
    expected = timm.data.create_transform(**config, is_training=False)(picture)
    assert torch.equal(backbone.transform(picture), expected)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"])
@pytest.mark.parametrize("size", [(200, 120), (96, 64), (31, 500)])
def test_a_squash_is_bit_by_bit_that_of_timm(interpolation: str, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    config = {
        "input_size": (3, 64, 96),
        "interpolation": interpolation,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }
    assert isinstance(make_transform(config), Squash)
    assert torch.equal(make_transform(config)(picture), create_transform(**config, is_training=False)(picture))


@pytest.mark.parametrize("size", [(3000, 10), (10, 3000), (1, 1), (2, 600)])
def test_very_thin_pictures_have_features(size: tuple[int, int]) -> None:
    backbone = load()
    extractor = FeatureExtractor(backbone, "layer1,layer4")
    features = extractor(backbone.transform(Image.new("RGB", size, "red"))[None])
    assert features.shape == (1, extractor.width) and features.isfinite().all()


# ---- which network gets which ----


def test_the_default_backbone_gets_rectangles() -> None:
    backbone = load_backbone()
    assert view_of(backbone.data_config) == "rectangle"
    assert backbone.transform(Image.new("RGB", (640, 427))).shape == (3, 192, 288)


def test_networks_of_one_size_get_the_squash() -> None:
    for backbone in (vit(), load(SWIN, model_args=SWIN_ARGS)):
        assert view_of(backbone.data_config) == "squash"
        assert backbone.transform(Image.new("RGB", (640, 427))).shape == (3, 224, 224)


def test_what_a_network_takes_is_found_out_by_trying() -> None:
    """The same architecture, built to take any size."""
    model_args = {key: value for key, value in VIT.items() if key != "img_size"} | {"dynamic_img_size": True}
    backbone = load("vit_tiny_patch16_224", model_args=model_args)
    assert view_of(backbone.data_config) == "rectangle"
    extractor = FeatureExtractor(backbone)
    assert extractor(backbone.transform(Image.new("RGB", (300, 100)))[None]).isfinite().all()


class Fails(torch.nn.Module):
    """Gives two numbers, or what goes wrong with images that are wider than high."""

    def __init__(self, wide: Any = None) -> None:
        super().__init__()
        self.wide = wide

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        good = x.mean((2, 3))[:, :2]
        if x.shape[3] <= x.shape[2] or self.wide is None:
            return good
        return self.wide(good)


def test_a_network_that_fails_on_rectangles_takes_one_size() -> None:
    def fail(good: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("64 x 960")

    area = 224 * 224
    assert takes_any_size(Fails(), area)
    assert not takes_any_size(Fails(fail), area)
    assert not takes_any_size(Fails(lambda good: good / 0), area)
    assert not takes_any_size(Fails(lambda good: good[:, :1]), area)
    assert not takes_any_size(Fails(), 63 * 63)  # less than four cells


@pytest.mark.parametrize("view", ["whole", "rectangle", "squash", "crop"])
def test_the_global_random_state_and_gradients_are_left_alone(view: str) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model = load(view=view).model
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training and all(buffer.isfinite().all() for buffer in model.buffers())


def test_rectangles_for_a_network_of_one_size_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^vit_tiny.* takes images of one size only: use the view squash$") as error:
        vit(view="rectangle")
    assert error.value.argument == "view"


@pytest.mark.parametrize(("view", "words"), [("hole", "did you mean whole"), ("", "one of whole"), (None, "not None")])
def test_other_views_are_refused(view: Any, words: str) -> None:
    for build in (functools.partial(load, view=view), functools.partial(Detector, view=view)):
        with pytest.raises(UsageError, match=words) as error:
            build()
        assert error.value.argument == "view"


@pytest.mark.parametrize("change", [{"crop_pct": 0.9}, {"crop_mode": "border"}])
@pytest.mark.parametrize("view", ["whole", "squash", "rectangle"])
def test_settings_of_a_crop_belong_to_the_crop(view: str, change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"^transform setting {next(iter(change))} belongs to view='crop'$"):
        load(view=view, transform=change)


# ---- size ----


@pytest.mark.parametrize("view", ["whole", "squash", "crop"])
def test_size_is_the_side_of_the_square(view: str) -> None:
    backbone = load(view=view, size=96)
    assert backbone.data_config["input_size"] == (3, 96, 96)
    assert backbone.transform(Image.new("RGB", (50, 50))).shape == (3, 96, 96)
    long = {"whole": (64, 128), "squash": (96, 96), "crop": (96, 96)}
    assert tuple(backbone.transform(Image.new("RGB", (200, 100))).shape[1:]) == long[view]


def test_a_network_of_one_size_is_built_for_another() -> None:
    backbone = vit(size=64)
    pixels = backbone.transform(Image.new("RGB", (200, 100)))
    assert pixels.shape == (3, 64, 64)
    assert FeatureExtractor(backbone)(pixels[None]).isfinite().all()
    assert backbone.model.pos_embed.shape[1] == 1 + 4 * 4


def test_a_network_that_cannot_be_built_for_a_size_is_refused() -> None:
    """It halves images four times, and attends to fixed windows."""
    with pytest.raises(UsageError, match=r"^levit_128s takes images of 224 x 224 pixels, not of 100 x 100$") as error:
        load("levit_128s", size=100)
    assert error.value.argument == "size"


@pytest.mark.parametrize("size", [0, -3, 2.5, "big"])
def test_other_sizes_are_refused(size: Any) -> None:
    for build in (functools.partial(load, size=size), functools.partial(Detector, size=size)):
        with pytest.raises(UsageError, match="size must be a whole number above 0") as error:
            build()
        assert error.value.argument == "size"


def test_size_and_input_size_must_agree() -> None:
    assert load(size=96, transform={"input_size": [3, 96, 96]}).data_config["input_size"] == (3, 96, 96)
    with pytest.raises(UsageError, match="size 96 contradicts the transform setting input_size") as error:
        load(size=96, transform={"input_size": [3, 64, 64]})
    assert error.value.argument == "size"


@pytest.mark.parametrize(("name", "value"), [("view", "crop"), ("size", 96)])
def test_a_module_of_ones_own_has_no_view(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{name} is for backbones by name") as error:
        Detector(torch.nn.Identity(), **{name: value})
    assert error.value.argument == name


# ---- saved ----

OPTIONS: list[dict[str, Any]] = [
    {},
    {"size": 96},
    {"size": 32},
    {"view": "squash"},
    {"view": "crop"},
    {"view": "crop", "transform": {"crop_pct": 0.7, "crop_mode": "border"}},
    {"view": "crop", "transform": {"crop_mode": "squash"}},
    {"view": "crop", "transform": {"crop_mode": "squash", "crop_pct": 1.0}},
    {"transform": {"input_size": [3, 64, 128], "interpolation": "nearest", "mean": [0, 0, 0]}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_saved_arguments_give_the_same_pixels_to_the_last_bit(options: dict[str, Any]) -> None:
    first = load(**options)
    saved = settings_of(first.data_config)
    second = load(**saved)
    assert second.data_config == first.data_config
    assert settings_of(second.data_config) == saved
    for size in ((300, 100), (64, 64), (77, 130)):
        assert torch.equal(second.transform(gradient(*size)), first.transform(gradient(*size)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "whole picture, about 160 x 160 pixels"),
        ({"size": 384}, "whole picture, about 384 x 384 pixels"),
        ({"view": "squash"}, "whole picture, squashed to 160 x 160 pixels"),
        ({"view": "crop"}, "cropped to 160 x 160 pixels"),
        ({"view": "crop", "transform": {"input_size": [3, 64, 128]}}, "cropped to 64 x 128 pixels"),
    ],
    ids=str,
)
def test_in_words(options: dict[str, Any], words: str) -> None:
    assert in_words(settings_of(load(**options).data_config)) == words

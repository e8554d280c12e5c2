"""What the network sees of a picture, and maps over it brought back onto the picture."""

from __future__ import annotations

import io
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from featdiff.data.decoding import decode
from featdiff.features.geometry import Box, onto_picture, probed_box, seen_box
from featdiff.features.views import PictureTransform

CONFIG: dict[str, Any] = {
    "input_size": (3, 128, 128),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 0.875,
    "crop_mode": "center",
}
VIEWS = {
    "rectangle": {"crop_mode": "rectangle", "crop_pct": 1.0},
    "squash": {"crop_mode": "squash", "crop_pct": 1.0},
    "crop": {},
    "whole crop": {"crop_pct": 1.0},
    "squashed crop": {"crop_mode": "squash", "crop_pct": 0.8},
    "border": {"crop_mode": "border", "crop_pct": 0.9},
    "oblong crop": {"input_size": (3, 96, 160)},
}
SIZES = {"tall": (160, 600), "wide": (900, 250), "square": (300, 300), "small": (40, 50)}


def redness(picture: Image.Image, config: dict[str, Any], cell: int = 8) -> np.ndarray:
    """How red each cell of the network's input is (h, w), as a local score would say how strange it is."""
    pixels = PictureTransform(config)(picture)
    red = pixels[0] - pixels[1:].mean(0)
    return torch.nn.functional.avg_pool2d(red[None], cell)[0].numpy()


def with_square(width: int, height: int, centre: tuple[float, float], share: float = 0.2) -> Image.Image:
    """A grey picture with a red square around a place, given as shares of width and height."""
    picture = Image.new("RGB", (width, height), (90, 90, 90))
    side = int(share * min(width, height))
    corner = (int(centre[0] * width - side / 2), int(centre[1] * height - side / 2))
    picture.paste((255, 0, 0), (*corner, corner[0] + side, corner[1] + side))
    return picture


def centre_of(heat: np.ndarray) -> tuple[float, float]:
    """Where the hot part of a map is, as shares of width and height."""
    weights = np.nan_to_num(heat.clip(min=0) - 0.2 * np.nanmax(heat)).clip(min=0)
    rows, columns = np.mgrid[0 : heat.shape[0], 0 : heat.shape[1]]
    x = ((columns + 0.5) * weights).sum() / weights.sum() / heat.shape[1]
    return float(x), float(((rows + 0.5) * weights).sum() / weights.sum() / heat.shape[0])


def is_seen(view: str, size: str, centre: tuple[float, float]) -> bool:
    """Whether the network sees all of the square."""
    width, height = SIZES[size]
    box = seen_box(CONFIG | VIEWS[view], width, height)
    margin = 0.12 * min(width, height)  # half the square, and some
    return (
        box.left * width + margin < centre[0] * width < box.right * width - margin
        and box.top * height + margin < centre[1] * height < box.bottom * height - margin
    )


CENTRES = [(0.5, 0.5), (0.45, 0.56), (0.3, 0.5), (0.5, 0.3)]
SEEN = [case for case in itertools.product(VIEWS, SIZES, CENTRES) if is_seen(*case)]


@pytest.mark.parametrize(("view", "size", "centre"), SEEN)
def test_a_square_is_found_where_it_is(view: str, size: str, centre: tuple[float, float]) -> None:
    config = CONFIG | VIEWS[view]
    width, height = SIZES[size]
    box = seen_box(config, width, height)
    values = redness(with_square(width, height, centre), config)
    heat = onto_picture(values, box, width, height)
    assert heat.shape == (height, width)
    x, y = centre_of(heat)
    cell = max((box.right - box.left) * width / values.shape[1], (box.bottom - box.top) * height / values.shape[0])
    assert abs(x - centre[0]) * width < 0.5 * cell + 1
    assert abs(y - centre[1]) * height < 0.5 * cell + 1


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("size", SIZES)
def test_the_box_is_what_preprocessing_shows(view: str, size: str) -> None:
    """Compared with where the colours of a picture that counts its pixels end up."""
    config = CONFIG | VIEWS[view] | {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear"}
    width, height = SIZES[size]
    rows, columns = np.mgrid[0:height, 0:width]
    ramp = np.stack([(columns + 0.5) / width, (rows + 0.5) / height, np.ones((height, width))], axis=-1)
    pixels = PictureTransform(config)(Image.fromarray((ramp * 255).round().astype(np.uint8)))
    inside = (pixels[2] > 0.999).numpy()  # what is not padding

    box = seen_box(config, width, height)
    x = box.left + (np.arange(pixels.shape[2]) + 0.5) / pixels.shape[2] * (box.right - box.left)
    y = box.top + (np.arange(pixels.shape[1]) + 0.5) / pixels.shape[1] * (box.bottom - box.top)
    expected_x, expected_y = np.meshgrid(x, y)
    np.testing.assert_array_equal(inside, (expected_x > 0) & (expected_x < 1) & (expected_y > 0) & (expected_y < 1))
    tolerance = 0.006 + 0.6 / min(width, height)  # eight bits, and the edges of the smallest picture
    np.testing.assert_allclose(pixels[0].numpy()[inside], expected_x[inside], atol=tolerance)
    np.testing.assert_allclose(pixels[1].numpy()[inside], expected_y[inside], atol=tolerance)


def test_what_a_crop_leaves_out_is_unseen_and_not_normal() -> None:
    picture = with_square(900, 250, centre=(0.05, 0.5))
    box = seen_box(CONFIG, 900, 250)
    heat = onto_picture(redness(picture, CONFIG), box, 900, 250)

    seen = ~np.isnan(heat)
    assert not seen[:, :339].any() and not seen[:, 561:].any()
    assert seen[20:230, 342:558].all()
    assert 0.1 < seen.mean() < 0.3
    assert np.nanmax(heat) < 0.1  # the square is out of sight


@pytest.mark.parametrize("view", ["rectangle", "squash"])
@pytest.mark.parametrize("size", [(1, 300), (300, 1), (3, 2), (4000, 16)])
def test_whole_views_see_every_pixel(view: str, size: tuple[int, int]) -> None:
    heat = onto_picture(np.random.default_rng(0).normal(size=(4, 7)), seen_box(CONFIG | VIEWS[view], *size), *size)
    assert heat.shape == size[::-1]
    assert np.isfinite(heat).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_maps_lie_on_the_upright_picture(orientation: int) -> None:
    """A camera that was turned: the picture that people see has the square at its upper right."""
    upright = with_square(240, 360, centre=(0.75, 0.25))
    turns: dict[int, list[Image.Transpose]] = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for turn in turns.get(orientation, []):
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    stored.save(stream, "PNG", exif=exif)

    picture = decode(stream.getvalue())
    config = CONFIG | VIEWS["rectangle"]
    heat = onto_picture(redness(picture, config), seen_box(config, *picture.size), *picture.size)
    assert heat.shape == (360, 240)
    assert centre_of(heat) == pytest.approx((0.75, 0.25), abs=0.02)


def test_values_stay_within_the_range_of_the_map() -> None:
    values = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)
    heat = onto_picture(values, Box(), 97, 61)
    assert heat.max() <= values.max() and heat.min() >= values.min()
    assert heat.max() > 0.9 * values.max()


def test_the_same_map_over_a_smaller_picture_is_the_same() -> None:
    values = np.random.default_rng(0).normal(size=(6, 6))
    large = onto_picture(values, Box(left=-0.1, right=0.8), 400, 400)
    small = onto_picture(values, Box(left=-0.1, right=0.8), 100, 100)
    np.testing.assert_allclose(large.reshape(100, 4, 100, 4).mean((1, 3)), small, atol=0.05)
    np.testing.assert_array_equal(np.isnan(small).any(0), np.arange(100) >= 80)


@pytest.mark.parametrize("view", [view for view in VIEWS if view != "border"])
@pytest.mark.parametrize("size", SIZES)
def test_a_box_can_be_found_out_by_trying(view: str, size: str) -> None:
    config = CONFIG | VIEWS[view]
    box = probed_box(PictureTransform(config), *SIZES[size])
    assert box is not None
    assert box == pytest.approx(seen_box(config, *SIZES[size]), abs=0.01)


def test_whole_pictures_are_found_to_be_seen_to_their_very_edges() -> None:
    for size in ((32, 32), (640, 480), (1, 100)):
        assert probed_box(PictureTransform(CONFIG | VIEWS["squash"]), *size) == Box()


TRICKS: dict[str, Any] = {
    "mirrored": lambda pixels: pixels.flip(2),
    "turned": lambda pixels: pixels.transpose(1, 2),
    "padded": lambda pixels: torch.nn.functional.pad(pixels, (8, 8, 8, 8)),
    "bent": lambda pixels: pixels.exp(),
    "flat": lambda pixels: 0 * pixels,
}


@pytest.mark.parametrize("trick", TRICKS)
def test_what_is_no_plain_part_of_the_picture_has_no_box(trick: str) -> None:
    plain = PictureTransform(CONFIG | VIEWS["squash"])
    assert probed_box(lambda picture: TRICKS[trick](plain(picture)), 300, 200) is None


def test_a_transform_that_fails_has_no_box() -> None:
    def fails(picture: Image.Image) -> torch.Tensor:
        raise RuntimeError("too small")

    assert probed_box(fails, 30, 20) is None

"""Preprocessing without torch gives what timm gives, to the last bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from image_files import noise
from PIL import Image
from timm.data import create_transform

from featdiff.data.preprocessing import INTERPOLATIONS, Preprocessing, rectangle

CONFIG: dict[str, Any] = {"interpolation": "bicubic", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# width, height
SHAPES = [(300, 200), (200, 300), (64, 64), (97, 33), (33, 97), (400, 20), (5, 9), (1, 1)]


def same_as_timm(picture: Image.Image, config: dict[str, Any]) -> None:
    expected = create_transform(**config, is_training=False)(picture).numpy()
    given = Preprocessing(config)(picture)
    assert given.dtype == np.float32 and given.flags.c_contiguous
    np.testing.assert_array_equal(given, expected, err_msg=str((picture.size, config)))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border", None])
@pytest.mark.parametrize("input_size", [(3, 64, 64), (3, 48, 96), (3, 96, 48), (3, 65, 65)])
@pytest.mark.parametrize("share", [1.0, 0.875, 0.7, 1.3, None])
def test_every_crop_mode_is_timms(crop_mode: str | None, input_size: tuple[int, int, int], share: float | None) -> None:
    config = CONFIG | {"crop_mode": crop_mode, "input_size": input_size, "crop_pct": share}
    for number, (width, height) in enumerate(SHAPES):
        same_as_timm(noise(height, width, seed=number), config)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_every_interpolation_is_timms(interpolation: str) -> None:
    config = CONFIG | {"interpolation": interpolation, "crop_mode": "center", "input_size": (3, 64, 64)}
    same_as_timm(noise(150, 90), config)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rectangle_is_timms_squash_of_its_size(shape: tuple[int, int]) -> None:
    width, height = shape
    config = CONFIG | {"crop_mode": "squash", "crop_pct": 1.0, "input_size": (3, *rectangle(width, height, 96 * 96))}
    expected = create_transform(**config, is_training=False)(noise(height, width)).numpy()
    for area, input_size in ((None, (3, 96, 96)), (96 * 96, (3, 64, 64))):
        prepare = Preprocessing(CONFIG | {"crop_mode": "rectangle", "input_size": input_size}, area)
        np.testing.assert_array_equal(prepare(noise(height, width)), expected)


def test_the_picture_is_left_alone() -> None:
    picture = noise(64, 64)
    before = picture.tobytes()
    Preprocessing(CONFIG | {"crop_mode": "center", "crop_pct": 1.0, "input_size": (3, 64, 64)})(picture)
    assert picture.tobytes() == before

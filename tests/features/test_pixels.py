"""Pixels as rows: lossless there and back, square, and strict about shape and range."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from featdiff.exceptions import UsageError
from featdiff.features.pixels import Pixels


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_a_picture_of_the_right_size_comes_back_exactly() -> None:
    pixels, image = Pixels(16, 3), picture(16, 16)
    rows = pixels(pixels.transform(image)[None])
    assert rows.dtype == torch.uint8 and rows.shape == (1, pixels.width) == (1, 3 * 16 * 16)
    assert torch.equal(rows[0], torch.from_numpy(np.array(image)).permute(2, 0, 1).flatten())
    there_and_back = pixels.images(rows)
    assert torch.equal(pixels(there_and_back), rows)
    assert torch.equal(there_and_back[0], pixels.transform(image))


def test_every_byte_survives() -> None:
    rows = torch.arange(256, dtype=torch.uint8)[None]
    pixels = Pixels(16, 1)
    assert torch.equal(pixels(pixels.images(rows)), rows)
    assert pixels.images(rows).amin() == -1 and pixels.images(rows).amax() == 1


def test_grey_is_one_channel_of_luma() -> None:
    pixels, image = Pixels(8, 1), picture(8, 8)
    rows = pixels(pixels.transform(image)[None])
    assert torch.equal(rows[0], torch.from_numpy(np.array(image.convert("L"))).flatten())


@pytest.mark.parametrize(("width", "height"), [(64, 32), (32, 64), (33, 47)])
def test_the_middle_square_is_kept(width: int, height: int) -> None:
    values = np.zeros((height, width, 3), dtype=np.uint8)
    short = min(width, height)
    top, left = (height - short) // 2, (width - short) // 2
    values[top : top + short, left : left + short] = 200
    seen = Pixels(16, 3).transform(Image.fromarray(values))
    assert seen.shape == (3, 16, 16)
    assert torch.allclose(seen[:, 1:-1, 1:-1], torch.tensor(200 / 127.5 - 1), atol=0.02)


def test_the_key_names_what_decides_the_numbers() -> None:
    keys = {Pixels(16, 3).key(), Pixels(32, 3).key(), Pixels(16, 1).key(), Pixels(16, 3).key("matched 8")}
    assert len(keys) == 4
    assert all(key == key.strip() and " " not in key and "/" not in key for key in keys)


@pytest.mark.parametrize("shape", [(2, 3, 16, 8), (2, 1, 16, 16), (2, 3, 32, 32)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"this detector takes \(3, 16, 16\)"):
        Pixels(16, 3)(torch.zeros(shape))


@pytest.mark.parametrize("value", [1.1, -1.1, 255.0])
def test_values_outside_the_range_are_refused(value: float) -> None:
    with pytest.raises(UsageError, match=r"\[-1, 1\]"):
        Pixels(4, 3)(torch.full((1, 3, 4, 4), value))


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_channels_are_one_or_three(channels: int) -> None:
    with pytest.raises(UsageError, match="channels must be 3, or 1"):
        Pixels(16, channels)

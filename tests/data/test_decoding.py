"""Encoded bytes become upright RGB pixels."""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import (
    WHITE,
    colours,
    encoded,
    exif,
    noise,
    pixels_of,
    png_header,
    reason,
    rotated,
    to_tensor,
)
from PIL import Image, features

from featdiff.data.batches import load
from featdiff.data.decoding import Downscale, decode, short_sides
from featdiff.data.references import FileRef, HeldRef, ImageRef, MissingRef

# ---- formats ----

LOSSLESS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "BMP": {},
    "TIFF": {},
    "PPM": {},
    "WEBP": {"lossless": True},
    "JPEG2000": {},
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_formats_give_the_exact_pixels(name: str) -> None:
    if name == "JPEG2000" and not features.check("jpg_2000"):
        pytest.skip("Pillow is built without JPEG 2000")
    image = noise(20, 30)
    assert np.array_equal(pixels_of(encoded(image, name, **LOSSLESS[name])), np.asarray(image))


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "packbits"])
def test_compressed_tiff(compression: str) -> None:
    image = noise()
    assert np.array_equal(pixels_of(encoded(image, "TIFF", compression=compression)), np.asarray(image))


@pytest.mark.parametrize("name", ["JPEG", "WEBP", "MPO", "AVIF"])
def test_lossy_formats_give_nearly_the_pixels(name: str) -> None:
    if name == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow is built without AVIF")
    data = encoded(Image.new("RGB", (32, 32), (200, 60, 20)), name, quality=95)
    found = pixels_of(data)
    assert found.shape == (32, 32, 3)
    assert np.abs(found.astype(int) - [200, 60, 20]).max() <= 6


@pytest.mark.parametrize("progressive", [False, True])
def test_grey_jpeg(progressive: bool) -> None:
    data = encoded(Image.new("L", (16, 16), 90), "JPEG", progressive=progressive)
    assert colours(data) == [(90, 90, 90)] * 16


def test_gif() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert colours(encoded(image, "GIF")) == [(10, 20, 30), (200, 100, 50)]


@pytest.mark.parametrize(
    ("name", "options"),
    [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})],
    ids=["gif", "apng", "webp", "multi-page tiff"],
)
def test_first_frame_of_several(name: str, options: dict[str, Any]) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], name, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3  # type: ignore[attr-defined]
    assert set(colours(data)) == {(255, 0, 0)}


# ---- colours ----


@pytest.mark.parametrize(("name", "slack"), [("TIFF", 0), ("JPEG", 3)])
@pytest.mark.parametrize(
    ("ink", "rgb"),
    [
        ((0, 0, 0, 0), WHITE),
        ((0, 255, 255, 0), (255, 0, 0)),
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 0, 0, 255), (0, 0, 0)),
    ],
    ids=["none", "red", "cyan", "black"],
)
def test_cmyk(name: str, slack: int, ink: tuple[int, ...], rgb: tuple[int, ...]) -> None:
    data = encoded(Image.new("CMYK", (16, 16), ink), name)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert np.abs(pixels_of(data).astype(int) - rgb).max() <= slack


@pytest.mark.parametrize("name", ["PNG", "BMP", "TIFF"])
def test_palette(name: str) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([1, 2, 3, 50, 60, 70, 255, 0, 128])
    image.putdata([0, 1, 2])
    assert colours(encoded(image, name)) == [(1, 2, 3), (50, 60, 70), (255, 0, 128)]


@pytest.mark.parametrize("name", ["PNG", "GIF"])
def test_palette_with_a_transparent_entry_is_laid_on_white(name: str) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([1, 2, 3, 50, 60, 70, 255, 0, 128])
    image.putdata([0, 1, 2])
    assert colours(encoded(image, name, transparency=1)) == [(1, 2, 3), WHITE, (255, 0, 128)]


def test_palette_with_partly_transparent_entries_is_laid_on_white() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0, 0, 0, 0, 0, 0, 0])
    image.putdata([0, 1, 2])
    data = encoded(image, transparency=bytes([255, 51, 0]))
    assert colours(data) == [(0, 0, 0), (204, 204, 204), WHITE]


@pytest.mark.parametrize("name", ["PNG", "WEBP", "TIFF"])
def test_rgba_is_laid_on_white(name: str) -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([(10, 20, 30, 255), (0, 100, 255, 51), (9, 9, 9, 0)])
    options = {"lossless": True, "exact": True} if name == "WEBP" else {}
    # 255 + (c - 255) * 51 / 255 for each channel c
    assert colours(encoded(image, name, **options)) == [(10, 20, 30), (204, 224, 255), WHITE]


def test_grey_with_alpha_is_laid_on_white() -> None:
    image = Image.new("LA", (3, 1))
    image.putdata([(10, 255), (0, 51), (9, 0)])
    assert colours(encoded(image)) == [(10,) * 3, (204,) * 3, WHITE]


@pytest.mark.parametrize(
    ("mode", "seen", "hidden"),
    [("L", 7, 9), ("RGB", (7, 7, 7), (9, 9, 9)), ("1", 0, 255)],
    ids=["L", "RGB", "1"],
)
def test_transparent_colour_is_laid_on_white(mode: str, seen: Any, hidden: Any) -> None:
    """PNG without an alpha channel can name one colour as transparent."""
    image = Image.new(mode, (2, 1), seen)
    image.putpixel((1, 0), hidden)
    expected = (0, 0, 0) if mode == "1" else (7, 7, 7)
    assert colours(encoded(image, transparency=hidden)) == [expected, WHITE]


def test_transparent_colour_of_16_bit_grey_is_laid_on_white() -> None:
    image = Image.fromarray(np.array([[257, 25700]], np.uint16))
    data = encoded(image, transparency=25700)
    assert Image.open(io.BytesIO(data)).info["transparency"] == 25700
    assert colours(data) == [(1, 1, 1), WHITE]


@pytest.mark.parametrize("name", ["PNG", "TIFF", "BMP"])
def test_one_bit(name: str) -> None:
    image = Image.new("1", (3, 1))
    image.putpixel((1, 0), 255)
    assert colours(encoded(image, name)) == [(0, 0, 0), WHITE, (0, 0, 0)]


DEEP = [0, 128, 129, 257, 1000, 25700, 32767, 32768, 65406, 65407, 65535]


@pytest.mark.parametrize(("name", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("TIFF", "<i4")])
def test_16_bit_grey_is_divided_by_257(name: str, dtype: str) -> None:
    """A fixed scale: never the brightest pixel of the picture at hand, never cut off at 255."""
    data = encoded(Image.fromarray(np.array([DEEP], dtype)), name)
    assert Image.open(io.BytesIO(data)).mode.startswith("I")
    assert colours(data) == [(round(value / 257),) * 3 for value in DEEP]


def test_every_8_bit_grey_survives_as_16_bit() -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    found = pixels_of(encoded(Image.fromarray(levels * 257)))
    assert np.array_equal(found, np.stack([levels] * 3, axis=2))


def test_16_bit_pgm() -> None:
    data = b"P5 3 1 65535\n" + np.array([0, 25700, 65535], ">u2").tobytes()
    assert colours(data) == [(0, 0, 0), (100, 100, 100), WHITE]


def test_16_bit_colour_png() -> None:
    rows = b"\0" + struct.pack(">6H", 0, 25700, 65535, 257, 51400, 1285)
    data = png_header(2, 1, depth=16, rows=rows)
    assert colours(data) == [(0, 100, 255), (1, 200, 5)]


@pytest.mark.parametrize("value", [-1, 65536, 100_000])
def test_32_bit_grey_out_of_range_is_refused(value: int) -> None:
    data = encoded(Image.fromarray(np.array([[0, value]], np.int32)), "TIFF")
    assert reason(data) == "grey values outside 0..65535"


def test_float_tiff_in_0_to_1_is_multiplied_by_255() -> None:
    data = encoded(Image.fromarray(np.array([[0, 0.2, 0.25, 1]], np.float32)), "TIFF")
    assert colours(data) == [(0,) * 3, (51,) * 3, (64,) * 3, WHITE]


@pytest.mark.parametrize("value", [1.01, -0.01, 255.0, np.nan, np.inf, -np.inf])
def test_float_tiff_out_of_range_is_refused(value: float) -> None:
    data = encoded(Image.fromarray(np.array([[0, value]], np.float32)), "TIFF")
    assert reason(data) == "grey values outside 0..1"


# ---- orientation ----

#: What a reader does to the stored picture, by EXIF orientation (EXIF 2.32, table 6).
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(orientation: int) -> None:
    image = noise(4, 7)
    data = encoded(image, exif=exif(rotated(orientation)))
    assert np.array_equal(pixels_of(data), UPRIGHT[orientation](np.asarray(image)))


@pytest.mark.parametrize("name", ["JPEG", "WEBP", "TIFF"])
def test_exif_orientation_in_other_formats(name: str) -> None:
    """Stored: red left, blue right; orientation 6 turns it clockwise, so red is on top."""
    image = Image.new("RGB", (32, 16), "blue")
    image.paste("red", (0, 0, 16, 16))
    tags = Image.Exif()
    tags[0x0112] = 6
    found = pixels_of(encoded(image, name, exif=tags, quality=95)).astype(int)
    assert found.shape == (32, 16, 3)
    assert np.abs(found[2, 2] - [255, 0, 0]).max() < 10
    assert np.abs(found[29, 13] - [0, 0, 255]).max() < 10


@pytest.mark.parametrize(("dtype", "top"), [(np.uint16, 65535), (np.float32, 1)])
def test_exif_orientation_of_deep_grey(dtype: type, top: int) -> None:
    stored = np.array([[0, 1], [1, 0], [1, 1]], dtype)
    tags = Image.Exif()
    tags[0x0112] = 6
    found = pixels_of(encoded(Image.fromarray(stored * dtype(top)), "TIFF", exif=tags))
    assert np.array_equal(found[:, :, 0], np.rot90(stored, -1) * 255)


def test_orientation_of_a_picture_in_memory_is_applied_and_the_picture_left_alone() -> None:
    image = noise(4, 7)
    image.getexif()[0x0112] = 8
    before = image.tobytes()
    assert np.array_equal(pixels_of(image), np.rot90(np.asarray(image)))
    assert (image.size, image.tobytes(), image.getexif()[0x0112]) == ((7, 4), before, 8)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("name", ["PNG", "TIFF"])
def test_opened_file_is_turned_once(name: str, orientation: int) -> None:
    """Given as an open picture or as bytes, one file gives the same pixels."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    data = encoded(noise(4, 7), name, exif=tags)
    opened = load(HeldRef("x", Image.open(io.BytesIO(data))), to_tensor)
    stored = load(HeldRef("x", data), to_tensor)
    assert torch.equal(opened.pixels, stored.pixels)  # type: ignore[arg-type]
    assert torch.equal(stored.pixels, to_tensor(decode(data)))  # type: ignore[arg-type]


ODD_EXIF = {
    "resolution as text": (0x011A, 2, 3, b"72\0"),
    "unit as fraction": (0x0128, 5, 1, struct.pack("<II", 2, 1)),
    "width as text": (0x0100, 2, 4, b"640\0"),
    "maker as fraction": (0x010F, 5, 1, struct.pack("<II", 1, 2)),
    "software as number": (0x0131, 12, 1, struct.pack("<d", 1.5)),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", ODD_EXIF)
def test_wrong_exif_beside_a_good_orientation_does_no_harm(kind: str) -> None:
    """Cameras and editors write tags of the wrong type; the pixels are fine and so is the orientation."""
    data = encoded(noise(8, 16), "JPEG", exif=exif(rotated(6), ODD_EXIF[kind]))
    assert pixels_of(data).shape == (16, 8, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0garbage",
        b"Exif\0\0",
        b"Exif\0\0II*\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        exif(rotated(99)),
        exif(rotated(0)),
        exif((0x0112, 2, 2, b"6\0")),
    ],
    ids=["garbage", "empty", "header only", "beyond the end", "orientation 99", "orientation 0", "as text"],
)
def test_senseless_exif_is_ignored(block: bytes) -> None:
    assert pixels_of(encoded(noise(8, 16), "JPEG", exif=block)).shape == (8, 16, 3)


# ---- Downscale, short_sides ----


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 32), (16, 8)),
        ((32, 64), (8, 16)),
        ((100, 100), (8, 8)),
        ((9, 9), (8, 8)),
        ((8, 20), (8, 20)),
        ((5, 300), (5, 300)),
        ((300, 10), (240, 8)),
    ],
)
def test_downscale_brings_the_short_side_down(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """Never up, and the shape stays."""
    found = Downscale(8, to_tensor)(Image.new("RGB", size, (10, 20, 30)))
    assert (found.shape[2], found.shape[1]) == expected
    assert [channel.unique().tolist() for channel in found] == [[10], [20], [30]]


def test_downscale_leaves_small_pictures_untouched() -> None:
    image = noise(8, 9)
    assert torch.equal(Downscale(8, to_tensor)(image), to_tensor(image))


def test_downscale_averages() -> None:
    """A fine chequerboard becomes grey: every pixel counts, none is skipped."""
    board = np.indices((64, 64)).sum(axis=0) % 2 * 255
    found = Downscale(8, to_tensor)(Image.fromarray(board.astype(np.uint8)).convert("RGB"))
    assert (found.float() - 127.5).abs().max() < 2


def test_downscale_survives_pickling() -> None:
    copy = pickle.loads(pickle.dumps(Downscale(8, np.asarray)))
    assert copy(Image.new("RGB", (32, 16))).shape == (8, 16, 3)


def test_short_sides_come_from_the_header(tmp_path: Path) -> None:
    """Damaged pixels do not matter; without a header there is none."""
    contents: list[bytes | Image.Image] = [
        encoded(noise(20, 30)),
        encoded(noise(50, 40), "JPEG")[:2000],
        Image.new("L", (7, 3)),
        png_header(4000, 500),
        b"",
        b"text",
    ]
    refs: list[ImageRef] = [HeldRef(str(i), content) for i, content in enumerate(contents)]
    refs += [MissingRef("x", "gone"), FileRef("y", str(tmp_path / "y.png"))]
    found = short_sides(refs)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, [20, 40, 3, 500, *[np.nan] * 4])


def test_short_sides_of_nothing() -> None:
    assert short_sides([]).shape == (0,)

"""Encoded bytes become upright RGB pixels, in order and in parallel; what fails gets a reason."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image, features
from torch.utils.data import DataLoader, TensorDataset

from featdiff.data.batches import Batch, LoadedImage, batches_from_loader, is_loader, iter_batches, iter_loaded, load
from featdiff.data.decoding import MAX_ASPECT, MAX_PIXELS, Downscale, decode, short_sides
from featdiff.data.references import FileRef, HeldRef, ImageRef, MissingRef, TarMemberRef, list_images
from featdiff.exceptions import UnreadableImage, UsageError

WHITE = (255, 255, 255)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(3, H, W) uint8 pixels of an RGB picture."""
    assert image.mode == "RGB"
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def never(image: Image.Image) -> torch.Tensor:
    pytest.fail("this picture must not be decoded")


def encoded(image: Image.Image, format_: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format_, **options)
    return stream.getvalue()


def pixels_of(data: bytes | Image.Image, **options: Any) -> np.ndarray:
    """(H, W, 3) uint8."""
    image = decode(data, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def colours(data: bytes | Image.Image) -> list[tuple[int, ...]]:
    """The pixels of the top row."""
    return [tuple(int(value) for value in pixel) for pixel in pixels_of(data)[0]]


def reason(data: bytes | Image.Image, **options: Any) -> str:
    loaded = load(HeldRef("x", data), to_tensor, **options)
    assert (loaded.pixels is None) == bool(loaded.reason)
    return loaded.reason


def noise(height: int = 40, width: int = 40, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def grey_refs(count: int) -> list[ImageRef]:
    """Pictures of grey 0, 1, 2 ..."""
    return [HeldRef(f"{i}", Image.new("RGB", (2, 2), (i, i, i))) for i in range(count)]


def png_header(width: int, height: int, depth: int = 8, rows: bytes = bytes(64)) -> bytes:
    """An RGB PNG file that claims a size, whatever pixels it holds."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """A little-endian EXIF block of (tag, type, count, value bytes), whether or not they make sense."""
    body, values = struct.pack("<H", len(entries)), b""
    first = 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in sorted(entries):
        inline = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", first + len(values))
        body += struct.pack("<HHI", tag, kind, count) + inline
        values += value if len(value) > 4 else b""
    return b"Exif\0\0II*\0\x08\0\0\0" + body + bytes(4) + values


def rotated(orientation: int) -> tuple[int, int, int, bytes]:
    return 0x0112, 3, 1, struct.pack("<H", orientation)


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


# ---- what cannot be read ----

UNREADABLE = {
    "zero bytes": (b"", "empty file"),
    "text": (b"just some text\n" * 20, "not an image"),
    "one byte": (b"\xff", "not an image"),
    "html": (b"<!DOCTYPE html><html></html>", "not an image"),
    "jpeg cut in half": (encoded(noise(), "JPEG", quality=95)[:1500], "truncated"),
    "png cut in half": (encoded(noise())[:2000], "truncated"),
    "bmp cut in half": (encoded(noise(), "BMP")[:2000], "truncated"),
    "gif cut in half": (encoded(noise(), "GIF")[:1500], "truncated"),
    "jpeg header only": (encoded(noise(), "JPEG")[:30], ""),
    "png signature only": (encoded(noise())[:8], ""),
    "webp cut in half": (encoded(noise(), "WEBP")[:400], ""),
    "tiff cut in half": (encoded(noise(), "TIFF")[:2000], ""),
    "lzw tiff cut in half": (encoded(noise(), "TIFF", compression="tiff_lzw")[:2000], ""),
    "eps": (encoded(noise(), "EPS"), "not an image"),
    "pdf": (encoded(noise(), "PDF"), "not an image"),
    "icon": (encoded(noise(), "ICO"), "not an image"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64), "not an image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "not an image"),
    "no width": (png_header(0, 5), ""),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_content_has_a_reason_of_one_line(tmp_path: Path, kind: str) -> None:
    data, words = UNREADABLE[kind]
    with pytest.raises(UnreadableImage):
        decode(data)
    file = tmp_path / "x.jpg"
    file.write_bytes(data)
    loaded = load(FileRef("x.jpg", str(file)), to_tensor)
    assert loaded.pixels is None
    assert loaded.reason
    assert words in loaded.reason
    assert "\n" not in loaded.reason


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_damage_anywhere_gives_pixels_or_a_reason(name: str) -> None:
    """Bytes changed at many places: never another exception, never silence."""
    whole = encoded(noise(12, 12), name)
    rng = np.random.default_rng(1)
    for _ in range(60):
        data = bytearray(whole)
        for place in rng.integers(0, min(len(data), 200), 3):
            data[place] = rng.integers(256)
        text = reason(bytes(data), max_pixels=10_000)  # checks that there are pixels or a reason
        assert "\n" not in text


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_good_files_beside_bad_ones_are_read(tmp_path: Path) -> None:
    for number, (data, _) in enumerate(UNREADABLE.values()):
        (tmp_path / f"bad{number:02d}.png").write_bytes(data)
        (tmp_path / f"good{number:02d}.png").write_bytes(encoded(Image.new("L", (2, 2), number)))
    loaded = list(iter_loaded(list_images(tmp_path), to_tensor, workers=4))
    names = [Path(item.ref.path).name for item in loaded]
    assert names == sorted(os.listdir(tmp_path))
    for name, item in zip(names, loaded, strict=True):
        assert (item.pixels is None) == name.startswith("bad")
        assert item.pixels is None or int(item.pixels[0, 0, 0]) == int(name[4:6])


# ---- sizes ----


@pytest.mark.parametrize("size", [(30_000, 30_000), (10_000, 10_000), (2**31 - 1, 2**31 - 1)])
def test_huge_picture_is_refused_by_its_header(size: tuple[int, int]) -> None:
    """Nothing is decoded (the file holds no pixels) and the way out is named, even if warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = reason(png_header(*size))
    assert "limit of 89,478,485" in text
    assert "max_pixels" in text


@pytest.mark.parametrize("name", ["BMP", "TIFF", "GIF", "JPEG"])
def test_huge_picture_of_other_formats_is_refused(name: str) -> None:
    data = bytearray(encoded(Image.new("L", (8, 8)), name))
    if name == "BMP":
        struct.pack_into("<ii", data, 18, 30_000, 30_000)
    elif name == "GIF":
        struct.pack_into("<HH", data, 6, 30_000, 30_000)
    elif name == "JPEG":
        struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, 30_000, 30_000)
    else:
        for tag in (256, 257):
            struct.pack_into("<I", data, data.index(struct.pack("<HH", tag, 4)) + 8, 30_000)
    assert "limit of 89,478,485" in reason(bytes(data))


def test_limit_may_be_lowered() -> None:
    data = encoded(noise(20, 30))
    assert reason(data, max_pixels=600) == ""
    text = reason(data, max_pixels=599)
    assert "30 x 20" in text
    assert "limit of 599" in text
    assert "max_pixels" in text


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_limit_may_be_raised_above_that_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow refuses from twice its own limit on, here 2 x 100 pixels."""
    data = encoded(noise(20, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(data))
    assert "limit of 599" in reason(data, max_pixels=599)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert reason(data, max_pixels=600) == ""
    assert reason(data) == ""


def test_raising_the_limit_once_does_not_raise_it_for_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", MAX_PIXELS)
    assert reason(encoded(noise()), max_pixels=2_000_000_000) == ""
    assert "limit of 89,478,485" in reason(png_header(30_000, 30_000))


def test_limit_holds_for_pictures_in_memory() -> None:
    assert "limit of 599" in reason(noise(20, 30), max_pixels=599)


def test_limit_is_checked_before_an_open_file_is_decoded() -> None:
    """An open picture whose pixels are missing: to decode it would give another reason."""
    image = Image.open(io.BytesIO(png_header(3000, 3000)))
    assert "limit of 1,000" in reason(image, max_pixels=1000)


def test_one_pixel_is_readable() -> None:
    assert colours(encoded(Image.new("RGB", (1, 1), (1, 2, 3)))) == [(1, 2, 3)]


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (1, MAX_ASPECT + 1), (2 * MAX_ASPECT + 1, 2)])
def test_too_thin_is_refused(size: tuple[int, int]) -> None:
    text = reason(encoded(Image.new("L", size)))
    assert f"{size[0]} x {size[1]}" in text
    assert "too thin" in text
    assert "too thin" in reason(Image.new("L", size))


@pytest.mark.parametrize("size", [(1, MAX_ASPECT), (2 * MAX_ASPECT, 2)])
def test_just_not_too_thin_is_read(size: tuple[int, int]) -> None:
    assert pixels_of(encoded(Image.new("L", size))).shape == (size[1], size[0], 3)


# ---- load ----


def test_load_gives_transformed_pixels_and_the_given_reference(tmp_path: Path) -> None:
    image = noise(3, 5)
    (tmp_path / "a.png").write_bytes(encoded(image))
    (ref,) = list_images(tmp_path / "a.png")
    loaded = load(ref, lambda picture: to_tensor(picture) / 255)
    assert loaded.ref is ref
    assert loaded.reason == ""
    assert loaded.pixels is not None
    assert torch.equal(loaded.pixels, to_tensor(image) / 255)


def digest(content: bytes | Image.Image) -> bytes:
    return load(HeldRef("x", content), to_tensor).digest


def test_digest_depends_on_the_content_alone(tmp_path: Path) -> None:
    data = encoded(noise())
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).write_bytes(data)
    found = {load(ref, to_tensor).digest for ref in list_images(tmp_path)}
    assert found == {digest(data)}
    assert len(digest(data)) == 16
    assert digest(encoded(noise(seed=1))) != digest(data)


def _palette(*colours: int) -> Image.Image:
    image = Image.new("P", (2, 2))
    image.putpalette(colours)
    return image


def _turned(orientation: int) -> Image.Image:
    image = noise(4, 4)
    image.getexif()[0x0112] = orientation
    return image


def _clear(index: int) -> Image.Image:
    image = _palette(255, 0, 0)
    image.info["transparency"] = index
    return image


DIFFERENT: dict[str, tuple[Callable[[], Image.Image], Callable[[], Image.Image]]] = {
    "pixels": (lambda: noise(), lambda: noise(seed=1)),
    "shape": (lambda: Image.new("L", (2, 8)), lambda: Image.new("L", (4, 4))),
    "palette": (lambda: _palette(255, 0, 0), lambda: _palette(0, 0, 255)),
    "orientation": (lambda: _turned(1), lambda: _turned(6)),
    "transparency": (lambda: _clear(0), lambda: _clear(1)),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_pictures_in_memory_that_look_different_have_different_digests(what: str) -> None:
    """Features are stored by digest: an equal one would give this picture the features of the other."""
    first, second = DIFFERENT[what]
    assert not np.array_equal(pixels_of(first()), pixels_of(second()))
    assert digest(first()) != digest(second())
    assert digest(first()) == digest(first())


@pytest.mark.parametrize("content", [encoded(noise()), b"text", encoded(noise())[:900]], ids=["good", "text", "cut"])
def test_known_content_is_not_decoded(content: bytes) -> None:
    known = {digest(content)}
    loaded = load(HeldRef("x", content), never, known=known)
    assert (loaded.pixels, loaded.reason, loaded.digest) == (None, "", *known)


def test_known_pictures_in_memory_are_not_transformed() -> None:
    known = {digest(noise())}
    loaded = load(HeldRef("x", noise()), never, known=known)
    assert (loaded.pixels, loaded.reason, loaded.digest) == (None, "", *known)


def test_known_is_asked_while_others_are_loaded() -> None:
    refs = grey_refs(6)
    known = {load(ref, to_tensor).digest for ref in refs[::2]}
    loaded = list(iter_loaded(refs, to_tensor, workers=3, known=known))
    assert [item.pixels is None for item in loaded] == [True, False] * 3
    assert [item.reason for item in loaded] == [""] * 6


class Failing:
    """A transform that fails as it is told to."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, image: Image.Image) -> torch.Tensor:
        raise self.error


ERRORS: list[tuple[Exception, str]] = [
    (ValueError("no such\nsize"), "no such size"),
    (OSError(28, "No space left on device"), "no space left"),
    (OSError("broken"), "broken"),
    (MemoryError(), "MemoryError"),
    (KeyError(), "KeyError"),
    (zlib.error("Error -3"), "Error -3"),
    (UnreadableImage("too dark"), "too dark"),
    (OSError(), ""),
    (OSError("two\nlines"), "two lines"),
]


@pytest.mark.parametrize(("error", "words"), ERRORS, ids=[repr(error) for error, _ in ERRORS])
def test_every_failure_is_a_reason_of_one_line(error: Exception, words: str) -> None:
    """An empty reason would mean that the features of the image are known."""
    loaded = load(HeldRef("x", noise()), Failing(error))
    assert loaded.pixels is None
    assert loaded.reason
    assert "\n" not in loaded.reason
    assert words in loaded.reason


def test_missing_reference_keeps_its_reason() -> None:
    assert load(MissingRef("x", "gone"), to_tensor) == LoadedImage(MissingRef("x", "gone"), reason="gone")


# ---- iter_loaded ----


def decode_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("featdiff-decode")]


@pytest.mark.parametrize("workers", [1, 3, 16, None])
@pytest.mark.parametrize("ahead", [1, 5, 64])
def test_order_is_kept(workers: int | None, ahead: int) -> None:
    """The first images take longest."""

    def slow(image: Image.Image) -> torch.Tensor:
        value = to_tensor(image)
        time.sleep(0.01 if int(value[0, 0, 0]) % 8 == 0 else 0)
        return value

    refs = grey_refs(40)
    loaded = list(iter_loaded(refs, slow, workers=workers, ahead=ahead))
    assert [item.ref for item in loaded] == refs
    assert [int(item.pixels[0, 0, 0]) for item in loaded] == list(range(40))  # type: ignore[index]
    assert decode_threads() == []


def test_no_references() -> None:
    assert list(iter_loaded([], to_tensor)) == []


def test_images_are_decoded_at_the_same_time() -> None:
    """Three transforms that wait for each other."""
    barrier = threading.Barrier(3, timeout=20)

    def meet(image: Image.Image) -> torch.Tensor:
        barrier.wait()
        return to_tensor(image)

    assert [item.reason for item in iter_loaded(grey_refs(6), meet, workers=3)] == [""] * 6


@dataclass(frozen=True)
class CountedRef(ImageRef):
    """A reference that tells when, and on which thread, it was read."""

    log: list[tuple[str, int]] = field(compare=False)

    def read(self) -> Image.Image:
        self.log.append((self.path, threading.get_ident()))
        return Image.new("L", (2, 2))


class SequentialRef(CountedRef):
    sequential: ClassVar[bool] = True


@pytest.mark.parametrize("kind", [CountedRef, SequentialRef])
@pytest.mark.parametrize("ahead", [1, 4, 16])
def test_at_most_ahead_images_are_held(kind: type[CountedRef], ahead: int) -> None:
    log: list[tuple[str, int]] = []
    refs = [kind(str(i), log) for i in range(60)]
    for given, _ in enumerate(iter_loaded(refs, to_tensor, workers=8, ahead=ahead)):
        time.sleep(0.001)  # time enough for the workers to run too far
        assert len(log) <= given + ahead
    assert len(log) == 60


@pytest.mark.parametrize("way", ["close", "interrupt", "forget"])
def test_threads_end_and_work_stops_when_the_caller_stops(way: str) -> None:
    log: list[tuple[str, int]] = []
    refs = [CountedRef(str(i), log) for i in range(500)]
    stream: Iterator[LoadedImage] | None = iter_loaded(refs, to_tensor, workers=4, ahead=20)
    assert [next(stream).ref.path for _ in range(3)] == ["0", "1", "2"]  # type: ignore[arg-type]
    assert decode_threads()
    if way == "close":
        stream.close()  # type: ignore[union-attr]
    elif way == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            stream.throw(KeyboardInterrupt())  # type: ignore[union-attr]
    else:
        stream = None
    assert decode_threads() == []
    assert len(log) <= 3 + 20


def test_waiting_images_are_not_decoded_once_the_caller_stops() -> None:
    started: list[Image.Image] = []

    def slow(image: Image.Image) -> torch.Tensor:
        started.append(image)
        time.sleep(0.05)
        return to_tensor(image)

    stream = iter_loaded(grey_refs(40), slow, workers=1, ahead=30)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert len(started) < 20


def test_nothing_is_read_before_the_first_image_is_asked_for() -> None:
    log: list[tuple[str, int]] = []
    stream = iter_loaded([CountedRef("0", log)], to_tensor)
    assert (log, decode_threads()) == ([], [])
    stream.close()  # type: ignore[attr-defined]


def test_sequential_references_are_read_in_order_on_one_thread() -> None:
    log: list[tuple[str, int]] = []
    refs = [SequentialRef(str(i), log) for i in range(30)]
    assert len(list(iter_loaded(refs, to_tensor, workers=8))) == 30
    assert log == [(str(i), threading.get_ident()) for i in range(30)]


@pytest.fixture
def compressed_tar(tmp_path: Path) -> Path:
    """30 grey pictures 0, 1 ..., whose names are not sorted, and one that is text."""
    file = tmp_path / "data.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        for i in range(31):
            data = encoded(Image.new("L", (2, 2), i)) if i != 7 else b"text"
            info = tarfile.TarInfo(f"{i * 7 % 31:02d}.png")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file


def test_compressed_tar_is_read_in_its_order(compressed_tar: Path) -> None:
    refs = list_images(compressed_tar)
    loaded = list(iter_loaded(refs, to_tensor, workers=8, ahead=5))
    assert [Path(item.ref.path).name for item in loaded] == [f"{i * 7 % 31:02d}.png" for i in range(31)]
    values = [None if item.pixels is None else int(item.pixels[0, 0, 0]) for item in loaded]
    assert values == [i if i != 7 else None for i in range(31)]
    assert "not an image" in loaded[7].reason


def test_images_of_a_compressed_tar_do_not_keep_its_bytes(compressed_tar: Path) -> None:
    """A batch holds 16 times as many known images as decoded ones; their file contents must be gone."""
    refs = list_images(compressed_tar)
    loaded = list(iter_loaded(refs, to_tensor))
    assert [type(item.ref) for item in loaded] == [TarMemberRef] * 31
    assert [item.ref for item in loaded] == refs


def test_compressed_tar_that_vanishes_becomes_rows(tmp_path: Path) -> None:
    refs = [TarMemberRef(f"x/{i}.png", str(tmp_path / "x.tar.gz"), f"{i}.png") for i in range(3)]
    loaded = list(iter_loaded(refs, to_tensor))
    assert [item.ref.path for item in loaded] == ["x/0.png", "x/1.png", "x/2.png"]
    assert all("no such file" in item.reason.lower() for item in loaded)


def test_kinds_may_be_mixed(compressed_tar: Path) -> None:
    refs: list[ImageRef] = []
    for sequential, other in zip(list_images(compressed_tar)[:6], grey_refs(6), strict=True):
        refs += [sequential, other, MissingRef(f"gone{len(refs)}", "gone")]
    loaded = list(iter_loaded(refs, to_tensor, workers=4, ahead=3))
    values = [item.reason or int(item.pixels[0, 0, 0]) for item in loaded]  # type: ignore[index]
    assert values == [value for i in range(6) for value in (i, i, "gone")]


# ---- iter_batches ----


def loaded_images(kinds: str) -> Iterator[LoadedImage]:
    """``d`` decoded, ``k`` known, ``x`` unreadable; decoded pixels tell their place."""
    for i, kind in enumerate(kinds):
        pixels = torch.full((3, 2, 2), float(i)) if kind == "d" else None
        yield LoadedImage(MissingRef(str(i), ""), b"", pixels, "bad" if kind == "x" else "")


def shapes(batches: Iterator[Batch]) -> list[tuple[int, int]]:
    """(images, decoded ones) of each batch, after checking that they fit together."""
    found = []
    place = 0
    for batch in batches:
        assert [item.ref.path for item in batch.loaded] == [str(place + i) for i in range(len(batch.loaded))]
        assert batch.decoded == [i for i, item in enumerate(batch.loaded) if item.pixels is not None]
        if batch.pixels is None:
            assert batch.decoded == []
        else:
            assert batch.pixels[:, 0, 0, 0].tolist() == [place + i for i in batch.decoded]
        found.append((len(batch.loaded), len(batch.decoded)))
        place += len(batch.loaded)
    return found


@pytest.mark.parametrize(
    ("kinds", "size", "expected"),
    [
        ("", 4, []),
        ("d", 4, [(1, 1)]),
        ("dddd", 4, [(4, 4)]),
        ("ddddd", 4, [(4, 4), (1, 1)]),
        ("ddd", 1, [(1, 1)] * 3),
        ("xdkdxdx", 2, [(4, 2), (3, 1)]),
        ("x" * 33, 2, [(32, 0), (1, 0)]),
        ("k" * 31 + "dd", 2, [(32, 1), (1, 1)]),
        ("d" + "k" * 40, 2, [(32, 1), (9, 0)]),
    ],
)
def test_batch_sizes(kinds: str, size: int, expected: list[tuple[int, int]]) -> None:
    assert shapes(iter_batches(loaded_images(kinds), size)) == expected


def test_batches_come_as_soon_as_they_are_full() -> None:
    source = loaded_images("d" * 10)
    next(iter_batches(source, 3))
    assert next(source).ref.path == "3"


# ---- loaders ----

TILES = torch.randn(10, 3, 4, 5, generator=torch.Generator().manual_seed(0))


def check_loader_batches(batches: Sequence[Batch], sizes: list[int]) -> None:
    assert [len(batch.loaded) for batch in batches] == sizes
    names = [item.ref.path for batch in batches for item in batch.loaded]
    assert names == [f"loader[{i}]" for i in range(10)]
    assert torch.equal(torch.cat([batch.pixels for batch in batches]), TILES)  # type: ignore[misc]
    assert all(batch.decoded == list(range(len(batch.loaded))) for batch in batches)


def test_data_loader_of_tensors() -> None:
    images: Any = TILES
    check_loader_batches(list(batches_from_loader(DataLoader(images, batch_size=4))), [4, 4, 2])


def test_data_loader_with_labels() -> None:
    loader = DataLoader(TensorDataset(TILES, torch.arange(10)), batch_size=4)
    check_loader_batches(list(batches_from_loader(loader)), [4, 4, 2])


def test_generator_of_batches() -> None:
    check_loader_batches(list(batches_from_loader(part for part in TILES.split(3))), [3, 3, 3, 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_loader_batches_of_every_float_type_become_float32(dtype: torch.dtype) -> None:
    (batch,) = batches_from_loader([TILES.to(dtype)])
    assert batch.pixels is not None
    assert batch.pixels.dtype == torch.float32
    assert torch.equal(batch.pixels, TILES.to(dtype).float())
    assert len({item.digest for item in batch.loaded}) == 10


def test_loader_batches_that_need_a_gradient_or_are_not_contiguous() -> None:
    strange = TILES.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).requires_grad_()
    (batch,) = batches_from_loader([strange])
    (plain,) = batches_from_loader([TILES])
    assert [item.digest for item in batch.loaded] == [item.digest for item in plain.loaded]


def test_known_images_of_a_loader_are_not_passed_on() -> None:
    (batch,) = batches_from_loader([TILES])
    digests = [item.digest for item in batch.loaded]
    assert len(set(digests)) == 10
    first, second = batches_from_loader(TILES.split(5), known=set(digests[:6]))
    assert (first.pixels, first.decoded, len(first.loaded)) == (None, [], 5)
    assert second.decoded == [1, 2, 3, 4]
    assert torch.equal(second.pixels, TILES[6:])  # type: ignore[arg-type]
    assert [item.reason for item in second.loaded] == [""] * 5


def test_empty_loader_and_empty_batch() -> None:
    assert list(batches_from_loader([])) == []
    (batch,) = batches_from_loader([torch.zeros(0, 3, 4, 4)])
    assert (batch.loaded, batch.pixels, batch.decoded) == ([], None, [])


def test_batches_of_a_mapping_and_of_grey_images() -> None:
    grey = torch.rand(2, 1, 4, 4)
    named, plain = batches_from_loader([{"pixel_values": grey, "labels": [0, 1]}, grey])
    assert torch.equal(named.pixels, grey)  # type: ignore[arg-type]
    assert [item.digest for item in named.loaded] == [item.digest for item in plain.loaded]


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (torch.zeros(3, 4, 4), r"\(3, 4, 4\)"),
        (torch.zeros(2, 1, 3, 4, 4), r"\(2, 1, 3, 4, 4\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), r"uint8"),
        ({"pixels": torch.zeros(2, 3, 4, 4)}, "dict"),
        ((torch.arange(2), torch.zeros(2, 3, 4, 4)), r"\(2,\)"),
        ([torch.zeros(3, 4, 4)] * 2, r"\(3, 4, 4\)"),
        (np.zeros((2, 3, 4, 4), np.float32), "ndarray"),
        ((), "tuple"),
        ("a.png", "str"),
        (Path("a.png"), "Path"),
        (None, "None"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_other_batches_are_usage_errors_that_say_what_is_taken(item: object, words: str) -> None:
    with pytest.raises(UsageError, match=rf"\(B, C, H, W\).*{words}"):
        list(batches_from_loader([TILES, item]))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (DataLoader(TensorDataset(TILES)), True),
        ((batch for batch in [TILES]), True),
        ("images/", False),
        (Path("images"), False),
        (["a.png"], False),
        (("a.png",), False),
        (np.zeros((4, 4)), False),
        (TILES, False),
        (Image.new("L", (2, 2)), False),
        (None, False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_a_loader(source: object, expected: bool) -> None:
    assert is_loader(source) is expected


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

"""Pictures that are refused, each with a reason: damaged, too large, too thin."""

from __future__ import annotations

import io
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from image_files import (
    colours,
    encoded,
    noise,
    pixels_of,
    png_header,
    reason,
    to_tensor,
)
from PIL import Image

from featdiff.data.batches import iter_loaded, load
from featdiff.data.decoding import MAX_ASPECT, MAX_PIXELS, decode
from featdiff.data.references import FileRef, list_images
from featdiff.exceptions import UnreadableImage

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

"""Small pictures for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import TAR_MODES, encoded, write_archive
from PIL import Image

from featdiff.data.references import list_images
from featdiff.data.thumbnails import iter_thumbnails


def shades(count: int, side: int = 300) -> dict[str, bytes]:
    return {f"{i}.jpg": encoded(Image.new("RGB", (side, side // 2), (20 * i,) * 3), "JPEG") for i in range(count)}


@pytest.mark.parametrize("kind", ["folder", ".zip", *TAR_MODES])
def test_small_pictures_come_in_order(tmp_path: Path, kind: str) -> None:
    """More than are decoded ahead, whatever holds them."""
    if kind == "folder":
        for name, content in shades(10).items():
            (tmp_path / name).write_bytes(content)
        source = tmp_path
    else:
        source = write_archive(tmp_path / f"a{kind}", shades(10))
    found = list(iter_thumbnails(list_images(source), side=60, workers=2))
    assert [picture.size if picture else None for picture in found] == [(60, 30)] * 10
    values = [np.asarray(picture).mean() for picture in found if picture]
    assert values == pytest.approx([20 * i for i in range(10)], abs=3)


def test_images_that_are_gone_or_damaged_are_none(tmp_path: Path) -> None:
    for name, content in shades(4).items():
        (tmp_path / name).write_bytes(content)
    refs = list_images(tmp_path)
    (tmp_path / "0.jpg").unlink()
    (tmp_path / "1.jpg").write_bytes(b"no picture")
    (tmp_path / "2.jpg").write_bytes(shades(3)["2.jpg"][:200])
    found = list(iter_thumbnails(refs, side=60))
    assert [picture is None for picture in found] == [True, True, True, False]


def test_limits_hold(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(shades(1)["0.jpg"])
    refs = list_images(tmp_path)
    assert list(iter_thumbnails(refs, side=60, max_pixels=1000)) == [None]
    assert list(iter_thumbnails(refs, side=60, max_bytes=100)) == [None]


def test_pictures_are_upright_rgb_and_no_larger_than_they_were() -> None:
    turned = Image.new("L", (40, 10), 77)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned_jpeg = encoded(turned, "JPEG", exif=exif)
    sources: list[Any] = [turned_jpeg, Image.new("RGBA", (1, 20), (9, 9, 9, 0)), Image.new("L", (500, 2))]
    found = list(iter_thumbnails(list_images(sources), side=100))
    assert [(p.mode, p.size) if p else None for p in found] == [("RGB", (10, 40)), ("RGB", (1, 20)), ("RGB", (100, 1))]
    assert found[1] is not None
    assert found[1].getpixel((0, 0)) == (255, 255, 255)  # transparent is white


def test_the_picture_that_was_given_stays_as_it_is() -> None:
    picture = Image.new("RGB", (200, 100))
    list(iter_thumbnails(list_images(picture), side=50))
    assert picture.size == (200, 100)

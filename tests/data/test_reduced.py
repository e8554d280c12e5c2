"""Large JPEGs are decoded at reduced size for a transform that says how much it needs, and nothing else changes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import encoded, exif, rotated, to_tensor, write_zip
from PIL import Image
from torch import Tensor

from featdiff.data.batches import LoadedImage, iter_loaded, load
from featdiff.data.decoding import decode, open_image, reduce
from featdiff.data.formats import memory_of
from featdiff.data.references import HeldRef, list_images

Box = tuple[float, float, float, float]
ORIENTATIONS = range(1, 9)


class Needs:
    """A transform that needs pictures of at least this size, and resizes them to 60 x 40."""

    def __init__(self, width: int, height: int) -> None:
        self.least = (width, height)
        self.asked: tuple[int, int] | None = None
        self.decoded: tuple[int, int] | None = None
        self.box: Box | None = None

    def draft(self, width: int, height: int) -> tuple[int, int]:
        self.asked = (width, height)
        return self.least

    def __call__(self, picture: Image.Image, box: Box | None = None) -> Tensor:
        self.decoded = picture.size
        self.box = box
        return to_tensor(picture.resize((60, 40), Image.Resampling.BICUBIC, box)).float()


def scene(width: int = 1002, height: int = 799) -> Image.Image:
    """Smooth patches of all colours, so that JPEG loses little and a shift shows."""
    patches = np.random.default_rng(0).integers(0, 256, (12, 15, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(picture: Image.Image, **options: Any) -> bytes:
    return encoded(picture, options.pop("format_", "JPEG"), quality=95, **options)


def both(data: bytes, width: int = 200, height: int = 160) -> tuple[LoadedImage, LoadedImage, Needs]:
    """A file loaded for a transform that needs so much, and decoded whole; and that transform."""
    needs = Needs(width, height)
    whole = Needs(width, height)
    reduced = load(HeldRef("x", data), needs)
    return reduced, load(HeldRef("x", data), lambda picture: whole(picture)), needs


def difference(first: LoadedImage, second: LoadedImage) -> float:
    assert first.pixels is not None and second.pixels is not None
    return float((first.pixels - second.pixels).abs().mean())


# ---- which size ----


@pytest.mark.parametrize(
    ("least", "decoded"),
    [
        ((1002, 799), (1002, 799)),
        ((502, 399), (1002, 799)),
        ((501, 399), (501, 400)),
        ((200, 400), (1002, 799)),
        ((250, 199), (251, 200)),
        ((125, 99), (126, 100)),
        ((1, 1), (126, 100)),
        ((5000, 5000), (1002, 799)),
    ],
)
def test_no_smaller_than_is_needed(least: tuple[int, int], decoded: tuple[int, int]) -> None:
    reduced, whole, needs = both(jpeg(scene()), *least)
    assert needs.asked == (1002, 799)
    assert needs.decoded == decoded
    assert (needs.box is None) == (decoded == (1002, 799))
    assert (reduced.size, reduced.digest, reduced.reason) == ((1002, 799), whole.digest, "")
    assert difference(reduced, whole) < 0.5


def test_a_fraction_of_the_last_pixels_is_told() -> None:
    _, _, needs = both(jpeg(scene()), 250, 199)
    assert needs.box == (0, 0, 250.5, 199.75)


def test_a_transform_that_does_not_say_gets_the_whole() -> None:
    sizes = []

    def transform(*given: Any) -> Tensor:
        (picture,) = given
        sizes.append(picture.size)
        return torch.zeros(3, 1, 1)

    assert load(HeldRef("x", jpeg(scene())), transform).size == (1002, 799)
    assert sizes == [(1002, 799)]


# ---- turned pictures ----


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize(("width", "height"), [(1002, 799), (797, 1001), (800, 640)])
def test_turned_pictures_stay_where_they_are(orientation: int, width: int, height: int) -> None:
    """A quarter of these sides is no whole number: without the box, they would be stretched by that."""
    data = jpeg(scene(width, height), exif=exif(rotated(orientation)))
    reduced, whole, needs = both(data, 150, 150)
    upright = (width, height) if orientation < 5 else (height, width)
    assert needs.asked == upright == reduced.size == whole.size
    assert needs.decoded == tuple(-(-side // 4) for side in upright)
    assert difference(reduced, whole) < 0.4

    assert needs.box is not None
    left, top, right, bottom = needs.box
    assert (right - left, bottom - top) == (upright[0] / 4, upright[1] / 4)
    assert right == needs.decoded[0] or left == 0
    assert bottom == needs.decoded[1] or top == 0


def test_what_is_needed_is_of_the_upright_picture() -> None:
    """1000 x 500 in the file, upright 500 x 1000: 240 x 400 upright pixels are no more than a half of it."""
    _, _, needs = both(jpeg(scene(1000, 500), exif=exif(rotated(6))), 240, 400)
    assert needs.decoded == (250, 500)


# ---- kinds of files ----

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "progressive": ("RGB", {"progressive": True}),
    "grey": ("L", {}),
    "grey, progressive": ("L", {"progressive": True}),
    "CMYK": ("CMYK", {}),
    "MPO": ("RGB", {"format_": "MPO"}),
    "full colour": ("RGB", {"subsampling": 0}),
    "restarts": ("RGB", {"restart_marker_blocks": 4}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_jpeg(kind: str) -> None:
    mode, options = KINDS[kind]
    reduced, whole, needs = both(jpeg(scene().convert(mode), **options))
    assert needs.decoded == (251, 200)
    assert needs.box == (0, 0, 250.5, 199.75)
    assert difference(reduced, whole) < 0.5


def test_the_first_of_several_pictures_is_taken() -> None:
    data = jpeg(scene(), format_="MPO", save_all=True, append_images=[Image.new("RGB", (1002, 799), "red")])
    assert open_image(data).format == "MPO"
    reduced, whole, needs = both(data)
    assert needs.decoded == (251, 200)
    assert difference(reduced, whole) < 0.5


@pytest.mark.parametrize("format_", ["PNG", "WEBP", "TIFF", "BMP"])
def test_other_formats_are_decoded_whole(format_: str) -> None:
    options = {"compression": "jpeg"} if format_ == "TIFF" else {}
    reduced, whole, needs = both(encoded(scene(), format_, **options))
    assert (needs.asked, needs.decoded, needs.box) == (None, (1002, 799), None)
    assert reduced.size == (1002, 799)
    assert difference(reduced, whole) == 0


def test_embedded_thumbnails_of_heic_are_not_taken() -> None:
    """Pillow's plugin has a `draft`, too, which gives a small picture that a camera put beside the large one."""
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    data = encoded(scene(1000, 800), "HEIF", thumbnails=[256])
    assert open_image(data).draft(None, (200, 160)) is not None
    reduced, whole, needs = both(data)
    assert (needs.decoded, difference(reduced, whole)) == ((1000, 800), 0)


def test_in_archives_and_in_parallel(tmp_path: Path) -> None:
    data = jpeg(scene())
    refs = list_images(write_zip(tmp_path / "a.zip", {"a.jpg": data, "b.jpg": data + b"\0", "c.png": encoded(scene())}))
    found = list(iter_loaded(refs, Needs(200, 160), workers=2))
    assert [item.size for item in found] == [(1002, 799)] * 3
    assert len({item.digest for item in found}) == 3
    assert found[0].pixels is not None and torch.equal(found[0].pixels, found[1].pixels)  # type: ignore[arg-type]


# ---- limits, and damaged files ----


def test_the_limit_is_on_the_size_in_the_file() -> None:
    data = jpeg(scene())
    refused = load(HeldRef("x", data), Needs(100, 80), max_pixels=1002 * 799 - 1)
    assert refused.reason == "1002 x 799 pixels, more than the limit of 800,597 (max_pixels)"
    assert load(HeldRef("x", data), Needs(100, 80), max_pixels=1002 * 799).reason == ""


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.99])
def test_a_cut_file_is_an_error_as_before(progressive: bool, share: float) -> None:
    data = jpeg(scene(), progressive=progressive)
    reduced, whole, _ = both(data[: int(share * len(data))])
    assert whole.pixels is None and whole.reason
    assert (reduced.pixels, reduced.reason, reduced.digest) == (None, whole.reason, whole.digest)


def test_damaged_bytes_give_the_same_verdict_on_the_file() -> None:
    data = jpeg(scene())
    start = data.index(b"\xff\xda") + 12
    draws = np.random.default_rng(0)
    refused = 0
    for _ in range(20):
        damaged = bytearray(data)
        for place in draws.integers(start, len(data) - 2, 20):
            damaged[place] = draws.integers(256)
        reduced, whole, _ = both(bytes(damaged))
        assert (reduced.reason == "") == (whole.reason == "")
        refused += bool(whole.reason)
    assert refused < 20


def test_memory_is_that_of_the_reduced_picture() -> None:
    """A pixel takes four bytes, and of a progressive file six more for each pixel in it, which are all held."""
    for progressive, need in ((False, 4 * 251 * 200), (True, 4 * 251 * 200 + 6 * 1002 * 799)):
        image = open_image(jpeg(scene(), progressive=progressive))
        assert reduce(image, lambda width, height: (200, 160)) is not None
        assert memory_of(image, 1002 * 799) == need
    assert memory_of(open_image(jpeg(scene(), progressive=True))) == 10 * 1002 * 799
    assert decode(image).size == (251, 200)


def test_an_open_picture_is_left_as_it_is() -> None:
    """It is not a file of ours to read in another way: the caller holds it."""
    opened = Image.open(io.BytesIO(jpeg(scene())))
    needs = Needs(200, 160)
    assert load(HeldRef("x", opened), needs).size == (1002, 799)
    assert (needs.decoded, opened.size) == ((1002, 799), (1002, 799))

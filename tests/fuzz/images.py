"""Damaged image files beside good ones."""

from __future__ import annotations

import functools
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
from image_files import encoded, exif, png_header, rotated
from PIL import Image, features

from .harness import Target
from .mutators import IN_IMAGES, mutate
from .place import Place, check_good, check_rows, require

#: Damaged files of a case.
FILES = 12
_SHAPE = (37, 52)

# Format -> modes and options of the seeds; the name of a format is also the suffix of its files.
_FORMATS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "png": [(mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
    + [("L", {"transparency": 7}), ("P", {"transparency": 7}), ("RGB", {"transparency": (1, 2, 3)})]
    + [("RGB", {"exif": exif(rotated(6))[6:]}), ("RGB", {"icc_profile": bytes(300)})],
    "jpg": [("L", {}), ("RGB", {}), ("CMYK", {}), ("RGB", {"progressive": True}), ("RGB", {"subsampling": 0})]
    + [("RGB", {"exif": exif(rotated(turn))}) for turn in (3, 6)]
    + [("RGB", {"icc_profile": bytes(300)}), ("RGB", {"restart_marker_rows": 1})],
    "webp": [("RGB", {}), ("RGB", {"lossless": True}), ("RGBA", {}), ("RGBA", {"save_all": True})],
    "bmp": [(mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")],
    "dib": [("RGB", {})],
    "tiff": [(mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "I;16", "F")]
    + [("RGB", {"compression": name}) for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")]
    + [("1", {"compression": "group4"}), ("RGB", {"save_all": True})],
    "gif": [("L", {}), ("P", {}), ("L", {"transparency": 7}), ("RGB", {"save_all": True})],
    "ppm": [("1", {}), ("L", {}), ("RGB", {})],
    "jp2": [("L", {}), ("RGB", {}), ("RGBA", {})],
    "avif": [("RGB", {})],
}
_NAMES = {"jpg": "JPEG", "jp2": "JPEG2000"}


def picture(mode: str) -> Image.Image:
    """Noise on a ramp, so that every compression has something to do."""
    height, width = _SHAPE
    ramp = np.linspace(0, 200, width)[None, :, None] + np.random.default_rng(0).uniform(0, 55, (height, width, 3))
    colours = Image.fromarray(ramp.astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray((ramp[..., 0] * 257).astype(np.uint16))
    if mode == "F":
        return Image.fromarray((ramp[..., 0] / 255).astype(np.float32))
    if mode == "LAB":
        return Image.frombytes("LAB", colours.size, colours.tobytes())
    if mode in ("LA", "RGBA"):
        colours.putalpha(colours.convert("L"))
    return colours.convert(mode)


@functools.cache
def seeds() -> dict[str, bytes]:
    """A file of each format and mode, by name."""
    files = {}
    for suffix, kinds in _FORMATS.items():
        if suffix == "avif" and not features.check("avif"):
            continue
        for number, (mode, options) in enumerate(kinds):
            image = picture(mode)
            more = {"append_images": [image.transpose(Image.Transpose.ROTATE_180)]} if "save_all" in options else {}
            name = f"{suffix}-{number}-{mode.replace(';', '')}.{suffix}"
            files[name] = encoded(image, _NAMES.get(suffix, suffix.upper()), **options, **more)
    return files


def make(rng: random.Random, folder: Path, place: Place) -> None:
    place.copy_good(folder)
    files = seeds()
    contents = list(files.values())
    for number in range(FILES):
        name = rng.choice(list(files))
        (folder / f"{number:02d}-{name}").write_bytes(mutate(files[name], rng, contents, IN_IMAGES))

    # now and then, files that are larger than they look
    if rng.random() < 0.05:
        side = rng.choice((9_000, 9_459, 30_000, 2**31 - 1))
        (folder / "header.png").write_bytes(png_header(side, side))
    if rng.random() < 0.02:
        (folder / "large.png").write_bytes(encoded(Image.new("P", (9_400, 9_400)), "PNG"))
    if rng.random() < 0.02:
        (folder / "sparse.png").touch()
        os.truncate(folder / "sparse.png", rng.choice((1 << 30, 30 << 30)))


def check(folder: Path, place: Place) -> int:
    scores = place.detector.score(str(folder))
    names = sorted(file.name for file in folder.iterdir() if file.suffix != ".json")
    require([Path(path).name for path in scores.path] == names, "a file has no row, or more than one")
    check_rows(scores)
    good = {file.name: row for file, row in zip(place.good, place.rows, strict=True) if file.name in names}
    check_good(scores, good)
    return len(scores)


TARGET = Target("images", make, check, shrinks=True)

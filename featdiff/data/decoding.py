"""Bytes of an image file -> an upright 8-bit RGB picture, or a reason why not. Knows no model."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from ..exceptions import UnreadableImage
from .references import ImageRef

Transform = Callable[[Image.Image], Tensor]
#: Larger pictures are refused before a pixel is decoded (Pillow's own warning level).
MAX_PIXELS = 89_478_485
#: Resizing the short side of a thinner picture to a model's size would need gigabytes.
MAX_ASPECT = 300
# Only formats that decode in-process: Pillow would hand EPS files to Ghostscript.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")


def decode(data: bytes | Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Encoded bytes (or an open picture) -> an upright 8-bit RGB picture.

    First frame of animations; EXIF rotation applied; transparency laid on white; 16-bit grey scaled to 8 bits;
    32-bit floats must lie in [0, 1].

    Raises
    ------
    UnreadableImage
        Not an image, damaged, or larger than ``max_pixels``. The message is the reason shown to users.
    """
    try:
        image = data if isinstance(data, Image.Image) else _open(data, max_pixels)
        _check_size(image.size, max_pixels)
        return _upright(_to_rgb(image), _orientation(image))
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("not an image in a format that can be decoded") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # the latter if warnings are errors
        raise UnreadableImage(f"more than the limit of {max_pixels:,} pixels (--max-pixels)") from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise UnreadableImage(f"damaged image: {_one_line(error)}") from None


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise UnreadableImage("empty file (0 bytes)")
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's limit is global; raised only when the user asks for more
    return Image.open(io.BytesIO(data), formats=_formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of ``_FORMATS`` that this build of Pillow can open."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise UnreadableImage(f"{width} x {height} pixels, more than the limit of {max_pixels:,} (--max-pixels)")
    if min(size) == 0 or max(size) > MAX_ASPECT * min(size):
        raise UnreadableImage(f"{width} x {height} pixels: too thin to be resized (limit 1:{MAX_ASPECT})")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = _deep_grey(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    """16-bit grey (Pillow modes I, I;16*) or float grey -> 8-bit grey by a fixed scale, never per image."""
    values = np.array(image, dtype=np.float32)
    if isinstance(hidden := image.info.get("transparency"), int):
        values[values == hidden] = 65535
    top = 1.0 if image.mode == "F" else 65535.0
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > top:
        raise UnreadableImage(f"grey values outside 0..{top:g}")
    return Image.fromarray(np.round(values * (255 / top)).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; damaged EXIF counts as none."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
        return found if isinstance(found, int) else 1
    except Exception:  # cameras and editors write tags of any kind
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    return image if turn is None else image.transpose(turn)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def short_sides(refs: Sequence[ImageRef]) -> np.ndarray:
    """Shorter side of each picture in pixels (N,), from its header; NaN where there is none."""
    sides = np.full(len(refs), np.nan)
    for i, ref in enumerate(refs):
        try:
            content = ref.read()
            picture = content if isinstance(content, Image.Image) else _open(content, MAX_PIXELS)
            sides[i] = min(picture.size)
        except Exception:  # whatever is wrong with it is reported when it is scored
            continue
    return sides


class Downscale:
    """Shrink a picture so that its short side is at most ``size`` pixels (protocol ``matched``)."""

    def __init__(self, size: int, then: Transform) -> None:
        self.size, self.then = size, then

    def __call__(self, image: Image.Image) -> Tensor:
        short = min(image.size)
        if short > self.size:
            width, height = (max(1, round(side * self.size / short)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        return self.then(image)

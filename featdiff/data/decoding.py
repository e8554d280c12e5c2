"""Bytes of an image file -> an upright 8-bit RGB picture, or a reason why not. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ..exceptions import UnreadableImage, one_line
from .formats import open_file
from .limits import MAX_BYTES
from .quiet import quietly
from .references import ImageRef

#: RGB picture -> pixels (3, H, W): a tensor, or an array where torch is not needed. Some take pictures of reduced size,
#: too; see :func:`featdiff.data.batches.load`.
Transform = Callable[..., Any]
#: Larger pictures are refused before a pixel is decoded (Pillow's own warning level).
MAX_PIXELS = 89_478_485
#: Resizing the short side of a thinner picture to a model's size would need gigabytes.
MAX_ASPECT = 300
# What Pillow decodes at a half, a quarter or an eighth of its size at less cost. (HEIC plugins would give thumbnails.)
_REDUCIBLE = ("JPEG", "MPO")
_Number = TypeVar("_Number", int, float)
# Pixels that are converted at once.
_STRIP = 1 << 20


def decode(data: bytes | Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image to an upright 8-bit RGB picture.

    Of animations the first frame is taken, EXIF rotation is applied, transparency is laid on white, and 16-bit grey is
    scaled to 8 bits.

    Parameters
    ----------
    data : bytes or PIL image
        The content of an image file, or an open picture. 32-bit floats must lie in [0, 1].
    max_pixels : int, default 89,478,485
        Larger pictures are refused before a pixel is decoded.

    Returns
    -------
    PIL image
        Of mode RGB.

    Raises
    ------
    UnreadableImage
        Not an image, damaged, or larger than ``max_pixels``. The message is the reason shown to users.

    Examples
    --------
    >>> from PIL import Image
    >>> from featdiff.data.decoding import decode
    >>> picture = decode(Image.new("LA", (4, 2)))
    >>> picture.mode, picture.size
    ('RGB', (4, 2))
    """
    with _reasons(max_pixels):
        image = data if isinstance(data, Image.Image) else open_file(data, max_pixels)
        _check_size(image.size, max_pixels)
        return _upright(_to_rgb(image), _orientation(image))


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read the header of an image file; :func:`decode` takes the result.

    Parameters
    ----------
    data : bytes
    max_pixels : int, default 89,478,485

    Returns
    -------
    PIL image
        Its pixels are not decoded yet.

    Raises
    ------
    UnreadableImage
        As for :func:`decode`.
    """
    with _reasons(max_pixels):
        image = open_file(data, max_pixels)
        _check_size(image.size, max_pixels)
        return image


class Reduced(NamedTuple):
    """What becomes of a picture that is decoded at reduced size.

    Parameters
    ----------
    size : (int, int)
        Width and height of the upright picture in the file.
    box : (float, float, float, float)
        Left, top, right and bottom of it in the upright decoded picture, in pixels of that. The outermost pixels may
        stand for less than the others: a quarter of 1,002 pixels is 250.5, and 251 are decoded.
    """

    size: tuple[int, int]
    box: tuple[float, float, float, float]


def reduce(image: Image.Image, least: Callable[[int, int], tuple[int, int]]) -> Reduced | None:
    """Have a large JPEG decoded at a half, a quarter or an eighth of its size, which is faster.

    Parameters
    ----------
    image : PIL image
        From :func:`open_image`; its ``size`` is the reduced one afterwards.
    least : callable
        Width and height of the upright picture -> the least that is needed.

    Returns
    -------
    Reduced or None
        None for other formats, and for pictures that are not large: these are decoded as they are.

    Examples
    --------
    >>> import io
    >>> file = io.BytesIO()
    >>> Image.new("RGB", (1002, 800)).save(file, "JPEG")
    >>> image = open_image(file.getvalue())
    >>> reduce(image, lambda width, height: (250, 200)), image.size
    (Reduced(size=(1002, 800), box=(0.0, 0.0, 250.5, 200.0)), (251, 200))
    """
    if image.format not in _REDUCIBLE:
        return None
    orientation = _orientation(image)
    size = _turned(image.size, orientation)
    drafted = image.draft(None, _turned(least(*size), orientation))
    if drafted is None or _turned(image.size, orientation) == size:
        return None

    _, (_, _, *ends) = drafted
    width, height = _turned((ends[0], ends[1]), orientation)
    decoded_width, decoded_height = _turned(image.size, orientation)
    left = decoded_width - width if orientation in _MIRRORED else 0.0
    top = decoded_height - height if orientation in _HEADLONG else 0.0
    return Reduced(size, (left, top, left + width, top + height))


@contextmanager
def _reasons(max_pixels: int) -> Iterator[None]:
    """Inside the block, whatever decoders raise becomes a reason for users, and they print nothing."""
    with quietly() as messages:
        try:
            yield
        except UnreadableImage:
            raise
        except UnidentifiedImageError:
            raise UnreadableImage("not an image in a format that can be decoded") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # the latter if warnings are errors
            raise UnreadableImage(
                f"more than the limit of {max_pixels:,} pixels (max_pixels)", argument="max_pixels"
            ) from None
        except MemoryError:
            raise UnreadableImage("not enough memory to decode it") from None
        except Exception as error:  # decoders raise nearly anything on damaged files
            more = f" ({messages[0]})" if messages else ""
            raise UnreadableImage(f"damaged image: {one_line(error)}{more}") from None


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise UnreadableImage(
            f"{width} x {height} pixels, more than the limit of {max_pixels:,} (max_pixels)", argument="max_pixels"
        )
    if min(size) == 0 or max(size) > MAX_ASPECT * min(size):
        raise UnreadableImage(f"{width} x {height} pixels: too thin to be resized (limit 1:{MAX_ASPECT})")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converted strip by strip, so that of a large picture no more than two copies are held."""
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return image

    width, height = image.size
    rows = max(1, _STRIP // width)
    if height <= rows:
        return _converted(image)

    rgb = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        rgb.paste(_converted(strip), (0, top))
    return rgb


def _converted(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _deep_grey(image)

    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    """16-bit grey (Pillow modes I, I;16*) or float grey -> 8-bit grey by a fixed scale, never per image."""
    values = np.array(image, dtype=np.float32)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        values[values == transparent] = 65535  # white

    top = 1.0 if image.mode == "F" else 65535.0
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > top:
        raise UnreadableImage(f"grey values outside 0..{top:g}")
    return Image.fromarray(np.round(values * (255 / top)).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; damaged EXIF counts as none."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return orientation if isinstance(orientation, int) else 1
    except Exception:  # cameras and editors write tags of any kind
        return 1


# EXIF orientation -> what brings a picture upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Those that make columns of the file's rows; whose left is an end of the file's rows or columns; whose top is one.
_LYING = (5, 6, 7, 8)
_MIRRORED = (2, 3, 6, 7)
_HEADLONG = (3, 4, 7, 8)


def _turned(size: tuple[_Number, _Number], orientation: int) -> tuple[_Number, _Number]:
    """Width and height in the file -> those of the upright picture, and back."""
    return size[::-1] if orientation in _LYING else size


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    if orientation not in _TURNS:
        return image
    return image.transpose(_TURNS[orientation])


def short_sides(refs: Sequence[ImageRef]) -> np.ndarray:
    """The shorter side of each picture, read from its header.

    Parameters
    ----------
    refs : sequence of ImageRef

    Returns
    -------
    (N,) float
        In pixels; NaN where a picture cannot be opened.
    """
    sides = np.full(len(refs), np.nan)
    for i, ref in enumerate(refs):
        try:
            content = ref.read_within(MAX_BYTES)
            picture = content if isinstance(content, Image.Image) else open_image(content)
            sides[i] = min(picture.size)
        except Exception:  # the reason is reported when the image is scored
            continue

    return sides


class Downscale:
    """Shrink a picture so that its short side is at most ``size`` pixels (protocol ``matched``).

    Parameters
    ----------
    size : int
        In pixels; smaller pictures stay as they are.
    then : callable
        The transform that is applied afterwards.

    Examples
    --------
    >>> from PIL import Image
    >>> from featdiff.data.decoding import Downscale
    >>> Downscale(10, then=lambda picture: picture.size)(Image.new("RGB", (40, 20)))
    (20, 10)
    """

    def __init__(self, size: int, then: Transform) -> None:
        self.size = size
        self.then = then

    def __call__(self, image: Image.Image) -> Any:
        short = min(image.size)
        if short > self.size:
            width, height = (max(1, round(side * self.size / short)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)

        return self.then(image)

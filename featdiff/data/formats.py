"""Formats of image files: which are opened, what decoding them takes, and how many pages they have."""

from __future__ import annotations

import functools
import io

from PIL import ExifTags, Image, TiffImagePlugin

from ..exceptions import UnreadableImage
from .quiet import quietly

# Only formats that decode in-process: Pillow would hand EPS files to Ghostscript.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
_HEIF = "HEIF"
# What the first box of a HEIC photograph names; other files of that family are AVIF or videos.
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
# TIFF: what kind of picture a page holds, and the kinds that are other forms of the page before.
_PAGE_KIND = 254
_REDUCED_OR_MASK = 0b101
# More pages are not counted.
_MOST_PAGES = 1000


def open_file(data: bytes, max_pixels: int) -> Image.Image:
    """Open the content of an image file by its header; no pixels are decoded.

    Parameters
    ----------
    data : bytes
    max_pixels : int
        Pillow is made to open pictures of this size. Smaller ones are checked by the caller.

    Returns
    -------
    PIL image

    Raises
    ------
    UnreadableImage
        An empty file, or a format that needs a package which is not installed.
    Exception
        Whatever Pillow raises.
    """
    if not data:
        raise UnreadableImage("empty file (0 bytes)")

    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's limit is global; raised only when the user asks for more
    formats = _formats()
    if _is_heif(data):
        if not _can_open_heif():
            raise UnreadableImage("a HEIC photograph; to read these: pip install 'featdiff[heif]'")
        formats = (_HEIF,)
    return Image.open(io.BytesIO(data), formats=formats)


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of ``_FORMATS`` that this build of Pillow can open."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _is_heif(data: bytes) -> bool:
    if data[4:8] != b"ftyp" or data[8:12] not in _HEIF_BRANDS:
        return False
    others = data[16 : min(int.from_bytes(data[:4], "big"), 256)]
    return b"avif" not in others and b"avis" not in others


@functools.cache
def _can_open_heif() -> bool:
    """Whether Pillow has, or can be given, a plugin for HEIC."""
    if _HEIF in Image.OPEN:
        return True
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


# ---- memory ----

# Bytes that Pillow keeps for a pixel; of all other modes four.
_PIXEL = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
_USUAL_PIXEL = 4
# Bytes that a decoder holds for a pixel besides, where these are not few (measured at 6,000 x 6,000).
_WORKING = {"WEBP": 12, "JPEG2000": 16, "AVIF": 10, "HEIF": 8, "TIFF": 4}
_PROGRESSIVE = 6
# Where a picture is converted strip by strip, this much for a strip.
_CONVERTING = 24_000_000


def memory_of(image: Image.Image, in_file: int = 0) -> int:
    """How many bytes :func:`featdiff.data.decoding.decode` takes for a picture at most, told by its header.

    Parameters
    ----------
    image : PIL image
        Opened; decoded or not.
    in_file : int, default 0
        Pixels in the file, if it is to be decoded at reduced size.

    Returns
    -------
    int
    """
    pixels = image.width * image.height
    source = _PIXEL.get(image.mode, _USUAL_PIXEL)
    working = _WORKING.get(image.format or "", 0)
    if image.info.get("progressive"):  # a JPEG whose coefficients are all held
        working = _PROGRESSIVE
    working *= max(pixels, in_file)

    copies = 0
    extra = 0
    if image.mode != "RGB" or "transparency" in image.info:
        copies += _USUAL_PIXEL
        extra = min(_CONVERTING, _USUAL_PIXEL**2 * pixels)
    if _is_turned(image):
        copies += _USUAL_PIXEL
    return pixels * source + max(working, pixels * copies) + extra


def _is_turned(image: Image.Image) -> bool:
    """Whether the header has an EXIF orientation. (``getexif`` would decode a PNG, and hide what is wrong with it.)"""
    data = image.info.get("exif")
    if not isinstance(data, bytes):
        return False
    exif = Image.Exif()
    try:
        with quietly():
            exif.load(data)
            return exif.get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # cameras and editors write tags of any kind
        return False


# ---- pages ----


def note_on_pages(data: bytes, image: Image.Image) -> str:
    """What to tell of the pages of a TIFF file that are not read; empty if there are none.

    Parameters
    ----------
    data : bytes
        The content of the file.
    image : PIL image
        Opened from it. It stays as it is: pages are counted in a second look at the file.

    Returns
    -------
    str
        Smaller copies of a page and masks, as cameras and maps have, are no pages.
    """
    if image.format != "TIFF" or not getattr(image, "is_animated", False):
        return ""

    pages = 1
    try:
        with quietly(), TiffImagePlugin.TiffImageFile(io.BytesIO(data)) as file:
            for number in range(1, _MOST_PAGES):
                file.seek(number)
                pages += not file.tag_v2.get(_PAGE_KIND, 0) & _REDUCED_OR_MASK
    except Exception:  # there are no more, or a damaged one, which is no fault of the first
        pass
    if pages == 1:
        return ""
    return f"page 1 of {pages}{' or more' if pages == _MOST_PAGES else ''} was read"

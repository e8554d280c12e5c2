"""A picture -> the array that a network takes: resized, cropped and normalised as timm does it to evaluate.

In: preprocessing under timm's names, with one more crop mode, ``rectangle``. Needs neither torch nor timm, so that an
exported file sees the pixels that its detector saw.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

#: Sides of rectangles are multiples of it, in pixels: most networks shrink images by this factor.
CELL = 32
#: Cells that a side has at least: one is too few for networks with large kernels, and for exported files.
LEAST_CELLS = 2
#: A rectangle has at most this share of the input's area: a very thin picture must not cost much more than others.
LARGEST = 1.25
#: A large JPEG is decoded at a half, a quarter or an eighth of its size, if that is at least so many times the input's
#: size: 3.5 times lets photographs of 12 megapixels be decoded at a quarter for an input of 224 pixels.
REDUCED = 3.5
#: And if it has at least so many pixels a side: explanations show it to people.
SHOWN = 512
#: Left, top, right and bottom of a part of a picture, in pixels; see :class:`featdiff.data.decoding.Reduced`.
Box = tuple[float, float, float, float]
#: Ways to resize.
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
# timm's share of the picture in a crop, where a network names none
_CROP_SHARE = 0.875


def rectangle(width: float, height: float, area: float) -> tuple[int, int]:
    """The rectangle for a picture: about as large as the input, in about the picture's shape.

    Its sides are multiples of 32 pixels, at least 64. Of all rectangles with at most 1.25 x ``area`` it is the one with
    the least log(aspect / aspect of the picture)^2 + log(its area / ``area``)^2; of equal ones the smaller.

    Parameters
    ----------
    width, height : float
        Of the picture, in pixels.
    area : float
        Of the input in pixels, at least 64^2.

    Returns
    -------
    height, width : int
        In pixels.

    Examples
    --------
    >>> rectangle(4000, 3000, 224 * 224)
    (192, 256)
    >>> rectangle(3000, 3000, 224 * 224)
    (224, 224)
    """
    rows, columns = _nearest(width / height, area / CELL**2)
    return rows * CELL, columns * CELL


@functools.lru_cache(maxsize=10_000)
def _nearest(aspect: float, area: float) -> tuple[int, int]:
    """Rows and columns of cells for a picture of this aspect ratio, by :func:`rectangle`'s rule."""
    best = (LEAST_CELLS, LEAST_CELLS)
    least = (math.inf, 0)
    for rows in range(LEAST_CELLS, most_cells(area) + 1):
        for columns in range(LEAST_CELLS, int(LARGEST * area / rows) + 1):
            stretch = math.log(columns / rows / aspect)
            growth = math.log(rows * columns / area)
            error = (round(stretch**2 + growth**2, 9), rows * columns)  # rounded: 2 : 3 must mirror 3 : 2
            if error < least:
                least = error
                best = (rows, columns)
    return best


def most_cells(area: float) -> int:
    """The most cells that a side of a rectangle may have, for an input of ``area`` cells."""
    return max(int(LARGEST * area / LEAST_CELLS), LEAST_CELLS)


class Preprocessing:
    """RGB picture -> float32 array (3, H, W), the same numbers as timm's evaluation transform to the last bit.

    Parameters
    ----------
    config : mapping
        ``input_size`` (3, height, width), ``interpolation``, ``mean``, ``std``, ``crop_pct`` and ``crop_mode``, as timm
        uses them: ``center``, ``squash`` or ``border``. ``rectangle`` shows the whole picture in nearly its shape
        (:func:`rectangle`); ``input_size`` then says how large rectangles are.
    area : float, optional
        That rectangles are near to, in pixels. Default: height x width of ``input_size``.

    Examples
    --------
    >>> config = {"input_size": (3, 224, 224), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    >>> prepare = Preprocessing(config | {"crop_mode": "rectangle"})
    >>> prepare(Image.new("RGB", (900, 300))).shape
    (3, 128, 384)
    """

    def __init__(self, config: Mapping[str, Any], area: float | None = None) -> None:
        _, height, width = config["input_size"]
        self.size = (height, width)
        self.area = area or height * width
        self.crop_mode = config.get("crop_mode") or "center"

        share = config.get("crop_pct") or _CROP_SHARE
        self._scaled = (math.floor(height / share), math.floor(width / share))
        self._filter = Image.Resampling[config["interpolation"].upper()]
        self._mean = np.array(config["mean"], dtype=np.float32)[:, None, None]
        self._std = np.array(config["std"], dtype=np.float32)[:, None, None]
        self._border = tuple(round(255 * value) for value in config["mean"])

    def draft(self, width: int, height: int) -> tuple[int, int]:
        """The least width and height at which a JPEG of this width and height may be decoded.

        Where the whole picture is shown, that is 3.5 times what is made of it, and at least 512; otherwise its own.
        """
        if not self._shows_all:
            return width, height
        rows, columns = self._whole(width, height)
        return max(SHOWN, math.ceil(REDUCED * columns)), max(SHOWN, math.ceil(REDUCED * rows))

    def __call__(self, picture: Image.Image, box: Box | None = None) -> np.ndarray:
        """RGB picture -> (3, H, W) float32.

        Parameters
        ----------
        picture : PIL image
        box : (left, top, right, bottom), optional
            Of a picture decoded at reduced size: where in it the whole lies.

        Returns
        -------
        ndarray of shape (3, H, W)
        """
        values = np.array(self._fitted(picture, box), dtype=np.float32).transpose(2, 0, 1)
        pixels = np.ascontiguousarray(values)
        pixels /= 255
        pixels -= self._mean
        pixels /= self._std
        return pixels

    @property
    def _shows_all(self) -> bool:
        return self.crop_mode == "rectangle" or (self.crop_mode == "squash" and self._scaled == self.size)

    def _whole(self, width: float, height: float) -> tuple[int, int]:
        """Height and width of what is made of all of a picture."""
        return rectangle(width, height, self.area) if self.crop_mode == "rectangle" else self.size

    def _fitted(self, picture: Image.Image, box: Box | None) -> Image.Image:
        """The picture as the crop mode wants it, of the network's size."""
        if self._shows_all:
            left, top, right, bottom = box or (0, 0, *picture.size)
            return self._resized(picture, self._whole(right - left, bottom - top), box)
        if self.crop_mode == "squash":
            return _centred(self._resized(picture, self._scaled), self.size)
        if self.crop_mode == "border":
            return _centred(self._resized(picture, self._inside(picture)), self.size, self._border)
        return _centred(self._resized(picture, self._around(picture)), self.size)

    def _resized(self, picture: Image.Image, size: Sequence[int], box: Box | None = None) -> Image.Image:
        height, width = size
        return picture.resize((width, height), self._filter, box)

    def _inside(self, picture: Image.Image) -> tuple[int, int]:
        """Height and width that just fit into the scaled input."""
        ratio = max(picture.height / self._scaled[0], picture.width / self._scaled[1])
        return round(picture.height / ratio), round(picture.width / ratio)

    def _around(self, picture: Image.Image) -> tuple[int, int]:
        """Height and width that just cover the scaled input."""
        height, width = self._scaled
        if height != width:
            ratio = min(picture.height / height, picture.width / width)
            return round(picture.height / ratio), round(picture.width / ratio)
        if picture.width <= picture.height:
            return int(width * picture.height / picture.width), width
        return height, int(height * picture.width / picture.height)


def _centred(picture: Image.Image, size: Sequence[int], border: tuple[int, ...] = (0, 0, 0)) -> Image.Image:
    """The middle of a picture; one that is too small gets a border."""
    height, width = size
    if picture.size == (width, height):
        return picture
    canvas = Image.new("RGB", (width, height), border)
    canvas.paste(picture, (-_cut(picture.width, width), -_cut(picture.height, height)))
    return canvas


def _cut(side: int, wanted: int) -> int:
    """Pixels that are cut off before the middle of a side; below 0: how many are added."""
    if side < wanted:
        return -((wanted - side) // 2)
    return round((side - wanted) / 2)

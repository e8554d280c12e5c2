"""How much of a picture a network sees: all of it, or timm's centre crop.

In: a network and its preprocessing, as timm describes it. Out: preprocessing for a view, under timm's names, with one
more crop mode: ``rectangle``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..data.decoding import Transform
from ..exceptions import UsageError, did_you_mean
from .hooks import channels_first, pool

#: Views by name. ``whole`` is ``rectangle`` for networks that take any size, and ``squash`` for the others.
VIEWS = ("whole", "rectangle", "squash", "crop")
#: Sides of rectangles are multiples of it, in pixels: most networks shrink images by this factor.
CELL = 32
#: Cells that a side has at least: one is too few for networks with large kernels, and for exported files.
LEAST_CELLS = 2
#: A rectangle has at most this share of the input's area: a very thin picture must not cost much more than others.
LARGEST = 1.25
# Filters by timm's names.
_FILTERS = {
    name.lower(): Image.Resampling[name] for name in ("NEAREST", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")
}


def check_view(view: object, size: object, own: bool = False) -> None:
    """Refuse a view of another name, a wrong size, and either for a module of the user's own (``UsageError``)."""
    if view not in VIEWS:
        hint = did_you_mean(view, list(VIEWS)) if isinstance(view, str) else ""
        raise UsageError(f"view must be one of {', '.join(VIEWS)}, not {view!r}{hint}", argument="view")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise UsageError(f"size must be a whole number above 0, not {size!r}", argument="size")

    for name, is_set in (("view", view != VIEWS[0]), ("size", size is not None)):
        if own and is_set:
            problem = f"{name} is for backbones by name: a module sees what its transform makes of a picture"
            raise UsageError(problem, argument=name)


def rectangle(width: int, height: int, area: float) -> tuple[int, int]:
    """The rectangle for a picture: about as large as the input, in about the picture's shape.

    Its sides are multiples of 32 pixels, at least 64. Of all rectangles with at most 1.25 x ``area`` it is the one with
    the least log(aspect / aspect of the picture)^2 + log(its area / ``area``)^2; of equal ones the smaller.

    Parameters
    ----------
    width, height : int
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


class Rectangle:
    """Preprocessing that shows the whole picture, as a rectangle of nearly its shape; see :func:`rectangle`.

    Parameters
    ----------
    config : mapping
        As timm's, with ``crop_mode="rectangle"``. ``input_size`` says how large rectangles are.

    Examples
    --------
    >>> config = {"input_size": (3, 224, 224), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    >>> Rectangle(config)(Image.new("RGB", (900, 300))).shape
    torch.Size([3, 128, 384])
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)
        _, height, width = config["input_size"]
        self.area = height * width
        self._squashes: dict[tuple[int, int], Transform] = {}

    def __call__(self, picture: Image.Image) -> Tensor:
        """RGB picture -> (3, H, W) tensor."""
        size = rectangle(*picture.size, self.area)
        if size not in self._squashes:
            self._squashes[size] = make_transform(_squashed(self.config) | {"input_size": (3, *size)})
        return self._squashes[size](picture)


class Squash:
    """Preprocessing that shows the whole picture in the input's shape: bit by bit what timm's gives.

    timm takes seconds to import.

    Parameters
    ----------
    config : mapping
        As timm's: ``input_size``, ``interpolation`` (any but ``random``), ``mean`` and ``std``.

    Examples
    --------
    >>> config = {"input_size": (3, 64, 96), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    >>> Squash(config)(Image.new("RGB", (900, 300))).shape
    torch.Size([3, 64, 96])
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        _, self.height, self.width = config["input_size"]
        self.filter = _FILTERS[config["interpolation"]]
        self.mean = torch.tensor(config["mean"])[:, None, None]
        self.std = torch.tensor(config["std"])[:, None, None]

    def __call__(self, picture: Image.Image) -> Tensor:
        """RGB picture -> (3, H, W) tensor."""
        resized = np.array(picture.resize((self.width, self.height), self.filter))
        pixels = torch.from_numpy(resized).permute(2, 0, 1).contiguous()
        return pixels.float().div_(255).sub_(self.mean).div_(self.std)


def preprocessing(model: nn.Module, config: Mapping[str, Any], view: str, tag: str) -> dict[str, Any]:
    """Preprocessing of a network for a view.

    Parameters
    ----------
    model : nn.Module
        In eval mode.
    config : mapping
        The network's own preprocessing, as timm describes it.
    view : str
        One of ``VIEWS``.
    tag : str
        What the network is called in errors.

    Returns
    -------
    dict
        As ``config``; ``crop_mode`` is ``rectangle`` or ``squash`` for views of the whole picture.

    Raises
    ------
    UsageError
        Rectangles for a network that takes images of one size only.
    """
    if view == "crop":
        return dict(config)
    if view != "squash":
        _, height, width = config["input_size"]
        if takes_any_size(model, height * width):
            return _squashed(config) | {"crop_mode": "rectangle"}
        if view == "rectangle":
            raise UsageError(f"{tag} takes images of one size only: use the view squash", argument="view")
    return _squashed(config)


def _squashed(config: Mapping[str, Any]) -> dict[str, Any]:
    return dict(config) | {"crop_mode": "squash", "crop_pct": 1.0}


def make_transform(config: Mapping[str, Any]) -> Transform:
    """Preprocessing as a function: RGB picture -> (3, H, W) tensor."""
    if config["crop_mode"] == "rectangle":
        return Rectangle(config)
    squashes = config["crop_mode"] == "squash" and config["crop_pct"] == 1
    return Squash(config) if squashes and config["interpolation"] in _FILTERS else _timm_transform(config)


def _timm_transform(config: Mapping[str, Any]) -> Transform:
    from timm.data import create_transform

    transform: Transform = create_transform(**config, is_training=False)
    return transform


def view_of(config: Mapping[str, Any]) -> str:
    """The view that preprocessing gives: ``rectangle``, ``squash`` or ``crop``."""
    if config["crop_mode"] == "squash" and config["crop_pct"] != 1:
        return "crop"
    return config["crop_mode"] if config["crop_mode"] in VIEWS else "crop"


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Preprocessing as the arguments of ``load_backbone`` that give it again, whatever timm says of the network then.

    Returns
    -------
    dict
        ``view``, ``size`` (None unless the input is square), and ``transform``: the rest.
    """
    view = view_of(config)
    _, height, width = config["input_size"]
    left_out = {"input_size"} if height == width else set()
    if view != "crop":
        left_out |= {"crop_mode", "crop_pct"}
    transform = {key: value for key, value in config.items() if key not in left_out}
    return {"view": view, "size": height if height == width else None, "transform": transform}


def in_words(settings: Mapping[str, Any]) -> str:
    """What is seen of a picture, like ``whole picture, about 224 x 224 pixels``.

    Parameters
    ----------
    settings : mapping
        From :func:`settings_of`.
    """
    side = settings["size"]
    height, width = (side, side) if side else settings["transform"]["input_size"][1:]
    size = f"{height} x {width} pixels"
    words = {
        "rectangle": f"whole picture, about {size}",
        "squash": f"whole picture, squashed to {size}",
        "crop": f"cropped to {size}",
    }
    return words[settings["view"]]


def takes_any_size(model: nn.Module, area: float) -> bool:
    """Whether a network takes rectangles of about ``area`` pixels; found out by trying a thin and a common one."""
    cells = area / CELL**2
    if cells < LEAST_CELLS**2:
        return False
    thin = (LEAST_CELLS * CELL, most_cells(cells) * CELL)
    common = rectangle(2, 3, area)
    widths = {_width(model, *size) for size in (thin, common)}
    return len(widths) == 1 and None not in widths


def takes_size(model: nn.Module, height: int, width: int) -> bool:
    """Whether a network takes images of this size; found out by trying."""
    return _width(model, height, width) is not None


@torch.inference_mode()
def _width(model: nn.Module, height: int, width: int) -> int | None:
    """How many numbers a network in eval mode gives for a random image; None if it fails or gives NaN."""
    pixels = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    try:
        output = pool(channels_first(model(pixels), model, model))
    except Exception:  # networks fail in many ways on a size they were not made for
        return None
    return output.shape[1] if output.isfinite().all() else None

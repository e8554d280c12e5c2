"""Which part of a picture the network sees, and a map over what it sees -> a map over the picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..data.decoding import Transform
from .views import view_of

# Of a ramp from 0 to 1: what rounding to 8 bits and interpolation may add, and the least contrast that is left of it.
_BENT = 0.01
_FAINT = 1e-3


class Box(NamedTuple):
    """The part of a picture that the network sees, as shares of the picture's width and height.

    Parameters
    ----------
    left, top, right, bottom : float
        0 is the picture's left or upper edge, 1 its right or lower one. Beyond that lies padding.
    """

    left: float = 0.0
    top: float = 0.0
    right: float = 1.0
    bottom: float = 1.0


def seen_box(config: Mapping[str, Any], width: int, height: int) -> Box:
    """What preprocessing shows of a picture.

    Parameters
    ----------
    config : mapping
        As timm's, with featdiff's ``crop_mode="rectangle"``; see :func:`featdiff.features.views.preprocessing`.
    width, height : int
        Of the upright picture, in pixels.

    Returns
    -------
    Box

    Examples
    --------
    >>> config = {"input_size": (3, 224, 224), "crop_mode": "center", "crop_pct": 1.0}
    >>> seen_box(config, width=896, height=448)
    Box(left=0.25, top=0.0, right=0.75, bottom=1.0)
    >>> seen_box(config | {"crop_mode": "squash"}, width=896, height=448)
    Box(left=0.0, top=0.0, right=1.0, bottom=1.0)
    """
    if view_of(config) != "crop":
        return Box()
    _, rows, columns = config["input_size"]
    resized = _resized(config, width, height)
    left, right = _middle(resized[0], columns)
    top, bottom = _middle(resized[1], rows)
    return Box(left, top, right, bottom)


def _resized(config: Mapping[str, Any], width: int, height: int) -> tuple[int, int]:
    """Width and height that timm brings a picture to before it takes the middle of it."""
    _, rows, columns = config["input_size"]
    mode = config["crop_mode"]
    aim_height = math.floor(rows / config["crop_pct"])
    aim_width = math.floor(columns / config["crop_pct"])
    if mode == "squash":
        return aim_width, aim_height

    if mode != "border" and aim_width == aim_height:  # the short side becomes that long
        long = int(aim_width * max(width, height) / min(width, height))
        return (aim_width, long) if width <= height else (long, aim_width)
    ratios = (width / aim_width, height / aim_height)
    ratio = max(ratios) if mode == "border" else min(ratios)
    return round(width / ratio), round(height / ratio)


def _middle(length: int, wanted: int) -> tuple[float, float]:
    """Where the middle ``wanted`` of so many pixels begins and ends, as shares; below 0 where it is padded."""
    start = round((length - wanted) / 2) if length >= wanted else -((wanted - length) // 2)
    return start / length, (start + wanted) / length


def probed_box(transform: Transform, width: int, height: int) -> Box | None:
    """The same for any preprocessing: found out by showing it pictures whose colours count columns and rows.

    Parameters
    ----------
    transform : callable
        RGB picture -> (3, H, W) tensor.
    width, height : int
        Of the picture, in pixels.

    Returns
    -------
    Box or None
        None if what comes out is no upright part of the picture, in its own shape or squashed.

    Examples
    --------
    >>> import torch
    >>> def middle(picture):
    ...     pixels = torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1)
    ...     return pixels[:, :, 100:300]
    >>> box = probed_box(middle, width=400, height=100)
    >>> [round(edge, 2) for edge in box]
    [0.25, 0.0, 0.75, 1.0]
    """
    across = np.linspace(0, 255, width).round()[None].repeat(height, 0)
    down = np.linspace(0, 255, height).round()[:, None].repeat(width, 1)
    try:
        black, white, columns, rows = (
            transform(Image.fromarray(np.repeat(ramp[..., None], 3, axis=2).astype(np.uint8))).double().mean(0)
            for ramp in (0 * across, 0 * across + 255, across, down)
        )
    except Exception:  # a function of the user's own
        return None
    if black.dim() != 2 or columns.shape != black.shape or bool((white - black).abs().min() < _FAINT):
        return None

    found = []
    for ramp, length, axis in ((columns, width, 0), (rows, height, 1)):
        share = ((ramp - black) / (white - black)).numpy()
        centres = (share.mean(axis) * (length - 1) + 0.5) / length
        turned = np.abs(share - share.mean(axis, keepdims=True)).max() > _BENT
        edges = _line_through(centres, length)
        if turned or edges is None:
            return None
        found.append(edges)
    (left, right), (top, bottom) = found
    return Box(left, top, right, bottom)


def _line_through(centres: np.ndarray, length: int) -> tuple[float, float] | None:
    """Where the first pixel begins and the last ends, if pixels lie evenly; None if they do not.

    Parameters
    ----------
    centres : ndarray of shape (n,)
        Of the pixels of the input, as shares of the picture's side.
    length : int
        Of that side, in pixels.
    """
    count = len(centres)
    if count < 2 or length < 2:
        return 0.0, 1.0
    places = np.arange(count) + 0.5
    inner = slice(count // 8, count - count // 8)  # interpolation bends a line at its ends
    slope, start = np.polyfit(places[inner], centres[inner], 1)
    bent = np.abs(start + slope * places - centres)[inner].max()
    if slope <= 0 or bent > _BENT:
        return None

    # whole pictures end at their edges, not a rounding beside them
    near = max(_BENT, 0.5 / length)
    first = float(start)
    last = float(start + slope * count)
    return (0.0 if abs(first) < near else first, 1.0 if abs(last - 1) < near else last)


def onto_picture(values: np.ndarray, box: Box, width: int, height: int) -> np.ndarray:
    """A map over the network's input -> the same over the picture, interpolated linearly.

    Parameters
    ----------
    values : ndarray of shape (h, w)
        Cells of equal size that cover the input.
    box : Box
        What of the picture the input shows.
    width, height : int
        Of the picture, in pixels; any resolution of it.

    Returns
    -------
    ndarray of shape (height, width), float32
        Within the range of ``values``; NaN where the network saw nothing.

    Examples
    --------
    >>> onto_picture(np.array([[0.0, 1.0]]), Box(left=0.5), width=4, height=1)
    array([[nan, nan,  0.,  1.]], dtype=float32)
    """
    down, seen_rows = _weights(height, values.shape[0], box.top, box.bottom)
    across, seen_columns = _weights(width, values.shape[1], box.left, box.right)

    picture = down @ values.astype(np.float64) @ across.T
    picture = picture.clip(values.min(), values.max()).astype(np.float32)  # rounding must not lead beyond
    picture[~seen_rows] = np.nan
    picture[:, ~seen_columns] = np.nan
    return picture


def _weights(pixels: int, cells: int, start: float, end: float) -> tuple[np.ndarray, np.ndarray]:
    """What each cell counts at each pixel (pixels, cells), and which pixels lie between ``start`` and ``end``."""
    centres = (np.arange(pixels) + 0.5) / pixels
    position = ((centres - start) / (end - start) * cells - 0.5).clip(0, cells - 1)
    lower = np.floor(position).astype(int).clip(0, max(0, cells - 2))
    share = position - lower

    weights = np.zeros((pixels, cells))
    index = np.arange(pixels)
    weights[index, lower] = 1 - share
    weights[index, np.minimum(lower + 1, cells - 1)] += share
    return weights, (centres >= start) & (centres <= end)

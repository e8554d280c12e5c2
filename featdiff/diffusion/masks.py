"""Which pixels of an image stay known while the rest is inpainted. Pure functions; True = known."""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..exceptions import UsageError, did_you_mean

#: Kinds of masks besides a picture of one's own.
MASKS = ("checkerboard_alt", "checkerboard", "center", "random")


def checkerboard(size: int, blocks: int, odd: bool = False) -> Tensor:
    """A board of ``blocks`` x ``blocks`` cells whose first cell is known: (size, size) bool.

    ``odd`` inverts it: two boards, one of each kind, leave no pixel unseen.

    Raises
    ------
    UsageError
        The blocks do not divide the image.
    """
    _check_divides("mask_blocks", blocks, size)
    cell = torch.arange(size) // (size // blocks)
    return (cell[:, None] + cell[None, :]) % 2 == int(odd)


def center(size: int) -> Tensor:
    """The middle half of each side is unknown, a quarter of the image: (size, size) bool."""
    known = torch.ones(size, size, dtype=torch.bool)
    quarter = size // 4
    known[quarter : size - quarter, quarter : size - quarter] = False
    return known


def random_patches(size: int, patch: int, ratio: float, source: torch.Generator) -> Tensor:
    """Square patches of ``patch`` pixels, of which the share ``ratio`` (rounded up) is unknown: (size, size) bool.

    Raises
    ------
    UsageError
        The patches do not divide the image, or a ratio outside 0 .. 1.
    """
    _check_divides("mask_patch", patch, size)
    if not 0 < ratio < 1:
        raise UsageError(f"mask_ratio must lie between 0 and 1, not {ratio!r}")
    side = size // patch
    unknown = math.ceil(ratio * side * side)
    known = torch.ones(side * side, dtype=torch.bool)
    known[torch.randperm(side * side, generator=source)[:unknown]] = False
    return known.reshape(side, side).repeat_interleave(patch, 0).repeat_interleave(patch, 1)


def from_picture(file: str | os.PathLike[str], size: int) -> Tensor:
    """A picture of ``size`` x ``size`` pixels, or of a size that divides it: bright (128 and more) = known.

    Raises
    ------
    UsageError
        It cannot be read, or its size does not fit.
    """
    try:
        picture = np.asarray(Image.open(file).convert("L"))
    except UnidentifiedImageError:
        raise UsageError(f"the mask {file} is not an image") from None
    except OSError as error:
        raise UsageError(f"the mask {file} cannot be read: {error.strerror or error}") from None
    height, width = picture.shape
    if height != width or height == 0 or size % height:
        raise UsageError(
            f"the mask {file} has {width} x {height} pixels and the images {size} x {size}: it must be square, "
            f"and its side must divide {size}"
        )
    known = torch.from_numpy(picture >= 128).repeat_interleave(size // height, 0)
    return known.repeat_interleave(size // height, 1)


def make_masks(
    kind: str, size: int, repetitions: int, *, blocks: int = 8, patch: int = 4, ratio: float = 0.5, seed: int = 0
) -> Tensor:
    """One mask for each repetition: (repetitions, size, size) bool, True = known.

    Parameters
    ----------
    kind : one of ``MASKS``, or the path of a picture
        ``checkerboard_alt`` inverts the board on odd repetitions (LMD's default, with 8 blocks); ``random`` draws a
        mask for each repetition, from ``seed`` alone: the same for all images, so that a score depends on no other.
    blocks, patch, ratio
        Cells along a side of a checkerboard; side of a random patch in pixels, and the share of them that is unknown.

    Raises
    ------
    UsageError
        An unknown kind, one that does not fit the image, or one that leaves nothing to fill in or to go by.
    """
    source = torch.Generator().manual_seed(seed)
    if kind in ("checkerboard", "checkerboard_alt"):
        alternate = kind == "checkerboard_alt"
        masks = [checkerboard(size, blocks, alternate and i % 2 == 1) for i in range(repetitions)]
    elif kind == "center":
        masks = [center(size)] * repetitions
    elif kind == "random":
        masks = [random_patches(size, patch, ratio, source) for _ in range(repetitions)]
    elif os.path.exists(kind):
        masks = [from_picture(kind, size)] * repetitions
    else:
        known = ", ".join(MASKS)
        raise UsageError(f"no mask {kind!r}{did_you_mean(kind, list(MASKS))}; known: {known}, or the path of a picture")
    for mask in masks:
        if mask.all() or not mask.any():
            raise UsageError(
                f"the mask {kind} leaves nothing to {'fill in' if mask.all() else 'go by'} at {size} pixels"
            )
    return torch.stack(masks)


def _check_divides(name: str, value: int, size: int) -> None:
    """``value`` cells, or cells of ``value`` pixels: at least two along a side, and nothing left over."""
    fitting = [n for n in range(1, size + 1) if size % n == 0]
    fitting = fitting[:-1] if name == "mask_patch" else fitting[1:]
    if value not in fitting or isinstance(value, bool):
        possible = ", ".join(map(str, fitting))
        raise UsageError(f"{name} {value!r} does not divide an image of {size} pixels; possible: {possible}")

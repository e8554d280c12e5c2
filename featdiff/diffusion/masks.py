"""Kinds of masks -> which pixels of an image stay known while the rest is inpainted. In all masks, True = known."""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..exceptions import UsageError, did_you_mean

#: Kinds of masks; the path of a picture is possible as well.
MASKS = ("checkerboard_alt", "checkerboard", "center", "random")


def checkerboard(size: int, blocks: int, odd: bool = False) -> Tensor:
    """A checkerboard whose first cell is known.

    Parameters
    ----------
    size : int
        Side of the image in pixels.
    blocks : int
        Number of cells along a side.
    odd : bool, default False
        Invert the board. Two boards, one of each kind, cover every pixel.

    Returns
    -------
    bool Tensor of shape (size, size)

    Raises
    ------
    UsageError
        The number of cells does not divide the side of the image.

    Examples
    --------
    >>> checkerboard(4, blocks=2).int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    """
    _check_divides("mask_blocks", blocks, size)
    cell = torch.arange(size) // (size // blocks)
    return (cell[:, None] + cell[None, :]) % 2 == int(odd)


def center(size: int) -> Tensor:
    """A mask in which the middle half of each side is unknown: a quarter of the image.

    Parameters
    ----------
    size : int
        Side of the image in pixels.

    Returns
    -------
    bool Tensor of shape (size, size)
    """
    quarter = size // 4
    mask = torch.ones(size, size, dtype=torch.bool)
    mask[quarter : size - quarter, quarter : size - quarter] = False
    return mask


def random_patches(size: int, patch: int, ratio: float, generator: torch.Generator) -> Tensor:
    """A mask of square patches, some of which are unknown.

    Parameters
    ----------
    size : int
        Side of the image in pixels.
    patch : int
        Side of a patch in pixels.
    ratio : float
        Share of the patches that is unknown, above 0 and below 1; their number is rounded up.
    generator : torch.Generator
        Decides which patches are unknown.

    Returns
    -------
    bool Tensor of shape (size, size)

    Raises
    ------
    UsageError
        Patches that do not divide the side of the image, or a ratio outside its range.
    """
    _check_divides("mask_patch", patch, size)
    if not 0 < ratio < 1:
        raise UsageError(f"mask_ratio must lie between 0 and 1, not {ratio!r}", argument="mask_ratio")

    side = size // patch
    unknown = math.ceil(ratio * side * side)
    patches = torch.ones(side * side, dtype=torch.bool)
    patches[torch.randperm(side * side, generator=generator)[:unknown]] = False
    return patches.reshape(side, side).repeat_interleave(patch, 0).repeat_interleave(patch, 1)


def from_picture(file: str | os.PathLike[str], size: int) -> Tensor:
    """A mask from a picture: bright pixels (128 and more) are known.

    Parameters
    ----------
    file : path
        A square picture, of the size of the images or of a size that divides it.
    size : int
        Side of the images in pixels.

    Returns
    -------
    bool Tensor of shape (size, size)

    Raises
    ------
    UsageError
        The picture cannot be read, or its size does not fit.
    """
    try:
        picture = np.asarray(Image.open(file).convert("L"))
    except UnidentifiedImageError:
        raise UsageError(f"the mask {file} is not an image", argument="mask") from None
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"the mask {file} cannot be read: {reason}", argument="mask") from None

    height, width = picture.shape
    if height != width or height == 0 or size % height:
        raise UsageError(
            f"the mask {file} has {width} x {height} pixels and the images {size} x {size}: it must be square, "
            f"and its side must divide {size}",
            argument="mask",
        )
    scale = size // height
    return torch.from_numpy(picture >= 128).repeat_interleave(scale, 0).repeat_interleave(scale, 1)


def make_masks(
    kind: str,
    size: int,
    repetitions: int,
    *,
    blocks: int = 8,
    patch: int = 4,
    ratio: float = 0.5,
    seed: int = 0,
) -> Tensor:
    """One mask for each repetition of the inpainting.

    Parameters
    ----------
    kind : str
        One of ``MASKS``, or the path of a picture. ``checkerboard_alt`` inverts the board on odd repetitions (LMD's
        default, with 8 blocks). ``random`` draws another mask for each repetition; they are the same for all images, so
        that a score does not depend on other images.
    size : int
        Side of the images in pixels.
    repetitions : int
        Number of masks.
    blocks : int, default 8
        Number of cells along a side of a checkerboard.
    patch : int, default 4
        Side of a random patch in pixels.
    ratio : float, default 0.5
        Share of the random patches that is unknown.
    seed : int, default 0
        Decides the random patches.

    Returns
    -------
    bool Tensor of shape (repetitions, size, size)
        True where a pixel is known.

    Raises
    ------
    UsageError
        An unknown kind, a mask that does not fit the images, or one in which all pixels or none are known.

    Examples
    --------
    >>> make_masks("checkerboard_alt", size=32, repetitions=10).shape
    torch.Size([10, 32, 32])
    """
    if kind in ("checkerboard", "checkerboard_alt"):
        alternate = kind == "checkerboard_alt"
        masks = [checkerboard(size, blocks, odd=alternate and i % 2 == 1) for i in range(repetitions)]
    elif kind == "center":
        masks = [center(size)] * repetitions
    elif kind == "random":
        generator = torch.Generator().manual_seed(seed)
        masks = [random_patches(size, patch, ratio, generator) for _ in range(repetitions)]
    elif os.path.exists(kind):
        masks = [from_picture(kind, size)] * repetitions
    else:
        hint = did_you_mean(kind, list(MASKS))
        raise UsageError(
            f"no mask {kind!r}{hint}; known: {', '.join(MASKS)}, or the path of a picture", argument="mask"
        )

    for mask in masks:
        if mask.all():
            raise UsageError(f"the mask {kind} leaves nothing to fill in at {size} pixels", argument="mask")
        if not mask.any():
            raise UsageError(f"the mask {kind} leaves nothing to go by at {size} pixels", argument="mask")
    return torch.stack(masks)


def _check_divides(name: str, value: int, size: int) -> None:
    """Check that a number of cells, or of pixels in a cell, divides the image into two cells or more along a side."""
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    allowed = divisors[:-1] if name == "mask_patch" else divisors[1:]
    if value not in allowed or isinstance(value, bool):
        possible = ", ".join(map(str, allowed))
        raise UsageError(
            f"{name} {value!r} does not divide an image of {size} pixels; possible: {possible}", argument=name
        )

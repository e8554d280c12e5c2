"""Image references -> small pictures for people, decoded no larger than needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .batches import iter_loaded
from .decoding import MAX_PIXELS
from .image_refs import ImageRef
from .limits import MAX_BYTES


def iter_thumbnails(
    refs: Iterable[ImageRef],
    side: int,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> Iterator[Image.Image | None]:
    """Decode images on several threads and shrink them.

    Parameters
    ----------
    refs : iterable of ImageRef
        Archives that can only be read front to back want their own order.
    side : int
        The longest side of a small picture, in pixels; smaller ones stay as they are.
    workers : int, optional
        Threads; by default one per CPU that this process may use, at most 16.
    max_pixels, max_bytes : int
        Larger images are not opened, larger files not read.

    Yields
    ------
    PIL image or None
        RGB, upright, in the order of ``refs``; None for an image that cannot be read.

    Examples
    --------
    >>> from PIL import Image
    >>> from featdiff.data.references import list_images
    >>> from featdiff.data.thumbnails import iter_thumbnails
    >>> [small.size for small in iter_thumbnails(list_images(Image.new("L", (400, 200))), side=100)]
    [(100, 50)]
    """
    for item in iter_loaded(refs, _Shrink(side), workers, max_pixels, max_bytes=max_bytes):
        yield None if item.pixels is None else Image.fromarray(item.pixels.numpy())


class _Shrink:
    """A transform, in the sense of :mod:`featdiff.data.batches`: RGB picture -> a small one, (H, W, 3) uint8."""

    def __init__(self, side: int) -> None:
        self.side = side

    def draft(self, width: int, height: int) -> tuple[int, int]:
        return self.side, self.side

    def __call__(self, picture: Image.Image, box: object = None) -> Tensor:  # a fraction of a pixel is not seen
        small = picture.copy()
        small.thumbnail((self.side, self.side), Image.Resampling.BICUBIC, reducing_gap=2.0)
        return torch.from_numpy(np.array(small))

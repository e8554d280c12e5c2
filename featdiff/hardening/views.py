"""Augmented views of an image for training: mirrored and cropped at random, yet the same each time for the same image.

In: an RGB image. Out: a (3, H, W) tensor.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from PIL import Image
from torch import Tensor

from ..data.decoding import Transform
from ..exceptions import UsageError

#: Share of the image's area that a crop has.
AREA = (0.6, 1.0)
#: Largest change of a crop's aspect ratio.
STRETCH = 4 / 3


class View:
    """A numbered augmentation, followed by a transform.

    Number 0 is the image itself and 1 its mirror image. Every further number is a crop of 60 to 100 % of the area,
    resized to the size of the image, with the aspect ratio changed by 3:4 to 4:3 (similar to Szegedy et al., arXiv
    1409.4842, section 6), and mirrored in half of all cases. The crop depends only on the number and the pixels of the
    image. So a view can be cached, whatever was drawn before it and on whichever thread.

    Parameters
    ----------
    number : int
        0 or more.
    then : callable
        RGB image -> (3, H, W) tensor.

    Attributes
    ----------
    name : str
        For cache keys: ``view <number>``, empty for number 0.

    Raises
    ------
    UsageError
        A number below 0.

    Examples
    --------
    >>> import torch
    >>> def to_tensor(image):
    ...     return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    >>> image = Image.fromarray(np.array([[[1, 1, 1], [2, 2, 2]]], dtype=np.uint8))
    >>> View(1, to_tensor)(image)[0].tolist()
    [[2, 1]]
    """

    def __init__(self, number: int, then: Transform) -> None:
        if number < 0:
            raise UsageError(f"views are numbered from 0, not {number}")
        self.number = number
        self.then = then
        self.name = f"view {number}" if number else ""

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB image -> (3, H, W) tensor."""
        if self.number == 1:
            image = _mirrored(image)
        elif self.number > 1:
            image = self._crop(image)
        return self.then(image)

    def _crop(self, image: Image.Image) -> Image.Image:
        seed = hashlib.blake2b(f"{self.number} {image.size}".encode() + image.tobytes(), digest_size=16).digest()
        rng = np.random.default_rng(int.from_bytes(seed))

        area = rng.uniform(*AREA)
        limit = min(math.log(STRETCH), -math.log(area))  # neither side may exceed that of the image
        stretch = math.exp(rng.uniform(-limit, limit))
        width = image.width * math.sqrt(area * stretch)
        height = image.height * math.sqrt(area * (1 / stretch))

        left = rng.uniform(0, image.width - width)
        top = rng.uniform(0, image.height - height)
        box = (left, top, left + width, top + height)
        crop = image.resize(image.size, Image.Resampling.BICUBIC, box=box)
        return _mirrored(crop) if rng.random() < 0.5 else crop


def _mirrored(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

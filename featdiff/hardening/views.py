"""Further views of a picture for training, mirrored and cut out: random, yet always the same for the same picture."""

from __future__ import annotations

import hashlib
import math

import numpy as np
from PIL import Image
from torch import Tensor

from ..data.decoding import Transform
from ..exceptions import UsageError

#: How much of a picture's area a cut-out has, and by how much its sides may be stretched against each other.
AREA = (0.6, 1.0)
STRETCH = 4 / 3


class View:
    """A picture, changed in a way that has a number, then transformed.

    Number 0 is the picture itself and 1 its mirror image. Every further number is a cut-out of 60 to 100 % of the area,
    resized to the picture's own size, whose sides change by a ratio of 3:4 to 4:3 (in the manner of Szegedy et al.,
    arXiv 1409.4842, section 6), and in half of all cases mirrored. What is cut out follows from the number and the
    picture's pixels alone, so that a view can be kept and found again, whatever was drawn before it on whatever thread.

    Parameters
    ----------
    number : int
        0 or more.
    then : callable
        RGB picture -> (3, H, W) tensor.

    Attributes
    ----------
    name : str
        For keys of what is kept: ``view <number>``, empty for number 0.

    Raises
    ------
    UsageError
        A number below 0.
    """

    def __init__(self, number: int, then: Transform) -> None:
        if number < 0:
            raise UsageError(f"views are numbered from 0, not {number}")
        self.number, self.then = number, then
        self.name = f"view {number}" if number else ""

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB picture -> (3, H, W)."""
        if self.number == 1:
            image = _mirrored(image)
        elif self.number > 1:
            image = self._cut_out(image)
        return self.then(image)

    def _cut_out(self, image: Image.Image) -> Image.Image:
        seed = hashlib.blake2b(f"{self.number} {image.size}".encode() + image.tobytes(), digest_size=16).digest()
        rng = np.random.default_rng(int.from_bytes(seed))
        area = rng.uniform(*AREA)
        limit = min(math.log(STRETCH), -math.log(area))  # neither side becomes longer than the picture's
        stretch = math.exp(rng.uniform(-limit, limit))
        wide, high = (side * math.sqrt(area * by) for side, by in zip(image.size, (stretch, 1 / stretch), strict=True))
        left, top = rng.uniform(0, image.width - wide), rng.uniform(0, image.height - high)
        box = (left, top, left + wide, top + high)
        found = image.resize(image.size, Image.Resampling.BICUBIC, box=box)
        return _mirrored(found) if rng.random() < 0.5 else found


def _mirrored(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

"""Images -> rows of pixels: what stands in for features when a diffusion model works on the images themselves."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.decoding import Transform
from ..exceptions import UsageError


class Pixels:
    """Square images of one size as rows of 8-bit numbers.

    Pictures are resized so that their short side is ``size`` and cut to the middle square; grey ones get equal
    channels. Preprocessed tensors (a loader's) must lie in [-1, 1] and have the size already.

    Parameters
    ----------
    size : side in pixels
    channels : 3, or 1 for grey

    Attributes
    ----------
    width : int
        Length of a row, ``channels * size * size``: channel by channel, line by line.
    """

    def __init__(self, size: int, channels: int) -> None:
        if channels not in (1, 3):
            raise UsageError(f"channels must be 3, or 1 for grey images, not {channels!r}")
        self.size, self.channels = size, channels
        self.width = channels * size * size

    @property
    def transform(self) -> Transform:
        """RGB picture -> (channels, size, size) in [-1, 1]."""
        return self._transform

    def _transform(self, image: Image.Image) -> Tensor:
        width, height = image.size
        if (width, height) != (self.size, self.size):
            short = min(width, height)
            left, top = (width - short) / 2, (height - short) / 2
            square = (left, top, left + short, top + short)
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=square)
        values = np.array(image.convert("RGB" if self.channels == 3 else "L"), dtype=np.float32)
        return torch.from_numpy(values / 127.5 - 1).reshape(self.size, self.size, self.channels).permute(2, 0, 1)

    def key(self, note: str = "") -> str:
        """A name for everything that decides the numbers: size, channels, ``note``."""
        return "-".join([f"{self.channels}x{self.size}x{self.size}", *note.split()])

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, channels, size, size) in [-1, 1] -> (B, ``width``) uint8.

        Raises
        ------
        UsageError
            Another shape, or values outside the range.
        """
        expected = (self.channels, self.size, self.size)
        if tuple(pixels.shape[1:]) != expected:
            raise UsageError(f"the images have shape {tuple(pixels.shape[1:])}, and this detector takes {expected}")
        values = torch.where(pixels.isfinite(), pixels + 1, 0) * 127.5  # what is not finite is found by its own row
        if values.amin() < -0.5 or values.amax() > 255.5:
            raise UsageError("preprocessed images must lie in [-1, 1]")
        return values.round().clamp(0, 255).to(torch.uint8).flatten(1)

    def images(self, rows: Tensor) -> Tensor:
        """Rows (B, ``width``) uint8 -> (B, channels, size, size) in [-1, 1], as they were."""
        return rows.float().div(127.5).sub(1).unflatten(1, (self.channels, self.size, self.size))

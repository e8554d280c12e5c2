"""Images -> rows of 8-bit pixels, which take the place of features where a diffusion model works on images."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.decoding import Transform
from ..exceptions import UsageError


class Pixels:
    """Square images of one size as rows of 8-bit numbers, and back.

    Pictures are resized so that their short side is ``size``, and cropped to the square in the middle. Grey ones get
    equal channels. Preprocessed tensors (from a loader) must lie in [-1, 1] and have that size already.

    Parameters
    ----------
    size : int
        Side of the images in pixels.
    channels : int
        3, or 1 for grey.

    Attributes
    ----------
    width : int
        Length of a row, ``channels * size * size``: channel by channel, line by line.
    device : torch.device
        Where rows are made: the CPU.

    Raises
    ------
    UsageError
        Another number of channels.

    Examples
    --------
    >>> pixels = Pixels(size=8, channels=3)
    >>> rows = pixels(torch.zeros(2, 3, 8, 8))
    >>> rows.shape, rows.dtype
    (torch.Size([2, 192]), torch.uint8)
    >>> pixels.images(rows).shape
    torch.Size([2, 3, 8, 8])
    """

    def __init__(self, size: int, channels: int) -> None:
        if channels not in (1, 3):
            raise UsageError(f"channels must be 3, or 1 for grey images, not {channels!r}", argument="channels")
        self.size = size
        self.channels = channels
        self.width = channels * size * size
        self.device = torch.device("cpu")

    @property
    def transform(self) -> Transform:
        """Function from an RGB picture to a Tensor of shape (channels, size, size) in [-1, 1]."""
        return self._transform

    def _transform(self, image: Image.Image) -> Tensor:
        width, height = image.size
        if (width, height) != (self.size, self.size):
            short = min(width, height)
            left = (width - short) / 2
            top = (height - short) / 2
            square = (left, top, left + short, top + short)
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=square)

        values = np.array(image.convert("RGB" if self.channels == 3 else "L"), dtype=np.float32)
        return torch.from_numpy(values / 127.5 - 1).reshape(self.size, self.size, self.channels).permute(2, 0, 1)

    def key(self, note: str = "") -> str:
        """Name of everything that the pixels depend on: size, channels and ``note``."""
        return "-".join([f"{self.channels}x{self.size}x{self.size}", *note.split()])

    def __call__(self, pixels: Tensor) -> Tensor:
        """Images -> rows.

        Parameters
        ----------
        pixels : Tensor of shape (B, channels, size, size)
            Images in [-1, 1].

        Returns
        -------
        uint8 Tensor of shape (B, width)

        Raises
        ------
        UsageError
            Another shape, or values outside the range.
        """
        expected = (self.channels, self.size, self.size)
        if tuple(pixels.shape[1:]) != expected:
            raise UsageError(f"the images have shape {tuple(pixels.shape[1:])}, and this detector takes {expected}")

        # images that are not finite are reported one by one elsewhere
        values = torch.where(pixels.isfinite(), pixels + 1, 0) * 127.5
        if values.amin() < -0.5 or values.amax() > 255.5:
            raise UsageError("preprocessed images must lie in [-1, 1]")
        return values.round().clamp(0, 255).to(torch.uint8).flatten(1)

    def images(self, rows: Tensor) -> Tensor:
        """Rows -> images, without loss.

        Parameters
        ----------
        rows : uint8 Tensor of shape (B, width)
            As this object returned them.

        Returns
        -------
        Tensor of shape (B, channels, size, size)
            Images in [-1, 1].
        """
        return rows.float().div(127.5).sub(1).unflatten(1, (self.channels, self.size, self.size))

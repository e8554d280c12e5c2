"""Noisy images and their times -> what a diffusers U-Net predicts, by the same call as the other denoisers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from ..exceptions import UsageError

if TYPE_CHECKING:
    from diffusers import UNet2DModel


class PixelDenoiser(nn.Module):
    """A U-Net as a plain function: (B, C, H, W), (B,) -> (B, C, H, W).

    It returns what its noise schedule makes it predict: the noise, or x_0.

    Parameters
    ----------
    unet : UNet2DModel
        The network.

    Examples
    --------
    >>> import torch
    >>> unet = make_unet(16, 3, width=8, multipliers=(1, 2), blocks=1, attention=(), dropout=0.0)
    >>> PixelDenoiser(unet)(torch.zeros(2, 3, 16, 16), torch.tensor([0, 500])).shape
    torch.Size([2, 3, 16, 16])
    """

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Noisy images (B, C, H, W) at integer times (B,) -> the network's prediction, same shape."""
        return cast(Tensor, self.unet(x_t, t).sample)


def make_unet(
    size: int,
    channels: int,
    width: int,
    multipliers: Sequence[int],
    blocks: int,
    attention: Sequence[int],
    dropout: float,
) -> UNet2DModel:
    """An unconditional U-Net (Ho et al., 2020).

    Parameters
    ----------
    size : int
        Side of the images in pixels.
    channels : int
        Number of channels of the images.
    width : int
        Number of channels of the first level (often called "nf").
    multipliers : sequence of int
        One for each level: level i has ``width * multipliers[i]`` channels, and half the side of level i - 1.
    blocks : int
        Number of residual blocks of each level.
    attention : sequence of int
        Sides in pixels of the levels with attention. The middle of the network always has it.
    dropout : float
        Probability of dropout.

    Returns
    -------
    UNet2DModel

    Raises
    ------
    UsageError
        A size that cannot be halved that often, or attention at a side that no level has.
    """
    from diffusers import UNet2DModel

    halvings = len(multipliers) - 1
    if size % 2**halvings:
        raise UsageError(
            f"images of {size} pixels cannot be halved {halvings} times, as multipliers {multipliers} ask for",
            argument="multipliers",
        )
    sides = [size >> level for level in range(len(multipliers))]
    for side in attention:
        if side not in sides:
            levels = ", ".join(map(str, sides))
            raise UsageError(f"attention at {side} pixels: the levels have {levels}", argument="attention")

    widths = [width * multiplier for multiplier in multipliers]
    down_blocks = ["AttnDownBlock2D" if side in attention else "DownBlock2D" for side in sides]
    up_blocks = ["AttnUpBlock2D" if side in attention else "UpBlock2D" for side in reversed(sides)]
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=blocks,
        block_out_channels=widths,
        down_block_types=down_blocks,
        up_block_types=up_blocks,
        norm_num_groups=math.gcd(32, max(1, width // 4), *widths),  # groups of four channels or more
        attention_head_dim=None,  # one head
        dropout=dropout,
    )

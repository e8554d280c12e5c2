"""A diffusers U-Net for pixels behind the same call as the other denoisers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from ..exceptions import UsageError

if TYPE_CHECKING:
    from diffusers import UNet2DModel


class PixelDenoiser(nn.Module):
    """``unet`` as a plain function: (B, C, H, W), (B,) -> (B, C, H, W), whatever its schedule makes it predict."""

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Noisy images at integer times (B,) -> the network's prediction, same shape."""
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
    """An unconditional U-Net in the field's usual words (Ho et al., 2020).

    Parameters
    ----------
    size, channels : side of the images in pixels, and how many channels they have
    width : channels of the first level ("nf"); level i has ``width * multipliers[i]`` and half the side of level i - 1
    blocks : residual blocks for each level
    attention : sides in pixels of the levels that attend; the middle of the network always does

    Raises
    ------
    UsageError
        A size that cannot be halved so often, or attention at a side that no level has.
    """
    from diffusers import UNet2DModel

    halvings = len(multipliers) - 1
    if size % 2**halvings:
        raise UsageError(
            f"images of {size} pixels cannot be halved {halvings} times, as multipliers {multipliers} ask for"
        )
    sides = [size >> level for level in range(len(multipliers))]
    for side in attention:
        if side not in sides:
            raise UsageError(f"attention at {side} pixels: the levels have {', '.join(map(str, sides))}")
    widths = [width * m for m in multipliers]
    attends = [side in attention for side in sides]
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=blocks,
        block_out_channels=widths,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        norm_num_groups=math.gcd(32, max(1, width // 4), *widths),  # of four channels or more
        attention_head_dim=None,  # one head
        dropout=dropout,
    )

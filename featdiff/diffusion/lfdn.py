"""The latent feature denoising network of DLSR (arXiv 2411.10701), and one small one per layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """Norm -> SiLU -> Linear, + time, norm -> SiLU -> zero-initialised Linear, + input.

    DLSR's norm is a GroupNorm of one group: for vectors the same as a LayerNorm, which is several times faster.
    """

    def __init__(self, hidden: int, time_width: int) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(hidden)
        self.linear_in = nn.Linear(hidden, hidden)
        self.time = nn.Linear(time_width, hidden)
        self.norm_out = nn.LayerNorm(hidden)
        self.linear_out = nn.Linear(hidden, hidden)
        nn.init.zeros_(self.linear_out.weight)
        nn.init.zeros_(self.linear_out.bias)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        inner = self.linear_in(F.silu(self.norm_in(h))) + self.time(time)
        return h + cast(Tensor, self.linear_out(F.silu(self.norm_out(inner))))


class LFDN(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Residual MLP with a time embedding that predicts the clean vector: (B, ..., width), (B,) -> (B, ..., width).

    Parameters
    ----------
    width : int
        Length of a vector.
    hidden : int
        Width inside; the paper uses 1440 on the concatenation of all layers.
    blocks : int
        Residual blocks; the paper uses 16.
    time_width : int
        Width of the time embedding; the paper uses 720.
    """

    @register_to_config
    def __init__(self, width: int, hidden: int, blocks: int, time_width: int = 128) -> None:
        super().__init__()
        self.time_waves = Timesteps(64, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(64, time_width)
        self.project_in = nn.Linear(width, hidden)
        self.residual_blocks = nn.ModuleList(ResidualBlock(hidden, time_width) for _ in range(blocks))
        self.norm_out = nn.LayerNorm(hidden)
        self.project_out = nn.Linear(hidden, width)
        nn.init.zeros_(self.project_out.weight)
        nn.init.zeros_(self.project_out.bias)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Noisy vectors (B, ..., width) at integer times (B,) -> estimate of the clean vectors, same shape."""
        time = F.silu(self.time_embedding(self.time_waves(t).to(x_t.dtype)))
        time = time.reshape(t.shape[0], *(1 for _ in x_t.shape[1:-1]), time.shape[-1])
        h = self.project_in(x_t)
        for block in self.residual_blocks:
            h = block(h, time)
        return cast(Tensor, self.project_out(F.silu(self.norm_out(h))))


class LayerwiseLFDN(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """One LFDN per layer, side by side: (B, ..., sum of widths), (B,) -> (B, ..., sum of widths).

    As good as one network on the concatenation and far smaller.

    Parameters
    ----------
    widths : sequence of int
        Channels of each layer.
    hidden_ratio, hidden_max : number
        A layer's hidden width is ``hidden_ratio`` times its channels, at most ``hidden_max``.
    blocks : int
        Residual blocks of each LFDN.
    hidden_min : int
        Lower bound of the hidden width, for stages of few channels.
    """

    @register_to_config
    def __init__(
        self, widths: Sequence[int], hidden_ratio: float, hidden_max: int, blocks: int, hidden_min: int = 64
    ) -> None:
        super().__init__()
        sizes = [min(max(int(hidden_ratio * width), hidden_min), hidden_max) for width in widths]
        self.layers = nn.ModuleList(LFDN(width, size, blocks) for width, size in zip(widths, sizes, strict=True))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Noisy vectors (B, ..., sum of widths) at integer times (B,) -> estimate of the clean ones."""
        parts = x_t.split(list(self.config.widths), dim=-1)
        return torch.cat([layer(part, t) for layer, part in zip(self.layers, parts, strict=True)], dim=-1)

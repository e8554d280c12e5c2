"""Noisy feature vectors and their times -> estimates of the clean vectors.

:class:`LFDN` is the latent feature denoising network of DLSR (arXiv 2411.10701), :class:`LayerwiseLFDN` one small LFDN
for each layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Sine and cosine waves that encode a time, and the longest period, as in diffusers' Timesteps.
_WAVES = 64
_LONGEST = 10_000


class TimeEmbedding(nn.Module):
    """Integer times (B,) -> (B, width): waves of many periods, then Linear, SiLU, Linear.

    The same as diffusers' ``Timesteps(64, flip_sin_to_cos=True, downscale_freq_shift=0)`` and ``TimestepEmbedding``.
    diffusers takes seconds to import, and scoring needs nothing else of it.

    Parameters
    ----------
    width : int
        Width of the embedding.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(_WAVES, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Times (B,) -> embeddings (B, width); the linear layers work in ``dtype``."""
        half = _WAVES // 2
        exponents = -math.log(_LONGEST) * torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t[:, None].float() * exponents.exp()[None]
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
        return cast(Tensor, self.linear_2(F.silu(self.linear_1(waves))))


class ResidualBlock(nn.Module):
    """One residual block of the LFDN: (B, ..., hidden), (B, ..., time_width) -> (B, ..., hidden).

    Norm, SiLU, Linear, plus the time; then norm, SiLU, a Linear that starts at zero, plus the input. DLSR's norm is a
    GroupNorm with one group. For vectors that is the same as a LayerNorm, which is several times faster.

    Parameters
    ----------
    hidden : int
        Width of the vectors.
    time_width : int
        Width of the time embedding.
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
        """Vectors (B, ..., hidden) and embedded times (B, ..., time_width) -> vectors of the same shape."""
        inner = self.linear_in(F.silu(self.norm_in(h))) + self.time(time)
        return h + cast(Tensor, self.linear_out(F.silu(self.norm_out(inner))))


class LFDN(nn.Module):
    """Residual MLP with a time embedding that predicts the clean vector (DLSR, arXiv 2411.10701).

    Parameters
    ----------
    width : int
        Length of a vector.
    hidden : int
        Hidden width. The paper uses 1440 on the concatenation of all layers.
    blocks : int
        Number of residual blocks. The paper uses 16.
    time_width : int, default 128
        Width of the time embedding. The paper uses 720.

    Examples
    --------
    >>> import torch
    >>> network = LFDN(width=6, hidden=16, blocks=2)
    >>> network(torch.ones(4, 6), torch.tensor([0, 20, 60, 99])).shape
    torch.Size([4, 6])
    """

    def __init__(self, width: int, hidden: int, blocks: int, time_width: int = 128) -> None:
        super().__init__()
        self.time_embedding = TimeEmbedding(time_width)
        self.project_in = nn.Linear(width, hidden)
        self.residual_blocks = nn.ModuleList(ResidualBlock(hidden, time_width) for _ in range(blocks))
        self.norm_out = nn.LayerNorm(hidden)
        self.project_out = nn.Linear(hidden, width)
        nn.init.zeros_(self.project_out.weight)
        nn.init.zeros_(self.project_out.bias)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Noisy vectors (B, ..., width) at integer times (B,) -> estimates of the clean vectors, same shape."""
        time = F.silu(self.time_embedding(t, x_t.dtype))
        time = time.reshape(t.shape[0], *(1 for _ in x_t.shape[1:-1]), time.shape[-1])

        h = self.project_in(x_t)
        for block in self.residual_blocks:
            h = block(h, time)
        return cast(Tensor, self.project_out(F.silu(self.norm_out(h))))


class LayerwiseLFDN(nn.Module):
    """One LFDN for each layer, on its part of the concatenated vectors.

    As good as one network on the whole concatenation, and far smaller.

    Parameters
    ----------
    widths : sequence of int
        Number of channels of each layer.
    hidden_ratio : float
        Hidden width of a layer's network, as a multiple of the layer's channels.
    hidden_max : int
        Upper bound of the hidden width. It wins over ``hidden_min``.
    blocks : int
        Number of residual blocks of each LFDN.
    hidden_min : int, default 64
        Lower bound of the hidden width, for layers with few channels.

    Examples
    --------
    >>> import torch
    >>> network = LayerwiseLFDN(widths=[4, 8], hidden_ratio=2.0, hidden_max=64, blocks=1)
    >>> network(torch.ones(3, 12), torch.tensor([0, 50, 99])).shape
    torch.Size([3, 12])
    """

    def __init__(
        self, widths: Sequence[int], hidden_ratio: float, hidden_max: int, blocks: int, hidden_min: int = 64
    ) -> None:
        super().__init__()
        self.widths = list(widths)
        self.layers = nn.ModuleList()
        for width in widths:
            hidden = min(max(int(hidden_ratio * width), hidden_min), hidden_max)
            self.layers.append(LFDN(width, hidden, blocks))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Noisy vectors (B, ..., sum of widths) at integer times (B,) -> estimates of the clean vectors."""
        parts = x_t.split(self.widths, dim=-1)
        estimates = [layer(part, t) for layer, part in zip(self.layers, parts, strict=True)]
        return torch.cat(estimates, dim=-1)

"""A denoiser at a few fixed times: what does not depend on the image is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..diffusion.lfdn import LFDN, LayerwiseLFDN, ResidualBlock
from ..diffusion.schedules import NoiseSchedule


class FixedDenoiser:
    """Clean vectors -> one reconstruction for each start time, in one step, averaged over the noise samples.

    The same as noising the vectors with :func:`featdiff.diffusion.schedules.add_noise`, calling the denoiser and taking
    the mean, in about half of the operations: the embedded times and the projected noise are constants, and what is
    linear (the first and the last layer) is done once for all noise samples.

    Parameters
    ----------
    denoiser : LFDN or LayerwiseLFDN
        Trained; its weights are used, not copied.
    scheduler : NoiseSchedule
    start_times : sequence of int
    noise : Tensor of shape (start times, samples, D)
    """

    def __init__(
        self,
        denoiser: LFDN | LayerwiseLFDN,
        scheduler: NoiseSchedule,
        start_times: Sequence[int],
        noise: Tensor,
    ) -> None:
        self._weights = [*denoiser.parameters(), noise]
        self._versions = self._count()
        networks = [denoiser] if isinstance(denoiser, LFDN) else [cast(LFDN, layer) for layer in denoiser.layers]
        times = torch.tensor(start_times, device=noise.device)
        alpha_bar = scheduler.alphas_cumprod.to(noise)[times].reshape(-1, 1, 1)
        noise = (1 - alpha_bar).sqrt() * noise

        self.widths = [network.project_in.in_features for network in networks]
        parts = noise.split(self.widths, dim=2)
        self.networks = [
            _FixedNetwork(network, times, alpha_bar.sqrt()[:, :, None], part)
            for network, part in zip(networks, parts, strict=True)
        ]

    def __call__(self, x: Tensor) -> Tensor:
        """(B, D) -> (start times, B, D)."""
        parts = x.split(self.widths, dim=1)
        return torch.cat([network(part) for network, part in zip(self.networks, parts, strict=True)], dim=2)

    def is_current(self) -> bool:
        """Whether the weights and the noise are those that the constants were made of."""
        return self._versions == self._count()

    def _count(self) -> list[int]:
        """How often each tensor was changed; tensors made in inference mode do not count that, nor do graphs."""
        if torch.compiler.is_compiling():
            return []
        return [0 if tensor.is_inference() else tensor._version for tensor in self._weights]


class _FixedNetwork:
    """One LFDN: (B, width) -> (start times, B, width).

    Parameters
    ----------
    network : LFDN
    times : Tensor of shape (T,)
    signal : Tensor of shape (T, 1, 1, 1)
        What a clean vector is multiplied with at each time.
    noise : Tensor of shape (T, samples, width)
        What is added to it.
    """

    def __init__(self, network: LFDN, times: Tensor, signal: Tensor, noise: Tensor) -> None:
        self.network = network
        self.signal = signal
        project = network.project_in
        self.noise = F.linear(noise, project.weight, project.bias)[:, :, None]

        time = F.silu(network.time_embedding(times, noise.dtype))[:, None, None]
        blocks = [cast(ResidualBlock, block) for block in network.residual_blocks]
        self.blocks = [(block, block.time(time) + block.linear_in.bias) for block in blocks]

    def __call__(self, x: Tensor) -> Tensor:
        network = self.network
        h = self.signal * F.linear(x, network.project_in.weight) + self.noise  # (T, samples, B, hidden)

        for block, shift in self.blocks:
            inner = F.linear(_activated(block.norm_in, h), block.linear_in.weight) + shift
            h = h + F.linear(_activated(block.norm_out, inner), block.linear_out.weight, block.linear_out.bias)

        h = _activated(network.norm_out, h).mean(1)
        return F.linear(h, network.project_out.weight, network.project_out.bias)


def _activated(norm: nn.LayerNorm, h: Tensor) -> Tensor:
    """Norm and SiLU, without the cost of two calls of modules."""
    return F.silu(F.layer_norm(h, norm.normalized_shape, norm.weight, norm.bias, norm.eps))

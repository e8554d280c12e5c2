"""(x, reconstruction) -> distance for each layer. Higher = more out-of-distribution everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def mse(x: Tensor, x_hat: Tensor, widths: Sequence[int]) -> Tensor:
    """Mean squared error of each layer's stretch: (..., D), (..., D) -> (..., L), >= 0 (DLSR's MSE, by layer)."""
    squares = (x - x_hat).square().split(list(widths), dim=-1)
    return torch.stack([part.mean(-1) for part in squares], dim=-1)


def mfsim(x: Tensor, x_hat: Tensor, widths: Sequence[int]) -> Tensor:
    """1 - cosine of each layer's stretch: (..., D), (..., D) -> (..., L), in [0, 2].

    The mean over layers is 1 + DLSR's MFsim; unlike the released code, no layer is left out.
    """
    pairs = zip(x.split(list(widths), dim=-1), x_hat.split(list(widths), dim=-1), strict=True)
    return torch.stack([1 - F.cosine_similarity(a, b, dim=-1) for a, b in pairs], dim=-1)


def likelihood_regret(x: Tensor, x_hat: Tensor, x_hat_early: Tensor, widths: Sequence[int]) -> Tensor:
    """MSE(end of training) - MSE(after the first epoch): (..., L).

    Training lowers the error of in-domain features most, so this is most negative for them. DLSR defines LR with the
    opposite sign, as a measure of being in-domain.
    """
    return mse(x, x_hat, widths) - mse(x, x_hat_early, widths)

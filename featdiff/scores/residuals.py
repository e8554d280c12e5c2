"""Features and their reconstructions -> one distance for each layer. In all of them, higher = more OOD.

Features are the concatenated vectors of all layers: the last axis has the length D = sum of ``widths``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def mse(x: Tensor, x_hat: Tensor, widths: Sequence[int]) -> Tensor:
    """Mean squared error of each layer (DLSR's MSE, by layer).

    Parameters
    ----------
    x : Tensor of shape (..., D)
        Features.
    x_hat : Tensor of shape (..., D)
        Their reconstructions.
    widths : sequence of L int
        Number of channels of each layer.

    Returns
    -------
    Tensor of shape (..., L)
        0 or more.

    Examples
    --------
    >>> mse(torch.tensor([1.0, 0.0, 2.0, 0.0]), torch.zeros(4), widths=[2, 2])
    tensor([0.5000, 2.0000])
    """
    squares = (x - x_hat).square().split(list(widths), dim=-1)
    return torch.stack([part.mean(-1) for part in squares], dim=-1)


def mfsim(x: Tensor, x_hat: Tensor, widths: Sequence[int]) -> Tensor:
    """1 - cosine similarity of each layer.

    Its mean over the layers is 1 + DLSR's MFsim. Unlike the released code, no layer is left out.

    Parameters
    ----------
    x : Tensor of shape (..., D)
        Features.
    x_hat : Tensor of shape (..., D)
        Their reconstructions.
    widths : sequence of L int
        Number of channels of each layer.

    Returns
    -------
    Tensor of shape (..., L)
        0 to 2.

    Examples
    --------
    >>> mfsim(torch.tensor([1.0, 0.0, 2.0, 0.0]), torch.tensor([0.0, 1.0, 1.0, 0.0]), widths=[2, 2])
    tensor([1., 0.])
    """
    x_parts = x.split(list(widths), dim=-1)
    x_hat_parts = x_hat.split(list(widths), dim=-1)
    pairs = zip(x_parts, x_hat_parts, strict=True)
    return torch.stack([1 - F.cosine_similarity(a, b, dim=-1) for a, b in pairs], dim=-1)


def likelihood_regret(x: Tensor, x_hat: Tensor, x_hat_early: Tensor, widths: Sequence[int]) -> Tensor:
    """MSE at the end of training - MSE after the first epoch.

    Training lowers the error of in-domain features most, so this is most negative for them. DLSR defines LR with the
    opposite sign, as a measure of being in-domain.

    Parameters
    ----------
    x : Tensor of shape (..., D)
        Features.
    x_hat : Tensor of shape (..., D)
        Reconstructions by the trained network.
    x_hat_early : Tensor of shape (..., D)
        Reconstructions by the network after its first epoch.
    widths : sequence of L int
        Number of channels of each layer.

    Returns
    -------
    Tensor of shape (..., L)
    """
    return mse(x, x_hat, widths) - mse(x, x_hat_early, widths)

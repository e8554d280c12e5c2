"""Scores of several layers, start times or heads -> one score, by statistics of held-out in-domain scores only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..exceptions import UsageError

#: mean, max and covariance work on z-scores, fisher and tippett on their normal tails.
FUSIONS = ("mean", "max", "fisher", "tippett", "covariance")


def log_statistics(errors: Tensor) -> tuple[Tensor, Tensor]:
    """Held-out in-domain errors (N, ...) > 0 -> mean and deviation of their logarithms, each (...)."""
    logs = _log(errors)
    return logs.mean(0), logs.std(0, correction=0).clamp_min(0.05)  # of a few alike rows, it would say too little


def log_z(errors: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Errors (B, ...) -> (B, ...) in in-domain standard deviations of the logarithm, higher = more OOD."""
    return (_log(errors) - mean) / deviation


def weighted_sum(z: Tensor, weights: Tensor) -> Tensor:
    """(B, L), (L,) -> (B,): sum of w_l z_l / |w|, of variance 1 if the layers were independent."""
    return z @ (weights / weights.norm())


def _log(errors: Tensor) -> Tensor:
    return torch.log(errors.clamp_min(torch.finfo(errors.dtype).tiny))


class Fusion(nn.Module):
    """z-scores of H heads -> one score, higher = more OOD. Nothing here has seen an OOD image.

    ``mean``: their weighted sum over the length of the weights. ``max``: the largest. ``fisher``: -sum of log p (Fisher
    1932) and ``tippett``: -log of the smallest p (Tippett 1931), p being a z-score's upper tail under the normal
    distribution, for ranks among a few hundred held-out images end at one in a few hundred. ``covariance``: the sum
    with weights C^-1 1, C being the covariance of in-domain z-scores: heads that say the same share their vote
    (negative weights are set to 0).

    Parameters
    ----------
    heads : int
        H; ``weights`` (H,) is what is stored.
    weights : sequence of float, optional
        What each head counts in ``mean``; default: all the same.
    method : one of ``FUSIONS``

    Raises
    ------
    UsageError
        An unknown method.
    """

    weights: Tensor

    def __init__(self, heads: int, method: str = "mean", weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if method not in FUSIONS:
            raise UsageError(f"unknown fusion {method!r}; known: {', '.join(FUSIONS)}")
        self.method = method
        self.register_buffer("weights", torch.tensor(weights or [1.0] * heads))

    def fit(self, z: Tensor) -> Fusion:
        """Set the weights from held-out in-domain z-scores (N, H); only ``covariance`` looks at them."""
        if self.method == "covariance" and z.shape[1] > 1 and len(z) > 1:
            heads = z.shape[1]
            # a tenth of the identity: a hundred rows do not tell an inverse
            covariance = torch.cov(z.T.double()) + 0.1 * torch.eye(heads, dtype=torch.float64, device=z.device)
            weights = torch.linalg.solve(covariance, torch.ones(heads, 1, dtype=torch.float64, device=z.device))
            self.weights.copy_(weights[:, 0].clamp_min(0))
        return self

    def forward(self, z: Tensor) -> Tensor:
        """(B, H) -> (B,)."""
        if self.method in ("mean", "covariance"):
            return weighted_sum(z, self.weights)
        if self.method == "max":
            return z.amax(1)
        surprise = -torch.special.log_ndtr(-z)  # -log of the upper tail, without loss of digits
        return surprise.sum(1) if self.method == "fisher" else surprise.amax(1)

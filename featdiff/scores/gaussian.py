"""Gaussian heads: Mahalanobis distance and PCA residual, fitted in one streaming pass over in-domain vectors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..exceptions import UsageError


class Moments:
    """Count, mean and covariance of vectors that come in chunks, in float64.

    Chunks are merged as by Chan, Golub & LeVeque (1983), which loses no digits when the mean is large.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.n = 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(width, width, dtype=torch.float64, device=device)

    def update(self, chunk: Tensor) -> None:
        """Add vectors (B, d).

        Raises
        ------
        UsageError
            Another width, or NaN.
        """
        if chunk.dim() != 2 or chunk.shape[1] != len(self.mean):
            raise UsageError(f"vectors must have shape (B, {len(self.mean)}), not {tuple(chunk.shape)}")
        if not torch.isfinite(chunk).all():
            raise UsageError("the in-domain vectors hold NaN or infinite values")
        if not len(chunk):
            return
        chunk = chunk.to(self.mean)
        mean = chunk.mean(0)
        shift, total = mean - self.mean, self.n + len(chunk)
        centred = chunk - mean
        self._scatter += centred.T @ centred + torch.outer(shift, shift) * (self.n * len(chunk) / total)
        self.mean += shift * (len(chunk) / total)
        self.n = total

    @property
    def covariance(self) -> Tensor:
        """Maximum-likelihood covariance (d, d)."""
        if self.n == 0:
            raise UsageError("no vectors to fit a Gaussian on")
        return self._scatter / self.n


def moments(chunks: Iterable[Tensor], width: int, device: torch.device | str = "cpu") -> Moments:
    """Moments of all chunks (B, width)."""
    found = Moments(width, device)
    for chunk in chunks:
        found.update(chunk)
    return found


def shrunk(covariance: Tensor, n: int) -> Tensor:
    """Oracle-approximating shrinkage towards a multiple of the identity (Chen et al. 2010, eq. 23), which needs no more
    than the covariance (d, d) of ``n`` vectors, and keeps it invertible when n < d."""
    d = len(covariance)
    level = covariance.trace() / d
    if level <= 0:
        raise UsageError("the in-domain vectors are all the same: there is nothing to fit a Gaussian on")
    alpha = covariance.square().mean()
    spread = (n + 1) * (alpha - level.square() / d)
    share = ((alpha + level.square()) / spread).clamp(max=1.0) if spread > 0 else torch.ones_like(level)
    return (1 - share) * covariance + share * level * torch.eye(d, dtype=covariance.dtype, device=covariance.device)


class Mahalanobis(nn.Module):
    """Squared Mahalanobis distance to one Gaussian, without labels (as in SSD, Sehwag et al., ICLR 2021).

    ``mean`` (d,) and ``whitening`` (d, d), a root of the inverse of the shrunk covariance.
    """

    mean: Tensor
    whitening: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("whitening", torch.eye(width))

    def fit(self, found: Moments) -> Mahalanobis:
        """Set mean and whitening from moments of in-domain vectors."""
        root = torch.linalg.cholesky(shrunk(found.covariance, found.n))
        identity = torch.eye(len(root), dtype=root.dtype, device=root.device)
        self.mean.copy_(found.mean)
        self.whitening.copy_(torch.linalg.solve_triangular(root, identity, upper=False).T)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(B, d) -> (B,), >= 0, higher = more OOD; about d for in-domain vectors."""
        return ((x - self.mean) @ self.whitening).square().sum(-1)


class PrincipalResidual(nn.Module):
    """Distance to the principal subspace that holds ``share`` of the in-domain variance (as in ViM's residual,
    Wang et al., CVPR 2022, but centred and without a classifier).

    ``mean`` (d,) and ``basis`` (d, d), of which the principal directions are zero.
    """

    mean: Tensor
    basis: Tensor

    def __init__(self, width: int, share: float = 0.9) -> None:
        super().__init__()
        if not 0 < share < 1:
            raise UsageError(f"the share of variance to keep must lie between 0 and 1, not {share}")
        self.share = share
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("basis", torch.eye(width))

    def fit(self, found: Moments) -> PrincipalResidual:
        """Set mean and basis from moments of in-domain vectors."""
        values, vectors = torch.linalg.eigh(found.covariance)  # ascending
        below = values.clamp_min(0).cumsum(0) / values.clamp_min(0).sum().clamp_min(torch.finfo(values.dtype).tiny)
        residual = below <= 1 - self.share
        residual[0] = True  # some direction must be left to measure in
        self.mean.copy_(found.mean)
        self.basis.copy_(vectors * residual)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(B, d) -> (B,), Euclidean, >= 0, higher = more OOD."""
        return ((x - self.mean) @ self.basis).norm(dim=-1)

"""In-domain vectors, in one pass -> Mahalanobis distance and distance to the principal subspace."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..exceptions import UsageError


class Moments:
    """Number, mean and covariance of vectors that come in chunks, in float64.

    Chunks are merged as by Chan, Golub & LeVeque (1983), which loses no digits when the mean is large.

    Parameters
    ----------
    width : int
        Length d of a vector.
    device : device, default "cpu"
        Where the sums are kept.

    Attributes
    ----------
    n : int
        Number of vectors so far.
    mean : Tensor of shape (d,)
        Their mean.

    Examples
    --------
    >>> import torch
    >>> moments = Moments(2)
    >>> moments.update(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
    >>> moments.n, moments.mean.tolist(), moments.covariance.tolist()
    (2, [1.0, 1.0], [[1.0, 0.0], [0.0, 0.0]])
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.n = 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(width, width, dtype=torch.float64, device=device)

    def update(self, chunk: Tensor) -> None:
        """Add vectors.

        Parameters
        ----------
        chunk : Tensor of shape (B, d)
            Vectors.

        Raises
        ------
        UsageError
            Another shape, NaN or infinite values.
        """
        if chunk.dim() != 2 or chunk.shape[1] != len(self.mean):
            raise UsageError(f"vectors must have shape (B, {len(self.mean)}), not {tuple(chunk.shape)}")
        if not torch.isfinite(chunk).all():
            raise UsageError("the in-domain vectors hold NaN or infinite values")
        if not len(chunk):
            return

        chunk = chunk.to(self.mean)
        chunk_mean = chunk.mean(0)
        centred = chunk - chunk_mean
        shift = chunk_mean - self.mean
        total = self.n + len(chunk)

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
    """Moments of all chunks together.

    Parameters
    ----------
    chunks : iterable of Tensor of shape (B, width)
        Vectors.
    width : int
        Length of a vector.
    device : device, default "cpu"
        Where the sums are kept.

    Returns
    -------
    Moments
    """
    total = Moments(width, device)
    for chunk in chunks:
        total.update(chunk)
    return total


def shrunk(covariance: Tensor, n: int) -> Tensor:
    """Shrink a covariance towards a multiple of the identity, so that it can be inverted even if n < d.

    Oracle-approximating shrinkage (Chen et al., 2010, eq. 23), which needs nothing but the covariance and ``n``.

    Parameters
    ----------
    covariance : Tensor of shape (d, d)
        Maximum-likelihood covariance.
    n : int
        Number of vectors that it comes from.

    Returns
    -------
    Tensor of shape (d, d)

    Raises
    ------
    UsageError
        The covariance is zero: all vectors are the same.
    """
    d = len(covariance)
    mean_variance = covariance.trace() / d
    if mean_variance <= 0:
        raise UsageError("the in-domain vectors are all the same: there is nothing to fit a Gaussian on")

    mean_square = covariance.square().mean()
    numerator = mean_square + mean_variance.square()
    denominator = (n + 1) * (mean_square - mean_variance.square() / d)
    shrinkage = (numerator / denominator).clamp(max=1.0) if denominator > 0 else torch.ones_like(mean_variance)

    identity = torch.eye(d, dtype=covariance.dtype, device=covariance.device)
    return (1 - shrinkage) * covariance + shrinkage * mean_variance * identity


class Mahalanobis(nn.Module):
    """Squared Mahalanobis distance to one Gaussian, without labels (as in SSD, Sehwag et al., ICLR 2021).

    Parameters
    ----------
    width : int
        Length d of a vector.

    Attributes
    ----------
    mean : Tensor of shape (d,)
        In-domain mean.
    whitening : Tensor of shape (d, d)
        A root of the inverse of the shrunk covariance.

    Examples
    --------
    >>> import torch
    >>> in_domain = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    >>> score = Mahalanobis(3).fit(moments([in_domain], 3))
    >>> near, far = score(torch.tensor([[0.0, 0.0, 0.0], [5.0, 5.0, 5.0]]))
    >>> bool(near < 1 < far)
    True
    """

    mean: Tensor
    whitening: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("whitening", torch.eye(width))

    def fit(self, moments: Moments) -> Mahalanobis:
        """Set mean and whitening from the moments of in-domain vectors.

        Parameters
        ----------
        moments : Moments
            Of at least one vector.

        Returns
        -------
        Mahalanobis
            This module.

        Raises
        ------
        UsageError
            No vectors, or vectors that are all the same.
        """
        root = torch.linalg.cholesky(shrunk(moments.covariance, moments.n))
        identity = torch.eye(len(root), dtype=root.dtype, device=root.device)
        inverse_root = torch.linalg.solve_triangular(root, identity, upper=False)

        self.mean.copy_(moments.mean)
        self.whitening.copy_(inverse_root.T)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Vectors (B, d) -> (B,), 0 or more, higher = more OOD; about d for in-domain vectors."""
        return ((x - self.mean) @ self.whitening).square().sum(-1)


class PrincipalResidual(nn.Module):
    """Euclidean distance to the principal subspace that holds most of the in-domain variance.

    As the residual of ViM (Wang et al., CVPR 2022), but centred and without a classifier.

    Parameters
    ----------
    width : int
        Length d of a vector.
    share : float, default 0.9
        Share of the in-domain variance that the subspace holds at least, above 0 and below 1.

    Attributes
    ----------
    mean : Tensor of shape (d,)
        In-domain mean.
    basis : Tensor of shape (d, d)
        Eigenvectors of the covariance as columns; those of the principal subspace are set to zero.

    Raises
    ------
    UsageError
        A share outside its range.
    """

    mean: Tensor
    basis: Tensor

    def __init__(self, width: int, share: float = 0.9) -> None:
        super().__init__()
        if not 0 < share < 1:
            raise UsageError(f"the share of variance to keep must lie between 0 and 1, not {share}", argument="share")
        self.share = share
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("basis", torch.eye(width))

    def fit(self, moments: Moments) -> PrincipalResidual:
        """Set mean and basis from the moments of in-domain vectors.

        Parameters
        ----------
        moments : Moments
            Of at least one vector.

        Returns
        -------
        PrincipalResidual
            This module.

        Raises
        ------
        UsageError
            No vectors.
        """
        values, vectors = torch.linalg.eigh(moments.covariance)  # ascending
        values = values.clamp_min(0)
        total = values.sum().clamp_min(torch.finfo(values.dtype).tiny)
        is_residual = values.cumsum(0) / total <= 1 - self.share
        is_residual[0] = True  # some direction must be left to measure in

        self.mean.copy_(moments.mean)
        self.basis.copy_(vectors * is_residual)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Vectors (B, d) -> (B,), 0 or more, higher = more OOD."""
        return ((x - self.mean) @ self.basis).norm(dim=-1)

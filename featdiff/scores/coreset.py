"""Many in-domain vectors -> a few that stand for all of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..exceptions import UsageError
from .neighbors import TorchIndex, check_finite

#: Ways to choose the vectors of a bank, see :func:`coreset`.
CORESETS = ("random", "greedy", "cluster")


def coreset(vectors: Tensor, size: int, method: str = "random", seed: int = 0) -> np.ndarray:
    """Choose the vectors of a bank of limited size.

    Parameters
    ----------
    vectors : Tensor of shape (n, d)
        Vectors to choose from.
    size : int
        Largest number of vectors to keep.
    method : str, default "random"
        ``random`` is a uniform sample. It keeps the density, which the distance to the k-th neighbour measures.
        ``greedy`` adds the vector that is farthest from those chosen so far, again and again (k-center, as in
        PatchCore, arXiv 2106.08265). It covers rare vectors. ``cluster`` takes the vectors nearest to the centres of
        k-means (scikit-learn's MiniBatchKMeans).
    seed : int, default 0
        Decides all that is random.

    Returns
    -------
    ndarray of shape (min(n, size),)
        Indices of the chosen vectors, ascending.

    Raises
    ------
    UsageError
        An unknown method, a size below 1, NaN or infinite values.

    Examples
    --------
    >>> vectors = torch.tensor([[0.0], [0.1], [0.2], [9.0]])
    >>> [int(i) for i in coreset(vectors, 2, "cluster")]
    [1, 3]
    """
    check_coreset(method)
    if size < 1:
        raise UsageError(f"the size of a bank must be above 0, not {size}", argument="size")
    check_finite(vectors, "the vectors of a bank")

    if len(vectors) <= size:
        return np.arange(len(vectors))
    if method == "random":
        return np.sort(np.random.default_rng(seed).permutation(len(vectors))[:size])
    if method == "greedy":
        return _farthest_first(vectors.float(), size, seed)
    return _medoids(vectors.float(), size, seed)


def check_coreset(method: str) -> None:
    """Raise ``UsageError`` if a method is unknown."""
    if method not in CORESETS:
        raise UsageError(f"unknown coreset {method!r}; known: {', '.join(CORESETS)}", argument="coreset")


def _medoids(vectors: Tensor, size: int, seed: int) -> np.ndarray:
    """The vectors nearest to the centres of k-means."""
    from sklearn.cluster import MiniBatchKMeans

    means = MiniBatchKMeans(size, random_state=seed, n_init=1, batch_size=max(1024, 2 * size))
    centres = torch.from_numpy(means.fit(vectors.cpu().numpy()).cluster_centers_)
    _, indices = TorchIndex(vectors).search(centres.to(vectors), 1)

    nearest = np.unique(indices.cpu().numpy())
    # two centres may have the same nearest vector: random vectors then fill the bank
    order = np.random.default_rng(seed).permutation(len(vectors))
    others = np.setdiff1d(order, nearest, assume_unique=True)
    return np.sort(np.concatenate([nearest, others[: size - len(nearest)]]))


def _farthest_first(vectors: Tensor, size: int, seed: int) -> np.ndarray:
    """A random vector, then again and again the one that is farthest from those chosen so far."""
    chosen = [int(np.random.default_rng(seed).integers(len(vectors)))]
    nearest = torch.full((len(vectors),), torch.inf, device=vectors.device)
    for _ in range(size - 1):
        nearest = torch.minimum(nearest, (vectors - vectors[chosen[-1]]).square().sum(1))
        nearest[chosen[-1]] = -1  # below the 0 of its copies, so that it is never chosen twice
        chosen.append(int(nearest.argmax()))
    return np.sort(chosen)

"""Which in-domain features a detector keeps. What the detectors' fit leaves to others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from ..features.store import Features
from ..scores.coreset import coreset

# Choosing among many more rows than are kept needs memory and time, and gains nothing.
_CANDIDATES = 20


def choose_bank(
    features: Features, training: np.ndarray, size: int, method: str, seed: int, view: Callable[[Tensor], Tensor]
) -> np.ndarray:
    """At most ``size`` of the training rows, to look up neighbours in.

    Parameters
    ----------
    features : Features
    training : ndarray of int
        Rows that train.
    size : int
    method : str
        See :func:`featdiff.scores.coreset.coreset`.
    seed : int
    view : callable
        Rows of features (n, D) -> the vectors among which to choose.

    Returns
    -------
    ndarray of int
        Ascending.
    """
    order = np.random.default_rng(seed).permutation(training)
    most = size if method == "random" else _CANDIDATES * size
    rows = np.sort(order[:most])
    if len(rows) > size:
        rows = rows[coreset(view(features[rows]), size, method, seed)]
    return rows


def as_digests(digests: list[bytes], rows: np.ndarray) -> np.ndarray:
    """Digests of these rows as an array (n, 16) of bytes."""
    return np.frombuffer(bytearray().join(digests[i] for i in rows), dtype=np.uint8).reshape(-1, 16)

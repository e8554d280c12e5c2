"""Scores of several layers, start times or heads -> one score, by statistics of held-out in-domain scores alone."""

from __future__ import annotations

import torch
from torch import Tensor

# Of a few images that are alike, the standard deviation would be too small.
_SMALLEST_STD = 0.05


def statistics(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Held-out in-domain scores (N, ...) -> their mean and standard deviation (at least 0.05), each (...)."""
    return scores.mean(0), scores.std(0, correction=0).clamp_min(_SMALLEST_STD)


def log_statistics(errors: Tensor) -> tuple[Tensor, Tensor]:
    """Held-out in-domain errors (N, ...) > 0 -> mean and standard deviation of their logarithms, each (...)."""
    return statistics(log(errors))


def log_z(errors: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Errors (B, ...) -> (B, ...) in in-domain standard deviations of the logarithm, higher = more OOD."""
    return (log(errors) - mean) / deviation


def weighted_sum(z: Tensor, weights: Tensor) -> Tensor:
    """(B, L), (L,) -> (B,): sum of w_l z_l / |w|, of variance 1 if the layers were independent."""
    return z @ (weights / weights.norm())


def log(errors: Tensor) -> Tensor:
    """Logarithm of numbers >= 0; of 0, that of the smallest number there is."""
    return torch.log(errors.clamp_min(torch.finfo(errors.dtype).tiny))

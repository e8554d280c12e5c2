"""Scores of several layers and start times -> one score, by statistics of held-out in-domain scores only."""

from __future__ import annotations

import torch
from torch import Tensor


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

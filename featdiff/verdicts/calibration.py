"""Held-out in-domain scores -> conformal p-values and thresholds. Knows no images."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..exceptions import UsageError

# k / (n + 1) and the same rate written as a decimal may differ in the last bits
_SLACK = 1e-9
# The same where p-values are float32; two of them are never so close, for n is at most 10,000.
_ROUNDING = 1e-7
Array = TypeVar("Array", np.ndarray, Tensor)


def p_values(scores: np.ndarray, calibration: np.ndarray) -> np.ndarray:
    """Split-conformal p-values: (1 + #{calibration >= score}) / (n + 1), in (0, 1]; small = out-of-distribution.

    If an image comes from the distribution of the calibration images, P(p <= a) <= a for every a (Vovk et al. 2005;
    Bates et al. 2023, arXiv 2104.08279). The guarantee is on average over calibration sets.

    Parameters
    ----------
    scores : (B,), higher = more OOD. NaN gives NaN.
    calibration : (n,) sorted ascending, scores of in-domain images that took no part in training.
    """
    at_least = len(calibration) - np.searchsorted(calibration, scores, side="left")
    return np.where(np.isnan(scores), np.nan, (1 + at_least) / (len(calibration) + 1))


def tensor_p_values(scores: Tensor, calibration: Tensor) -> Tensor:
    """The same on tensors of any device: (B,), (n,) float32 -> (B,) float32. Can be traced for export."""
    at_least = (calibration >= scores[:, None]).sum(1)
    return torch.where(scores.isnan(), scores, (1 + at_least) / (len(calibration) + 1))


def flagged(p: Array, fpr: float) -> Array:
    """p-values (B,) -> (B,) bool, ``p <= fpr``; NaN is not flagged."""
    return p <= fpr + _ROUNDING


def check_fpr(fpr: float, n: int | None = None) -> None:
    """Refuse a false-alarm rate that ``n`` calibration scores cannot support (less than 1 / (n + 1)).

    Raises
    ------
    UsageError
        Naming the number of calibration images that would do.
    """
    if not isinstance(fpr, int | float | np.floating) or not 0 < fpr < 1:
        raise UsageError(f"the false-alarm rate (--fpr) must lie between 0 and 1, not {fpr}")
    if n is not None and (fpr + _SLACK) * (n + 1) < 1:
        needed = math.ceil(1 / (fpr + _SLACK)) - 1
        raise UsageError(
            f"--fpr {fpr:g} needs at least {needed} held-out images for calibration, and there are {n}: "
            f"train on more images, or ask for --fpr {math.ceil(1000 / (n + 1)) / 1000:g} or more"
        )


def threshold(calibration: np.ndarray, fpr: float) -> float:
    """The largest score that is not flagged at this rate: ``score > threshold`` is the same as ``p <= fpr``."""
    check_fpr(fpr, len(calibration))
    n = len(calibration)
    allowed = int(flagged(np.arange(1, n + 1) / (n + 1), fpr).sum()) - 1  # calibration scores that may lie at or above
    return float(calibration[n - 1 - allowed])

"""The end of every fit: can what was fitted tell strange from ordinary at all?"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..exceptions import FeatdiffError
from ..features.layout import FeatureLayout, Kind

#: Rows from which the deviation of each column is estimated.
SAMPLE = 1024
# Rows that are shifted, and how far, in robust standard deviations of each column.
_ROWS = 64
_SHIFT = 20.0
# A shifted row must be stranger than this share of the held-out ones. It is far less than what a sound fit reaches, so
# that some bad images among those do not end a fit.
_STRANGER_THAN = 0.75
# Fewer held-out scores support no false-alarm rate of 5 %, and say too little.
_FEWEST = 19
_WAY_OUT = "look for broken or extreme ones among them (featdiff.audit finds odd images), and fit again"


def check_spread(scores: np.ndarray) -> None:
    """Refuse held-out scores (N,) without spread: they would give every image the same p-value.

    Raises
    ------
    FeatdiffError
        The middle half of the scores is one number, but for rounding.
    """
    if len(scores) < _FEWEST:
        return
    low, middle, high = np.quantile(scores, [0.25, 0.5, 0.75])
    if high - low <= 1e-6 * max(1.0, abs(middle)):
        raise FeatdiffError(
            f"fitting failed: the {len(scores):,} held-out images or rows have the same score, {middle:.4g}, so "
            f"nothing can be told apart: {_WAY_OUT}"
        )


def check_sensitive(
    rows: Tensor, layout: FeatureLayout, score: Callable[[Tensor], np.ndarray], held_out: np.ndarray
) -> None:
    """Refuse a fit to which rows far from all others look ordinary.

    Ordinary rows are moved by 20 standard deviations in every column but those of logits (where that is certainty, not
    strangeness), up or down by chance, and the other way. The stranger of both counts: some scores look one way only.

    Parameters
    ----------
    rows : Tensor of shape (N, D)
        Of the images that trained.
    layout : FeatureLayout
        What a row holds.
    score : callable
        Rows (B, D) -> ood_score (B,), higher = more OOD.
    held_out : ndarray of shape (n,)
        Scores of rows that took no part in training.

    Raises
    ------
    FeatdiffError
        Most of the shifted rows are no stranger than three quarters of the held-out ones.
    """
    if len(held_out) < _FEWEST:
        return

    some = rows[:_ROWS].float()
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, some.shape, generator=generator) * 2.0 - 1
    shift = _SHIFT * _deviations(rows.float(), layout) * signs

    typical = np.median(np.maximum(score(some + shift), score(some - shift)))
    limit = np.quantile(held_out, _STRANGER_THAN)
    if not typical > limit:
        raise FeatdiffError(
            f"fitting failed: images or rows {_SHIFT:.0f} standard deviations away in every layer score {typical:.4g}, "
            f"and a quarter of the held-out ones {limit:.4g} or more, so the strange would pass as ordinary: {_WAY_OUT}"
        )


def _deviations(rows: Tensor, layout: FeatureLayout) -> Tensor:
    """The standard deviation of each column (D,), from the middle half of its values.

    The columns of a part share one number, for in many columns of deep features that half is zero. A column in which
    all rows agree is not moved.
    """
    low, high = torch.quantile(rows, torch.tensor([0.25, 0.75]), dim=0)
    each = (high - low) / 1.349
    moving = rows.amax(0) > rows.amin(0)

    out = torch.zeros(rows.shape[1])
    for part in layout.parts:
        if part.kind is Kind.LOGITS:
            continue
        columns = each[part.columns]
        spread = columns.square().mean().sqrt()
        out[part.columns] = torch.where(moving[part.columns], spread, 0.0)
    return out if out.any() else rows.std(0, correction=0)  # the latter if most rows agree in every column

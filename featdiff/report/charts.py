"""Scores -> the geometry of charts, for SVG inside a page."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Size of the plot inside its margins, in units of the SVG.
WIDTH = 1000.0
HEIGHT = 220.0
_BINS = 60
# The normal images take up at least this share of the width, however strange others are.
_LEAST_SHARE = 0.25
# Corners of a ROC curve; more are not seen.
_CORNERS = 200


@dataclass(frozen=True)
class Histogram:
    """Outlines of one or two histograms on one axis of scores.

    Attributes
    ----------
    low, high : float
        Scores at the left and right end; those beyond lie in the outermost bins.
    normal, these : str
        Paths for SVG, in a plot of ``WIDTH`` x ``HEIGHT``; empty without scores.
    ticks : list of (float, str)
        Position and label along the axis.
    beyond : int
        How many of these scores lie above ``high``.
    """

    low: float
    high: float
    normal: str
    these: str
    ticks: list[tuple[float, str]]
    beyond: int

    def x(self, score: float) -> float:
        """Position of a score along the axis, inside the plot."""
        place = (score - self.low) / (self.high - self.low)
        return WIDTH * float(np.clip(place, 0, 1))


def histogram(these: np.ndarray, normal: np.ndarray | None = None) -> Histogram:
    """Histograms of scores, each as high as the plot: of a few images the bars would else dwarf those of many.

    Parameters
    ----------
    these : (N,) float
        Finite scores of the images that are shown; may be empty.
    normal : (n,) float, optional
        Scores of held-out normal images.
    """
    low, high = _ends(these, normal)
    edges = np.linspace(low, high, _BINS + 1)
    outlines = []
    for scores in (normal, these):
        if scores is None or not len(scores):
            outlines.append("")
            continue
        counts, _ = np.histogram(np.clip(scores, low, high), edges)
        outlines.append(_outline(counts / counts.max()))

    beyond = int((these > high).sum())
    return Histogram(low, high, outlines[0], outlines[1], _ticks(low, high), beyond)


def _ends(these: np.ndarray, normal: np.ndarray | None) -> tuple[float, float]:
    """Scores at both ends of the axis: all of the normal ones, and of the others what leaves room for them."""
    everything = these if normal is None else np.concatenate([these, normal])
    if not len(everything):
        return 0.0, 1.0

    low, high = float(everything.min()), float(everything.max())
    if normal is not None and len(normal):
        core_low, core_high = float(normal.min()), float(normal.max())
    else:
        core_low, core_high = (float(value) for value in np.quantile(these, [0.01, 0.95]))

    room = max(core_high - core_low, 1e-3) * (1 / _LEAST_SHARE - 1)
    low = max(low, core_low - room / 3)
    high = min(high, core_high + room)
    if high <= low:
        low, high = low - 0.5, low + 0.5
    return low, high


def _outline(shares: np.ndarray) -> str:
    """Steps of bars as the path of an area; shares in [0, 1] of the height."""
    step = WIDTH / len(shares)
    parts = [f"M0 {HEIGHT:g}"]
    for i, share in enumerate(shares):
        parts.append(f"V{HEIGHT * (1 - share):.1f}H{(i + 1) * step:.1f}")
    return "".join(parts) + f"V{HEIGHT:g}Z"


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """About six round numbers between both ends."""
    unit = 10.0 ** np.floor(np.log10((high - low) / 6))
    step = next(factor * unit for factor in (1, 2, 5, 10) if (high - low) / (factor * unit) <= 7)
    values = np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step
    return [(WIDTH * float((value - low) / (high - low)), f"{value + 0.0:.6g}") for value in values]


def roc_path(id_scores: np.ndarray, ood_scores: np.ndarray, side: float = 300.0) -> str:
    """A ROC curve as a path for SVG: false alarms to the right, found OOD images upwards.

    Parameters
    ----------
    id_scores, ood_scores : (n,) float
        Finite, higher = more OOD, at least one each.
    side : float, default 300
        Width and height of the plot.
    """
    thresholds = np.unique(np.concatenate([id_scores, ood_scores]))[::-1]
    false_alarms = 1 - np.searchsorted(np.sort(id_scores), thresholds, side="left") / len(id_scores)
    found = 1 - np.searchsorted(np.sort(ood_scores), thresholds, side="left") / len(ood_scores)
    x = np.concatenate([[0.0], false_alarms])
    y = np.concatenate([[0.0], found])

    if len(x) > _CORNERS:  # evenly along the curve, not along the scores
        length = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
        chosen = np.searchsorted(length, np.linspace(0, length[-1], _CORNERS))
        x, y = x[chosen], y[chosen]
    corners = (f"{side * a:.1f} {side * (1 - b):.1f}" for a, b in zip(x, y, strict=True))
    return "M" + "L".join(corners)

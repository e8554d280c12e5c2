"""Why an image was judged as it was: what contributed, where in the picture, and which normal images are like it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..exceptions import UsageError

if TYPE_CHECKING:
    from PIL import Image

#: Longest side of the picture of an explanation, in pixels.
PICTURE_SIDE = 512


@dataclass(frozen=True)
class Contribution:
    """The part of one score in the ``ood_score``.

    Parameters
    ----------
    name : str
        Of the score: ``layer_layer4``, ``neighbors`` ...
    label : str
        What it looks at, in plain words.
    score : float
        In standard deviations of normal images, higher = more OOD.
    amount : float
        Its part of the ``ood_score``: the amounts of an explanation add up to it (to the global score, where that is
        joined with a local one).
    """

    name: str
    label: str
    score: float
    amount: float


@dataclass(frozen=True)
class Neighbor:
    """A normal image that is like the explained one.

    Parameters
    ----------
    path : str
        As it was given at training, or ``image 17`` (the number in the bank, from 1) where the model keeps no paths.
    distance : float
        >= 0, about 0 for an image of the same content. Compare it within one model only.
    thumbnail : PIL.Image.Image, optional
        A small RGB picture, if the model keeps one.
    """

    path: str
    distance: float
    thumbnail: Image.Image | None = None


@dataclass(frozen=True)
class Explanation:
    """What is known about one image and its verdict.

    Parameters
    ----------
    path : str
        The name of the image.
    status : {"ok", "unreadable", "error"}
        As in :class:`featdiff.Scores`.
    reason : str
        Why the image is unreadable or an error. Empty for most others; of some, a note.
    ood_score : float
        Higher = more OOD; NaN for an unreadable image.
    p_value : float
        In (0, 1], small = OOD; NaN for an unreadable image.
    is_ood : bool
        Whether the image is flagged.
    fpr : float
        The false-alarm rate behind ``is_ood``.
    threshold : float
        An ``ood_score`` above it is flagged.
    p_values : dict of str to float, default {}
        Where the verdict joins several p-values: each, by name (``global``, ``local``).
    layers : dict of str to float, default {}
        The score of each layer, in standard deviations of normal images, higher = more OOD.
    heads : tuple of Contribution, default ()
        What the ``ood_score`` is made of, largest amount first; empty where it is not a sum. Where it joins a global
        and a local score, these are the parts of the global one.
    reasons : tuple of str, default ()
        Why, in plain sentences, the most important first. Never empty for an image that could be read.
    size : (int, int), default (0, 0)
        Width and height of the original, upright, in pixels; 0 if it could not be read.
    picture : PIL.Image.Image, optional
        The original as RGB, upright, at most 512 pixels a side.
    heat : ndarray of shape (H, W), optional
        How strange each place of ``picture`` is, higher = more OOD; NaN where the network saw nothing. None for a model
        without a local score.
    heat_threshold : float, optional
        Places above it are strange: only ``fpr`` of the normal images have one.
    heat_top : float, optional
        Where the colour scale ends. It is fixed by normal images, and is the same for all images of a model.
    nearest : tuple of Neighbor, default ()
        The most similar normal images of the model's bank, nearest first.

    Raises
    ------
    UsageError
        A heat map that does not have the shape of the picture, or that has no threshold and top.

    Examples
    --------
    >>> from featdiff.verdicts.explanation import Explanation
    >>> explanation = Explanation(
    ...     path="tile.png",
    ...     status="ok",
    ...     reason="",
    ...     ood_score=4.2,
    ...     p_value=0.01,
    ...     is_ood=True,
    ...     fpr=0.05,
    ...     threshold=1.9,
    ...     layers={"stage1": 4.0},
    ...     reasons=("Fine texture is unusual.",),
    ... )
    >>> explanation.to_json()["reasons"]
    ['Fine texture is unusual.']
    """

    path: str
    status: str
    reason: str
    ood_score: float
    p_value: float
    is_ood: bool
    fpr: float
    threshold: float
    p_values: dict[str, float] = field(default_factory=dict)
    layers: dict[str, float] = field(default_factory=dict)
    heads: tuple[Contribution, ...] = ()
    reasons: tuple[str, ...] = ()
    size: tuple[int, int] = (0, 0)
    picture: Image.Image | None = None
    heat: np.ndarray | None = None
    heat_threshold: float | None = None
    heat_top: float | None = None
    nearest: tuple[Neighbor, ...] = ()

    def __post_init__(self) -> None:
        if self.heat is None:
            return
        if self.picture is None or self.heat.shape != self.picture.size[::-1]:
            raise UsageError("a heat map must have the height and width of the picture", argument="heat")
        if self.heat_threshold is None or self.heat_top is None:
            raise UsageError("a heat map needs heat_threshold and heat_top", argument="heat")

    @property
    def hottest(self) -> tuple[int, int] | None:
        """Column and row of the strangest place in the original, in pixels from its upper left corner."""
        if self.heat is None or np.isnan(self.heat).all():
            return None
        height, width = self.heat.shape
        row, column = divmod(int(np.nanargmax(self.heat)), width)
        return int((column + 0.5) / width * self.size[0]), int((row + 0.5) / height * self.size[1])

    def to_json(self) -> dict[str, Any]:
        """All but the pictures, as plain values for JSON; numbers that are missing or not finite are None.

        Returns
        -------
        dict
            Of the heat map it has ``threshold``, ``top``, ``max``, ``hottest`` (``[x, y]`` in pixels of the original),
            ``share_above`` (of the places seen, those above the threshold) and ``share_seen``.
        """
        return {
            "path": self.path,
            "status": self.status,
            "reason": self.reason,
            "ood_score": _plain(self.ood_score),
            "p_value": _plain(self.p_value),
            "is_ood": None if self.status == "unreadable" else bool(self.is_ood),
            "fpr": self.fpr,
            "threshold": _plain(self.threshold),
            "p_values": {name: _plain(value) for name, value in self.p_values.items()},
            "layers": {name: _plain(score) for name, score in self.layers.items()},
            "heads": [
                {"name": head.name, "label": head.label, "score": _plain(head.score), "amount": _plain(head.amount)}
                for head in self.heads
            ],
            "reasons": list(self.reasons),
            "size": list(self.size),
            "heat": self._heat_facts(),
            "nearest": [{"path": other.path, "distance": _plain(other.distance)} for other in self.nearest],
        }

    def _heat_facts(self) -> dict[str, Any] | None:
        if self.heat is None or self.heat_threshold is None or self.heat_top is None:
            return None
        seen = self.heat[~np.isnan(self.heat)]
        hottest = self.hottest
        return {
            "threshold": _plain(self.heat_threshold),
            "top": _plain(self.heat_top),
            "max": _plain(float(seen.max())) if len(seen) else None,
            "hottest": list(hottest) if hottest else None,
            "share_above": _plain(float((seen > self.heat_threshold).mean())) if len(seen) else None,
            "share_seen": _plain(len(seen) / self.heat.size),
        }


def _plain(value: float) -> float | None:
    if not np.isfinite(value):
        return None
    return float(f"{value:.7g}")

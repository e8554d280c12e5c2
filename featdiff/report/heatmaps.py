"""A heat map as colours that mean the same for all images of a model.

The scale ends where normal images say, the threshold is always in its middle, and below it nothing is yellow or red.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..verdicts.explanation import Explanation

# Where a colour lies on the scale (0.5 is the threshold) -> red, green, blue and how much it covers the picture.
_STOPS = (0.0, 0.499, 0.5, 0.7, 0.85, 1.0)
_COLOURS = (
    (0.13, 0.25, 0.42, 0.35),
    (0.56, 0.68, 0.80, 0.25),
    (1.00, 0.86, 0.40, 0.60),
    (0.97, 0.55, 0.15, 0.68),
    (0.84, 0.19, 0.13, 0.75),
    (0.50, 0.02, 0.15, 0.82),
)
_UNSEEN = (0.62, 0.62, 0.62, 0.75)


def overlay(explanation: Explanation) -> Image.Image | None:
    """The picture under the colours of its heat map, as RGB; None if there is no heat map.

    Parts that the network did not see are grey.
    """
    heat = explanation.heat
    if heat is None or explanation.picture is None:
        return None
    colours = colours_of(_places(explanation))
    colours[np.isnan(heat)] = _UNSEEN

    alpha = colours[..., 3:]
    picture = np.asarray(explanation.picture.convert("L").convert("RGB"), dtype=np.float32) / 255
    mixed = picture * (1 - alpha) + colours[..., :3] * alpha
    return Image.fromarray((mixed * 255).round().astype(np.uint8))


def _places(explanation: Explanation) -> np.ndarray:
    """Where each value of the heat map lies on the colour scale, in [0, 1]; 0.5 is the threshold."""
    assert explanation.heat is not None
    low, high = scale_ends(explanation)
    return ((explanation.heat - low) / (high - low)).clip(0, 1)


def scale_ends(explanation: Explanation) -> tuple[float, float]:
    """The ends of the colour scale; the threshold lies in the middle."""
    threshold = explanation.heat_threshold or 0.0
    above = max((explanation.heat_top or 0.0) - threshold, 1e-6)
    return threshold - above, threshold + above


def stops() -> list[tuple[float, str]]:
    """The colours of the scale for people: where each stands, in percent of the scale, and ``#rrggbb``."""
    found = []
    for place, (*channels, _) in zip(_STOPS, _COLOURS, strict=True):
        found.append((100 * place, "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)))
    return found


def colours_of(places: np.ndarray) -> np.ndarray:
    """Places on the scale (...) -> red, green, blue, cover (..., 4), float32 in [0, 1]."""
    known = np.nan_to_num(places)
    # exactly the threshold is still normal
    known = np.where((known > 0.499) & (known <= 0.5), 0.499, known)
    channels = [np.interp(known, _STOPS, channel) for channel in zip(*_COLOURS, strict=True)]
    return np.stack(channels, axis=-1).astype(np.float32)

"""Pictures of one product, with and without a small defect."""

from __future__ import annotations

import numpy as np
from PIL import Image

#: Height and width.
SIDE = 128


def plates(count: int, seed: int, defect: bool = False) -> list[Image.Image]:
    """Grey plates with a bright ring, in changing light; with a defect, a dark scratch in the lower right corner."""
    rng = np.random.default_rng(seed)
    down, across = np.mgrid[0:SIDE, 0:SIDE] / SIDE - 0.5
    ring = np.exp(-(((np.hypot(down, across) - 0.3) / 0.03) ** 2))
    found = []
    for _ in range(count):
        light = rng.uniform(90, 130) + rng.uniform(-30, 30) * down + rng.uniform(-30, 30) * across
        values = light + 60 * ring + rng.normal(0, 6, (SIDE, SIDE))
        if defect:
            values[96:108, 92:110] -= 70
        found.append(Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert("RGB"))
    return found

"""Arguments of a detector of the pixel mode that fits in seconds."""

from __future__ import annotations

from typing import Any

RECIPE: dict[str, Any] = {
    **{"epochs": 3, "min_steps": 0, "batch_size": 16, "patience": 99, "learning_rate": 2e-3, "check_steps": 1},
}


#: Arguments of a detector that fits in seconds: a real U-Net of 60,000 weights at 16 px.
PIXEL: dict[str, Any] = {
    **{"size": 16, "width": 8, "multipliers": [1, 2], "attention": [], "mask_blocks": 4},
    **{"repetitions": 2, "steps": 4, "distances": ["mse", "ssim"], "recipe": RECIPE, "fpr": 0.1, "calibration": 0.3},
}

"""The joining rooms: one method per file."""

from __future__ import annotations

import os
from typing import Any

from ..exceptions import ModelError
from ..files.model_folder import load_config, locate
from .base import BaseDetector
from .feature import Detector
from .pixel import PixelDetector
from .saved import VECTORS, saved_mode

__all__ = ["MODES", "BaseDetector", "Detector", "PixelDetector", "load_detector"]

#: Detectors of images by mode, as named by ``--mode`` and in saved models.
MODES: dict[str, type[Detector] | type[PixelDetector]] = {kind.mode: kind for kind in (Detector, PixelDetector)}


def load_detector(
    name: str | os.PathLike[str], *, local_files_only: bool = False, **options: Any
) -> Detector | PixelDetector:
    """Load a saved detector of images, of any mode; see its own ``from_pretrained`` for ``options`` and errors."""
    folder = locate(name, local_files_only)
    mode = saved_mode(load_config(folder), folder)
    if mode == VECTORS:
        raise ModelError(
            f"the model at {folder} was trained on vectors, not on images: featdiff score --features FILE -m {folder}, "
            "or featdiff.FeatureDiffusion.from_pretrained"
        )
    return MODES[mode].from_pretrained(folder, **options)

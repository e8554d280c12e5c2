"""The joining rooms: one method per file."""

from __future__ import annotations

import os
from typing import Any

from ..persist import load_config, locate
from .base import BaseDetector
from .feature_diffusion import Detector
from .loading import saved_mode
from .pixel_diffusion import PixelDetector

__all__ = ["MODES", "BaseDetector", "Detector", "PixelDetector", "load_detector"]

#: Detectors by mode, as named by ``--mode`` and in saved models.
MODES: dict[str, type[Detector] | type[PixelDetector]] = {kind.mode: kind for kind in (Detector, PixelDetector)}


def load_detector(
    name: str | os.PathLike[str], *, local_files_only: bool = False, **options: Any
) -> Detector | PixelDetector:
    """Load a saved detector of any mode; see its own ``from_pretrained`` for ``options`` and errors."""
    folder = locate(name, local_files_only)
    return MODES[saved_mode(load_config(folder), folder)].from_pretrained(folder, **options)

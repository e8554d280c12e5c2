"""featdiff: out-of-distribution detection in feature space. Start with :class:`Detector`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .detectors import Detector as Detector
    from .detectors import PixelDetector as PixelDetector
    from .detectors import load_detector as load_detector
    from .detectors.vectors import FeatureDiffusion as FeatureDiffusion
    from .exceptions import FeatdiffError as FeatdiffError
    from .features import FeatureExtractor as FeatureExtractor
    from .guard import Guard as Guard
    from .guard import Verdict as Verdict
    from .scores import Scores as Scores

__all__ = [
    "Detector",
    "FeatdiffError",
    "FeatureDiffusion",
    "FeatureExtractor",
    "Guard",
    "PixelDetector",
    "Scores",
    "Verdict",
    "load_detector",
]
_ROOMS = {
    "Detector": "detectors",
    "FeatdiffError": "exceptions",
    "FeatureDiffusion": "detectors.vectors",
    "FeatureExtractor": "features",
    "Guard": "guard",
    "PixelDetector": "detectors",
    "Scores": "scores",
    "Verdict": "guard",
    "load_detector": "detectors",
}


def __getattr__(name: str) -> Any:
    """Import on first use: ``featdiff --help`` must not wait for torch."""
    from importlib import import_module

    if name not in _ROOMS:
        raise AttributeError(f"module 'featdiff' has no attribute {name!r}")
    return getattr(import_module(f".{_ROOMS[name]}", __name__), name)

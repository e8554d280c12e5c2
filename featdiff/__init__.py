"""featdiff: out-of-distribution detection in feature space. Start with :class:`Detector`."""

from __future__ import annotations

import typing as _typing

if _typing.TYPE_CHECKING:
    from .detectors import Detector as Detector
    from .detectors import JoinedDetector as JoinedDetector
    from .detectors import PixelDetector as PixelDetector
    from .detectors import load_detector as load_detector
    from .detectors.audit import audit as audit
    from .detectors.estimator import FeatureDiffusion as FeatureDiffusion
    from .exceptions import FeatdiffError as FeatdiffError
    from .exported import ExportedDetector as ExportedDetector
    from .features.extractor import FeatureExtractor as FeatureExtractor
    from .guard.guard import Guard as Guard
    from .guard.guard import Verdict as Verdict
    from .verdicts.explanation import Explanation as Explanation
    from .verdicts.results import Scores as Scores

# Public name -> where it is defined.
_HOMES = {
    "Detector": "detectors",
    "Explanation": "verdicts.explanation",
    "ExportedDetector": "exported",
    "FeatdiffError": "exceptions",
    "FeatureDiffusion": "detectors.estimator",
    "FeatureExtractor": "features.extractor",
    "Guard": "guard.guard",
    "JoinedDetector": "detectors",
    "PixelDetector": "detectors",
    "Scores": "verdicts.results",
    "Verdict": "guard.guard",
    "audit": "detectors.audit",
    "load_detector": "detectors",
}
__all__ = [
    "Detector",
    "Explanation",
    "ExportedDetector",
    "FeatdiffError",
    "FeatureDiffusion",
    "FeatureExtractor",
    "Guard",
    "JoinedDetector",
    "PixelDetector",
    "Scores",
    "Verdict",
    "audit",
    "load_detector",
]


def __getattr__(name: str) -> object:
    """Import on first use: ``featdiff --help`` must not wait for torch."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'featdiff' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return list(__all__)

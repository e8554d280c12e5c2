"""The joining rooms: one method per file."""

from .feature_diffusion import Detector

__all__ = ["Detector"]

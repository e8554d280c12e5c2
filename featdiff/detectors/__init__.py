"""The joining room: one method a file."""

from __future__ import annotations

import os
from typing import Any, TypeAlias

from ..exceptions import ModelError
from ..files.model_folder import load, locate
from .base import BaseDetector
from .feature import Detector
from .joined import JoinedDetector
from .pixel import PixelDetector
from .pushing import Pushable
from .saved import VECTORS, saved_mode

__all__ = [
    "MODES",
    "BaseDetector",
    "Detector",
    "ImageDetector",
    "JoinedDetector",
    "PixelDetector",
    "Pushable",
    "load_detector",
]

#: Any detector of images.
ImageDetector: TypeAlias = Detector | JoinedDetector | PixelDetector
#: Detectors of images by mode, as saved models name it.
MODES: dict[str, type[Detector] | type[JoinedDetector] | type[PixelDetector]] = {
    kind.mode: kind for kind in (Detector, JoinedDetector, PixelDetector)
}


def load_detector(
    name: str | os.PathLike[str],
    *,
    local_files_only: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> ImageDetector:
    """Load a saved detector of images, of any mode.

    Parameters
    ----------
    name : path or str
        A folder, or a hub repository ``org/name`` or ``org/name@revision``.
    local_files_only : bool, default False
        Never ask the hub for the detector.
    revision : str, optional
        Branch, tag or commit on the hub; default: the main branch.
    token : str or bool, optional
        Of the hub; default: ``HF_TOKEN``, or that of ``hf auth login``.
    **options
        As for :meth:`featdiff.Detector.from_pretrained`, or that of its mode.

    Raises
    ------
    ModelError
        No model, a damaged one, or one of vectors.
    """
    folder = locate(name, local_files_only, revision, token)
    config, tensors = load(folder)
    mode = saved_mode(config, folder)
    if mode == VECTORS:
        raise ModelError(
            f"the model at {folder} was trained on vectors, not on images: score the rows of a file of features, or "
            "use featdiff.FeatureDiffusion.from_pretrained",
            argument="features",
        )
    return MODES[mode].from_loaded(folder, config, tensors, **options)

"""What an exported folder holds, and what the inputs, outputs and metadata of its files are called."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..exceptions import ModelError

#: File names by format.
FILES = {"onnx": "model.onnx", "pt2": "model.pt2"}
#: Raised when outputs or metadata change that scoring needs; files of another format are refused.
FORMAT_VERSION = 2
#: Input: preprocessed images (B, 3, H, W).
INPUT = "pixels"
#: Scores (B,) and p-values (B,), which every file gives.
OUTPUTS = ("ood_score", "p_value")
#: Score of each layer (B, L); the metadata of this name lists the layers.
LAYER_SCORES = "layer_scores"
#: Scores that the verdict joins (B, P), where it joins any; the metadata of this name lists them.
PART_SCORES = "part_scores"
#: Metadata: held-out scores by name, those of ``ood_score`` and of each part.
CALIBRATION = "calibration"
# Of a saved model's folder, as featdiff.files.model_folder calls it
_SAVED = "config.json"


def is_exported(path: str | os.PathLike[str]) -> bool:
    """Whether a path names an exported file, or a folder with one and without a saved model."""
    place = Path(path)
    if place.suffix in (".onnx", ".pt2") and not place.is_dir():
        return True
    if (place / _SAVED).exists():
        return False
    return any((place / name).is_file() for name in FILES.values())


def onnx_file(path: str | os.PathLike[str]) -> Path:
    """The .onnx file that is meant.

    Parameters
    ----------
    path : path
        A folder that ``featdiff export`` has written, or an .onnx file.

    Returns
    -------
    Path

    Raises
    ------
    ModelError
        There is none, or only a .pt2 file, which needs PyTorch.
    """
    place = Path(path)
    file = place / FILES["onnx"] if place.is_dir() else place
    has_torch_only = place.suffix == ".pt2" or (place / FILES["pt2"]).is_file()
    if file.suffix == ".onnx" and file.is_file():
        return file

    if has_torch_only:
        raise ModelError(f"{place} is for PyTorch alone (.pt2): export the model in the format onnx, too")
    if place.is_dir():
        raise ModelError(f"no {FILES['onnx']} in {place}: it is not a folder that featdiff export has written")
    raise ModelError(f"no .onnx file at {place}")


def check_format(facts: Mapping[str, Any], file: Path) -> None:
    """Refuse metadata of another program, and of older and newer formats (``ModelError``)."""
    if "featdiff_version" not in facts:
        raise ModelError(f"{file} was not written by featdiff export")
    version = facts.get("format_version", 1)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        problem = f"{file} has format {version}, this featdiff reads up to {FORMAT_VERSION}"
        raise ModelError(f"{problem}: pip install -U featdiff")
    if version < FORMAT_VERSION:
        problem = f"{file} has the old format {version}, this featdiff reads {FORMAT_VERSION}"
        raise ModelError(f"{problem}: export the model again")


def check_shape(shape: Sequence[int], sizes: Mapping[str, Mapping[str, int]], file: Path) -> None:
    """Refuse a batch (B, 3, H, W) of a height or width that a file does not take (``ModelError``)."""
    for side, (name, limits) in zip(shape[2:], sizes.items(), strict=True):
        if not limits["min"] <= side <= limits["max"] or side % limits["multiple_of"]:
            raise ModelError(
                f"{file} does not take a batch {tuple(shape)}: its {name} must be a multiple of "
                f"{limits['multiple_of']} from {limits['min']} to {limits['max']}"
            )

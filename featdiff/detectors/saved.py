"""Saved files -> settings and tensors of a detector, or an error that says what is wrong."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import numpy as np
import torch
from torch import Tensor, nn

from ..exceptions import ModelError, UsageError, WeightsError, first_line
from ..files.model_folder import check_tensors
from ..runtime.devices import resolve_device
from ..verdicts.calibration import Calibration, check_fpr
from .checks import is_whole
from .run_config import RUNTIME, Runtime

if TYPE_CHECKING:
    from ..data.decoding import Transform
    from ..features.extractor import FeatureExtractor
    from .base import BaseDetector

#: The mode of :class:`featdiff.FeatureDiffusion`, which looks at no images.
VECTORS = "vectors"
# Required entries of config.json: dotted name -> type.
_SHARED_KINDS: dict[str, Any] = {
    "featdiff_version": str,
    "images.different": int,
    "images.calibration": int,
    "images.calibration_groups": int,
    "validation_loss": (int, float),
    "training_seconds": (int, float),
    "settings": dict,
}
_KINDS: dict[str, dict[str, Any]] = {
    "feature": {
        "backbone.tag": str,
        "backbone.source": str,
        "backbone.fingerprint": str,
        "backbone.precision": str,
        "backbone.engine": str,
        "layers": dict,
        "images.bank": int,
    },
    "joined": {"encoders": list, "images.bank": int},
    "pixel": {"unet": dict, "scheduler": dict, "features": str},
    VECTORS: {
        "layers": dict,
        "width": int,
        "feature_names": list,
        "fpr": (int, float),
        "offset": (int, float),
        "images.bank": int,
    },
}
# Kinds of values that may stand for each other.
_ALIKE: tuple[Any, ...] = ((int, float), str, (list, tuple))
# The least that counts and times may be.
_LEAST = {
    "images.different": 1,
    "images.calibration": 1,
    "images.calibration_groups": 1,
    "images.bank": 0,
    "width": 1,
    "training_seconds": 0,
}


def saved_mode(config: dict[str, Any], folder: Path) -> str:
    """The mode of a saved detector (``ModelError`` if there is no such mode)."""
    mode = config.get("mode")
    if not isinstance(mode, str) or mode not in _KINDS:
        raise ModelError(f"the model at {folder} has an unknown mode {mode!r}: pip install -U featdiff")
    return str(mode)


def check_config(config: dict[str, Any], folder: Path, mode: str) -> None:
    """Refuse a saved config that lacks a part of a detector of this mode, or is of another mode (``ModelError``)."""
    saved = saved_mode(config, folder)
    if saved != mode:
        hint = "this one was trained on images" if mode == VECTORS else "featdiff.load_detector loads either"
        raise ModelError(f"the model at {folder} is of mode {saved}, not {mode}: {hint}")

    for path, kind in (_SHARED_KINDS | _KINDS[mode]).items():
        value: Any = config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None

        wrong_kind = not isinstance(value, kind) or isinstance(value, bool)
        if wrong_kind or (path in _LEAST and value < _LEAST[path]):
            raise _damaged(folder, f"config.json lacks {path}, or it is not what it should be")

    for encoder in config.get("encoders", []):
        if not isinstance(encoder, dict):
            raise _damaged(folder, "config.json: encoders are not what they should be")
        check_config(encoder, folder, "feature")

    changes = config.get("recalibrations", [])
    if not isinstance(changes, list) or not all(isinstance(change, dict) for change in changes):
        raise _damaged(folder, "config.json: recalibrations are not what they should be")
    for name, width in config.get("layers", {}).items():
        if not is_whole(width) or width < 1:
            raise _damaged(folder, f"config.json: layer {name!r} has no width")
    _check_saved_settings(config["settings"], folder)


def _check_saved_settings(settings: Mapping[str, Any], folder: Path) -> None:
    """Refuse settings that are not saved: how a detector runs is for who loads it to say, limits above all."""
    for name in settings:
        if name in RUNTIME:
            raise _damaged(folder, f"config.json: {name} is no setting of a saved model")


def check_rates(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse an impossible false-alarm rate, and names of columns that do not fit the width (``ModelError``)."""
    try:
        check_fpr(config["fpr"])
    except UsageError as error:
        raise _damaged(folder, str(error)) from None

    names = config["feature_names"]
    if len(names) not in (0, config["width"]) or not all(isinstance(name, str) for name in names):
        raise _damaged(folder, "config.json: feature_names are not a name for each column")


def check_arguments(saved: Mapping[str, Any], made: Callable[..., Any], folder: Path) -> None:
    """Refuse saved arguments of other kinds than their defaults: some classes take anything, and fail when called."""
    for name, parameter in inspect.signature(made).parameters.items():
        default = parameter.default
        if name not in saved or default is None or default is parameter.empty:
            continue
        if saved[name] is None and "None" in str(parameter.annotation):
            continue

        kinds = next(kinds for kinds in _ALIKE if isinstance(default, kinds))
        is_alike = isinstance(saved[name], kinds) and isinstance(saved[name], bool) == isinstance(default, bool)
        choices = get_args(parameter.annotation) if get_origin(parameter.annotation) is Literal else ()
        if not is_alike or (choices and saved[name] not in choices):
            raise _damaged(folder, f"config.json: {name} is not what it should be")


@contextmanager
def building(folder: Path) -> Iterator[None]:
    """Turn whatever building a detector from its saved settings raises into a ``ModelError``.

    Networks, schedules and transforms fail in many ways when settings are wrong, or when another version of a library
    knows others.
    """
    try:
        yield
    except (ModelError, WeightsError):
        raise
    except Exception as error:
        message = f"the model at {folder} is damaged or cannot be used here: {first_line(error)}"
        raise ModelError(message) from error


def _damaged(folder: Path, what: str) -> ModelError:
    return ModelError(f"the model at {folder} is damaged: {what}")


def feature_values(
    config: dict[str, Any],
    folder: Path,
    backbone: nn.Module | None,
    transform: Transform | None,
    weights: str | os.PathLike[str] | None,
    runtime: Mapping[str, Any],
) -> dict[str, Any]:
    """Settings of a saved detector; arguments of the user replace saved ones."""
    chosen = check_runtime(runtime)
    check_config(config, folder, "feature")

    values = {**config["settings"], **chosen}
    if weights:
        values["weights"] = weights

    if config["backbone"]["source"] != "module":
        return values
    if backbone is None:
        tag = config["backbone"]["tag"]
        raise ModelError(f"this detector was fitted on your own module: give it as backbone=... ({tag})")
    return values | {"backbone": backbone, "transform": transform}


def pixel_values(config: dict[str, Any], folder: Path, runtime: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a saved detector of the pixel mode."""
    chosen = check_runtime(runtime)
    check_config(config, folder, "pixel")
    return {**config["settings"], **chosen}


def check_runtime(runtime: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are set; refuses settings that cannot be changed when a detector is loaded, or are out of range."""
    for name in runtime:
        if name not in RUNTIME:
            raise UsageError(f"{name!r} cannot be changed when a detector is loaded; known: {', '.join(RUNTIME)}")

    chosen = {name: value for name, value in runtime.items() if value is not None}
    settings = Runtime(**chosen)
    resolve_device(settings.device)
    return chosen


def take_facts(detector: BaseDetector[Any], config: Mapping[str, Any]) -> None:
    """Set the attributes of a loaded detector that describe its training."""
    detector.n_images_ = config["images"]["different"]
    detector.validation_loss_ = config["validation_loss"]
    detector.training_seconds_ = config["training_seconds"]
    detector.recalibrations_ = tuple(config.get("recalibrations", ()))


def check_fingerprint(fingerprint: str, config: dict[str, Any]) -> None:
    """Refuse a backbone other than the one the detector was fitted with (``ModelError``)."""
    tag = config["backbone"]["tag"]
    expected = config["backbone"]["fingerprint"]
    if fingerprint != expected:
        raise ModelError(
            f"the backbone {tag} has other weights than this detector was fitted with (SHA-256 {fingerprint[:12]}, "
            f"expected {expected[:12]}): give the original weights, or train again"
        )


def widths_of(extractor: FeatureExtractor) -> dict[str, int]:
    """Layers of an extractor, in the order in which they were named, and their widths."""
    return {part.layer: part.width for part in extractor.layout.layers}


def check_layers(extractor: FeatureExtractor, config: dict[str, Any], folder: Path) -> None:
    """Refuse layers other than those the detector was fitted with (``ModelError``)."""
    if widths_of(extractor) != config["layers"]:
        raise ModelError(f"the layers of the backbone are not those the detector at {folder} was fitted with")


def take_digests(tensors: dict[str, Tensor], rows: int, folder: Path) -> np.ndarray:
    """Remove and return the digests (rows, 16) of the images in the bank."""
    digests = tensors.pop("bank_digests", None)
    if digests is None or digests.dtype != torch.uint8 or digests.shape != (rows, 16):
        raise _damaged(folder, "the digests of its bank are not those it was saved with")
    return digests.numpy()


def load_tensors(
    heads: nn.Module,
    tensors: dict[str, Tensor],
    images: Mapping[str, int],
    folder: Path,
    layers: Sequence[str] = (),
) -> Calibration:
    """Load the tensors into ``heads``, strictly, and return the calibration, with that of ``layers`` if it is there."""
    scores = tensors.pop("calibration", None)
    by_layer = _take_layers(tensors, layers, images["calibration"], folder)
    check_tensors(tensors, heads.state_dict(), folder)
    calibration = as_calibration(scores, images, folder, by_layer)
    heads.load_state_dict(tensors)
    return calibration


def _take_layers(
    tensors: dict[str, Tensor], layers: Sequence[str], count: int, folder: Path
) -> dict[str, np.ndarray] | None:
    """Remove and return the calibration scores (count,) of each layer; None: an older featdiff has not saved them."""
    scores = tensors.pop("calibration_of_layers", None) if layers else None
    if scores is None:
        return None
    if scores.dtype != torch.float32 or scores.shape != (len(layers), count) or bool((scores.diff() < 0).any()):
        raise _damaged(folder, "its calibration scores of layers are not those it was saved with")
    return dict(zip(layers, scores.numpy(), strict=True))


def as_calibration(
    scores: Tensor | None, images: Mapping[str, int], folder: Path, layers: Mapping[str, np.ndarray] | None = None
) -> Calibration:
    """The calibration that a saved tensor holds; one that cannot be right is refused (``ModelError``)."""
    expected = images["calibration"]
    if scores is None or scores.dtype != torch.float64 or scores.shape != (expected,):
        raise _damaged(folder, "its calibration scores are not those it was saved with")
    if bool((scores.diff() < 0).any()):
        raise _damaged(folder, "its calibration scores are not sorted")
    try:
        return Calibration(scores.numpy(), images["calibration_groups"], layers)
    except UsageError as error:
        raise _damaged(folder, str(error)) from None

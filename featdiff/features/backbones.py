"""A backbone by name, with weights from the embedded package, the hub, a file or a folder. Knows no detector.

Weights are always loaded strictly, and every backbone has a fingerprint: the SHA-256 of its weights.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.decoding import Transform
from ..exceptions import UsageError, WeightsError, did_you_mean, first_line
from .networks import fingerprint
from .weights import _EMBEDDED_TAG, DEFAULT_BACKBONE, _is_embedded, _is_finite, _load_embedded, load_weights


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

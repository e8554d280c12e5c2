"""The name of a backbone -> a frozen timm network with its weights and its preprocessing.

Weights come from the embedded package, the hub, a file or a folder. They are always loaded strictly, and every backbone
has a fingerprint: the SHA-256 of its weights.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.decoding import Transform
from ..data.preprocessing import INTERPOLATIONS
from ..exceptions import UsageError, WeightsError, did_you_mean, first_line
from .networks import fingerprint
from .recommended import defaults_of
from .views import PictureTransform, check_view, preprocessing, takes_size
from .weights import DEFAULT_BACKBONE, EMBEDDED_TAG, is_embedded, is_finite, load_embedded, load_weights


@dataclass(frozen=True)
class Backbone:
    """A frozen network in eval mode, with all that is needed to use it the same way again.

    Parameters
    ----------
    model : nn.Module
        The network, without its classifier.
    tag : str
        The name with its tag (``resnet50.a1_in1k``).
    source : str
        Where the weights came from: ``embedded``, ``hub``, ``local folder``, ``file NAME`` or ``random``.
    fingerprint : str
        SHA-256 of the weights, in hex.
    data_config : dict
        The preprocessing, as timm describes it; ``crop_mode`` may also be ``rectangle``
        (:class:`featdiff.data.preprocessing.Preprocessing`).
    transform : callable
        The preprocessing: RGB picture -> Tensor of shape (3, H, W).
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
    view: str = "whole",
    size: int | None = None,
) -> Backbone:
    """Create a timm backbone without its classifier, and load its weights strictly.

    Parameters
    ----------
    name : str, default "tf_efficientnet_lite0"
        A timm name with or without tag (``resnet50``, ``resnet50.tv_in1k``), ``hf-hub:org/name`` or
        ``local-dir:PATH``.
    weights : path, optional
        A safetensors file or a state dict to load instead of downloading (read without unpickling objects).
    pretrained : bool, default True
        False gives random weights, always the same ones. For tests only: scores mean nothing.
    model_args : mapping, optional
        Further arguments of ``timm.create_model``, for example ``{"pad_type": "same"}``.
    transform : mapping, optional
        Settings that replace those of the model's own preprocessing; keys as in ``TRANSFORM_KEYS``. ``crop_pct`` and
        ``crop_mode`` belong to ``view="crop"``.
    view : {"whole", "rectangle", "squash", "crop"}, default "whole"
        How much of a picture is seen. ``rectangle``: all of it, resized to about the input's area in about its own
        shape (:func:`featdiff.data.preprocessing.rectangle`). ``squash``: all of it, resized to the input's shape.
        ``whole``: a rectangle if the network takes images of any size of at least 64 pixels, else the squash; that is
        found out by trying. ``crop``: timm's own resize and centre crop, which leave out a quarter of a square picture
        and more of a long one.
    size : int, optional
        Side of the square input in pixels; a rectangle has about its area. Default: the network's own, or the one of
        :func:`featdiff.features.recommended.defaults_of` (DINOv2: 224, not 518). A network that
        takes one size only is built for this one, if it can be.

    Returns
    -------
    Backbone

    Raises
    ------
    UsageError
        The name, an argument or a setting is unknown or wrong.
    WeightsError
        The weights cannot be found or do not fit.

    Examples
    --------
    >>> backbone = load_backbone("test_resnet", pretrained=False)
    >>> backbone.tag, backbone.source
    ('test_resnet.r160_in1k', 'random')
    """
    check_name(name)
    check_view(view, size)
    overrides = _check_transform(transform or {}, view, size)
    tag = _resolved_tag(name)
    own_args, own_size = defaults_of(tag)
    if own_size and size is None and "img_size" not in (model_args or {}) and "input_size" not in overrides:
        size = own_size
        overrides["input_size"] = (3, size, size)

    args = {"num_classes": 0, **own_args, **(model_args or {})}
    model, source = _load_model(name, args, weights, pretrained)
    if size is not None and not _fits(model, size) and not _resized(model, size):
        model = _load_for_size(model, name, args, weights, pretrained, size)

    config = preprocessing(model, _own_config(model) | overrides, view, tag)
    return Backbone(
        model=model,
        tag=tag,
        source=source,
        fingerprint=fingerprint(model),
        data_config=config,
        transform=PictureTransform(config),
    )


def _own_config(model: nn.Module) -> dict[str, Any]:
    from timm.data import resolve_model_data_config

    return dict(resolve_model_data_config(model))


def _fits(model: nn.Module, size: int) -> bool:
    """Whether a network takes square images of this side."""
    return _own_config(model)["input_size"] == (3, size, size) or takes_size(model, size, size)


def _resized(model: nn.Module, size: int) -> bool:
    """Bring a transformer's positions to images of another side, if it can do that; its weights are loaded already."""
    patch = _patch_side(model)
    if not hasattr(model, "set_input_size") or size % patch:
        return False
    try:
        model.set_input_size(img_size=(size, size))  # type: ignore[operator]
    except Exception:  # windows that do not fit are refused in many ways
        return False
    model.requires_grad_(False)  # positions may be new parameters
    return takes_size(model, size, size)


def _patch_side(model: nn.Module) -> int:
    """Side of a transformer's patches in pixels; 1 for other networks."""
    side = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    return int(side[0] if isinstance(side, tuple) else side)


def _load_for_size(
    usual: nn.Module,
    name: str,
    args: dict[str, Any],
    weights: str | os.PathLike[str] | None,
    pretrained: bool,
    size: int,
) -> nn.Module:
    """A network of one size, in place of the ``usual`` one, built for this size (``UsageError`` if it cannot be)."""
    patch = _patch_side(usual)
    model = None
    if size % patch == 0:  # else a border would be left out without a word
        with suppress(UsageError, WeightsError):
            model, _ = _load_model(name, args | {"img_size": size}, weights, pretrained)
    if model is not None and takes_size(model, size, size):
        return model

    _, height, width = _own_config(usual)["input_size"]
    hint = f": the side must be a multiple of {patch}" if size % patch else ""
    problem = f"{name} takes images of {height} x {width} pixels, not of {size} x {size}{hint}"
    raise UsageError(problem, argument="size")


def _load_model(
    name: str, args: dict[str, Any], weights: str | os.PathLike[str] | None, pretrained: bool
) -> tuple[nn.Module, str]:
    """The network, frozen and in eval mode, and where its weights came from."""
    source = "hub"
    if weights is not None:
        model = _create(name, args)
        load_weights(model, weights)
        source = f"file {Path(weights).name}"
    elif not pretrained:
        model = _create(name, args)
        source = "random"
    elif is_embedded(name):
        model = _create(name, args)
        load_embedded(model)
        source = "embedded"
    elif name.startswith("local-dir:"):
        file = _weights_in(Path(name.partition(":")[2]))
        model = _create(name, args)
        load_weights(model, file)
        source = "local folder"
    else:
        if ":" not in name:
            with torch.device("meta"):  # wrong arguments are found before anything is downloaded
                _create(name, args)
        model = _create_pretrained(name, args)
    return model.eval().requires_grad_(False), source


def list_backbones(pattern: str = "") -> list[tuple[str, str]]:
    """All timm models with pretrained weights.

    Parameters
    ----------
    pattern : str, default ""
        Part of the names to list, or a pattern with ``*``. Default: all.

    Returns
    -------
    list of (str, str)
        Name with tag, and where its weights come from: ``embedded`` or ``hub``.

    Examples
    --------
    >>> list_backbones("tf_efficientnet_lite0")
    [('tf_efficientnet_lite0.in1k', 'embedded')]
    """
    import timm

    if pattern and "*" not in pattern:
        pattern = f"*{pattern}*"
    names = timm.list_models(pattern, pretrained=True)
    return [(name, "embedded" if name == EMBEDDED_TAG else "hub") for name in names]


def check_name(name: str) -> None:
    """Raise ``UsageError`` if timm does not know a name, or there is no such local folder.

    Parameters
    ----------
    name : str
        As :func:`load_backbone` takes it.

    Raises
    ------
    UsageError
        The name is unknown; similar names are suggested.
    """
    import timm

    if ":" in name:
        _check_location(name)
        return

    base, dot, tag = name.partition(".")
    if not timm.is_model(base):
        hint = did_you_mean(base, timm.list_models())
        raise UsageError(f"unknown backbone {base!r}{hint} (featdiff backbones lists all)", argument="backbone")
    tags = [full_name.partition(".")[2] for full_name in timm.list_pretrained(f"{base}.*")]
    if dot and tag not in tags:
        known = ", ".join(tags) or "none"
        raise UsageError(f"{base} has no weights tagged {tag!r}; it has {known}", argument="backbone")


def _check_location(name: str) -> None:
    """Check a name that says where the model is: ``hf-hub:org/name`` or ``local-dir:PATH``."""
    scheme, _, location = name.partition(":")
    if scheme not in ("local-dir", "hf-hub", "hf_hub"):
        raise UsageError(
            f"unknown backbone {name!r}: local-dir or hf-hub must stand before the colon", argument="backbone"
        )
    if not location:
        kind = "folder" if scheme == "local-dir" else "repository"
        raise UsageError(f"{name!r} needs a {kind} after the colon", argument="backbone")
    if scheme == "local-dir" and not Path(location).is_dir():
        raise UsageError(f"no folder at {location}", argument="backbone")


def _create(name: str, args: dict[str, Any]) -> nn.Module:
    """A network with random weights, always the same ones; the global random state is left alone."""
    import timm

    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return timm.create_model(name, pretrained=False, **args)
    except Exception as error:  # networks raise errors of many kinds for arguments that they do not know
        raise UsageError(
            f"{name} cannot be built with these arguments: {first_line(error)}", argument="model_args"
        ) from None


def _weights_in(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise WeightsError(f"no config.json in {folder}: it is not a timm model folder")
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(f"no model.safetensors or pytorch_model.bin in {folder}")


def _create_pretrained(name: str, args: dict[str, Any]) -> nn.Module:
    """A network with weights from the hub, built with its classifier: without it, timm does not load strictly."""
    import timm

    tag = _resolved_tag(name)
    if ":" not in name and not timm.list_pretrained(f"{name.partition('.')[0]}.*"):
        raise WeightsError(f"timm has no pretrained weights for {name}: give weights=FILE", argument="weights")

    with_classifier = {key: value for key, value in args.items() if key != "num_classes"}
    try:
        with torch.random.fork_rng(devices=[]):
            model = timm.create_model(name, pretrained=True, **with_classifier)
        if model.num_classes:
            model.reset_classifier(0)
    except RuntimeError as error:
        raise WeightsError(f"the weights for {tag} do not fit: {' '.join(str(error).split())[:300]}") from None
    except Exception as error:
        raise WeightsError(
            f"no weights for {tag}: {_reason(error)}. Three ways out: connect to the hub once (they are cached after), "
            f"give a local copy as weights=FILE, or use the embedded default backbone={DEFAULT_BACKBONE}"
        ) from None

    broken = [key for key, value in model.state_dict().items() if not is_finite(value)]
    if broken:
        raise WeightsError(f"the weights for {tag} hold NaN or infinite values (first in {broken[0]})")
    return model


def _resolved_tag(name: str) -> str:
    """The name with the tag of its weights."""
    import timm

    if ":" in name:
        return name
    config = timm.get_pretrained_cfg(name)
    base = name.partition(".")[0]
    return f"{base}.{config.tag}" if config and config.tag else base


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError | ConnectionError):
        return "not in the local cache, and the hub cannot be reached"
    return first_line(error)


def _check_transform(overrides: Mapping[str, Any], view: str, size: int | None) -> dict[str, Any]:
    """The settings with ``size``, lists as tuples; ``UsageError`` names the first one that is unknown or wrong."""
    checked: dict[str, Any] = {}
    for key, value in overrides.items():
        if key not in _TRANSFORM_CHECKS:
            hint = did_you_mean(key, list(TRANSFORM_KEYS))
            known = ", ".join(TRANSFORM_KEYS)
            raise UsageError(f"unknown transform setting {key!r}{hint}; known: {known}", argument="transform")

        checked[key] = tuple(value) if isinstance(value, list) else value
        is_valid, description = _TRANSFORM_CHECKS[key]
        if not is_valid(checked[key]):
            raise UsageError(
                f"transform setting {key} must be {description}, not {checked[key]!r}", argument="transform"
            )
        if key in _OF_CROPS and view != "crop":
            raise UsageError(f"transform setting {key} belongs to view='crop'", argument="transform")

    if size is not None and checked.setdefault("input_size", (3, size, size)) != (3, size, size):
        raise UsageError(f"size {size} contradicts the transform setting input_size: drop one", argument="size")
    return checked


def _are_three(value: Any, is_valid: Callable[[Any], bool]) -> bool:
    """Whether a value is a tuple of three valid numbers."""
    if not isinstance(value, tuple) or len(value) != 3:
        return False
    return all(isinstance(number, int | float) and is_valid(number) for number in value)


def _is_input_size(value: Any) -> bool:
    return _are_three(value, lambda n: isinstance(n, int) and n > 0) and value[0] == 3


def _is_mean(value: Any) -> bool:
    return _are_three(value, math.isfinite)


def _is_std(value: Any) -> bool:
    return _are_three(value, lambda n: math.isfinite(n) and n > 0)


def _is_crop_share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value <= 4


# Settings that only a crop has.
_OF_CROPS = ("crop_pct", "crop_mode")
_CROP_MODES = ("center", "squash", "border")
# Keys of timm's data config that a user may override: whether a value is valid, and what is, in words.
_TRANSFORM_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "input_size": (_is_input_size, "3, height, width"),
    "interpolation": (lambda value: value in INTERPOLATIONS, f"one of {', '.join(INTERPOLATIONS)}"),
    "mean": (_is_mean, "three numbers"),
    "std": (_is_std, "three numbers above 0"),
    "crop_pct": (_is_crop_share, "a number above 0"),
    "crop_mode": (lambda value: value in _CROP_MODES, f"one of {', '.join(_CROP_MODES)}"),
}
#: Settings of a backbone's preprocessing that may be replaced.
TRANSFORM_KEYS = tuple(_TRANSFORM_CHECKS)

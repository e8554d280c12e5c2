"""Checks of a detector's arguments, so that nonsense is refused before any work."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from torch import nn

from ..diffusion.training import Recipe
from ..exceptions import UsageError, did_you_mean
from ..runtime.devices import resolve_device
from ..scores.distances import DISTANCES
from ..scores.fusion import FUSIONS
from ..scores.logits import LOGIT_HEADS
from ..scores.neighbors import check_backend, check_coreset
from ..verdicts.calibration import check_fpr

#: Arguments that say how to run, not what the model is: they are not saved, and may differ when it is loaded.
RUNTIME = ("device", "image_batch", "workers", "max_pixels", "cache")
_WHOLE = ("hidden_max", "blocks", "timesteps", "draws", "bank_size", "image_batch", "max_pixels")
_WHOLE_PIXEL = (
    *("width", "blocks", "timesteps", "mask_blocks", "mask_patch", "repetitions", "steps", "resamplings"),
    *("image_batch", "max_pixels"),
)
#: Precisions that ``accelerate`` offers for training.
PRECISIONS = ("no", "bf16")


def check_arguments(arguments: Mapping[str, Any], heads: Sequence[str]) -> None:
    """Kinds and ranges of the constructor's arguments (``UsageError`` names the first that is wrong)."""
    _check_shared(arguments, _WHOLE)
    if arguments["stride"] is not None:
        _check_whole("stride", arguments["stride"])
    if not _is_number(arguments["hidden_ratio"]) or arguments["hidden_ratio"] <= 0:
        raise UsageError(f"hidden_ratio must be a number above 0, not {arguments['hidden_ratio']!r}")
    if not isinstance(arguments["backbone"], str | nn.Module):
        raise UsageError(f"backbone must be a name or a module, not {arguments['backbone']!r}")
    for name in ("joint", "pretrained"):
        if not isinstance(arguments[name], bool):
            raise UsageError(f"{name} must be true or false, not {arguments[name]!r}")
    _check_looking(arguments, arguments["timesteps"] - 1)
    check_backend(arguments["backend"])
    if arguments["fusion"] not in FUSIONS:
        raise UsageError(f"unknown fusion {arguments['fusion']!r}; known: {', '.join(FUSIONS)}")
    if arguments["head"] not in heads:
        raise UsageError(f"unknown head {arguments['head']!r}; known: {', '.join(heads)}")
    _check_classifier(arguments)


def _check_classifier(arguments: Mapping[str, Any]) -> None:
    """What only a module of the user's own has: a size, and logits."""
    size, names = arguments["input_size"], arguments["logit_heads"]
    if size is not None and (not _is_list(size) or len(size) != 3 or not all(_is_whole(n) and n > 0 for n in size)):
        raise UsageError(f"input_size must be three whole numbers (channels, height, width), not {size!r}")
    if not _is_list(names) or len(set(names)) < len(names) or not all(name in LOGIT_HEADS for name in names):
        raise UsageError(f"logit_heads must be some of {', '.join(LOGIT_HEADS)}, not {names!r}")
    if names and not isinstance(arguments["backbone"], nn.Module):
        raise UsageError("logit_heads need logits: give a classifier (a module) as backbone, or use featdiff.Guard")
    if names and arguments["head"] != "fused":
        raise UsageError("logit_heads are joined by head='fused' only")


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def check_pixel_arguments(arguments: Mapping[str, Any]) -> None:
    """The same for the pixel mode; what masks, networks and samplers say themselves is left to them."""
    optional = [name for name in ("size", "channels") if arguments[name] is not None]
    _check_shared(arguments, (*_WHOLE_PIXEL, *optional))
    for name in ("multipliers", "attention"):
        values = arguments[name]
        if (
            not isinstance(values, Sequence)
            or isinstance(values, str)
            or not all(_is_whole(v) and v > 0 for v in values)
        ):
            raise UsageError(f"{name} must be whole numbers above 0, not {values!r}")
    if not arguments["multipliers"]:
        raise UsageError("multipliers must name at least one level")
    if not _is_number(arguments["dropout"]) or not 0 <= arguments["dropout"] < 1:
        raise UsageError(f"dropout is a share between 0 and 1, not {arguments['dropout']!r}")
    if not _is_number(arguments["mask_ratio"]):
        raise UsageError(f"mask_ratio must be a number, not {arguments['mask_ratio']!r}")
    if not isinstance(arguments["flip"], bool):
        raise UsageError(f"flip must be true or false, not {arguments['flip']!r}")
    names = arguments["distances"]
    listed = isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(n, str) for n in names)
    if not listed or not names or len(set(names)) < len(names):
        raise UsageError(f"distances must be a list of different names, not {names!r}")
    for name in names:
        if name not in DISTANCES:
            raise UsageError(
                f"unknown distance {name!r}{did_you_mean(str(name), list(DISTANCES))}; known: {', '.join(DISTANCES)}"
            )
    if arguments["mixed_precision"] not in PRECISIONS:
        raise UsageError(f"unknown mixed_precision {arguments['mixed_precision']!r}; known: {', '.join(PRECISIONS)}")
    for name in ("pretrained", "mask", "sampler", "aggregate", "trunk", "backbone"):
        if not isinstance(arguments[name], str) and not (name == "pretrained" and arguments[name] is None):
            raise UsageError(f"{name} must be text, not {arguments[name]!r}")


def check_vector_arguments(arguments: Mapping[str, Any]) -> None:
    """The same for :class:`featdiff.FeatureDiffusion`; layers are left to who knows the columns."""
    for name in ("hidden_max", "blocks", "draws", "bank_size"):
        _check_whole(name, arguments[name])
    check_share("calibration", arguments["calibration"], "rows")
    check_fpr(arguments["fpr"])
    _check_looking(arguments, 99)
    share = arguments["contamination"]
    if share != "auto" and (not _is_number(share) or not 0 < share <= 0.5):
        raise UsageError(f"contamination must be 'auto' or a share above 0 and up to 0.5, not {share!r}")


def _check_looking(arguments: Mapping[str, Any], last: int) -> None:
    """From which times up to ``last`` denoisers are asked, and what banks hold."""
    times = arguments["start_times"]
    if not isinstance(times, Sequence) or not times or not all(_is_whole(t) and 0 <= t <= last for t in times):
        raise UsageError(f"start_times must be whole numbers in 0 .. {last}, not {times!r}")
    if not _is_whole(arguments["neighbors"]) or arguments["neighbors"] < 0:
        raise UsageError(f"neighbors must be a whole number, 0 or more, not {arguments['neighbors']!r}")
    if arguments["bank_size"] < arguments["neighbors"]:
        raise UsageError(f"a bank of {arguments['bank_size']} vectors has no {arguments['neighbors']} neighbours")
    check_coreset(arguments["coreset"])


def check_share(name: str, share: object, of: str = "images") -> None:
    """Refuse anything but a number between 0 and 0.5 (``UsageError``)."""
    if not _is_number(share) or not 0 < share < 0.5:
        raise UsageError(f"{name} is a share of the {of} between 0 and 0.5, not {share!r}")


def _check_shared(arguments: Mapping[str, Any], whole: Sequence[str]) -> None:
    """What detectors of all modes take, and ``whole`` numbers above 0."""
    for name in whole:
        _check_whole(name, arguments[name])
    if arguments["workers"] is not None:
        _check_whole("workers", arguments["workers"])
    if not _is_whole(arguments["seed"]) or not 0 <= arguments["seed"] < 2**63:
        raise UsageError(f"seed must be a whole number of 0 or more, not {arguments['seed']!r}")
    for name in ("weights", "cache"):
        if not isinstance(arguments[name], str | os.PathLike | None):
            raise UsageError(f"{name} must be a path, not {arguments[name]!r}")
    for name in ("calibration", "validation"):
        check_share(name, arguments[name])
    check_fpr(arguments["fpr"])


def _check_whole(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{name} must be a whole number above 0, not {value!r}")


def check_runtime(arguments: Mapping[str, Any]) -> None:
    """Only arguments that say how to run may be given when a detector is loaded."""
    for name in arguments:
        if name not in RUNTIME:
            raise UsageError(f"{name!r} cannot be changed when a detector is loaded; known: {', '.join(RUNTIME)}")
    resolve_device(arguments.get("device", "cpu"))
    for name in ("image_batch", "workers", "max_pixels"):
        if arguments.get(name) is not None:
            _check_whole(name, arguments[name])


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def make_recipe(given: Recipe | Mapping[str, Any] | None) -> Recipe:
    """A recipe from its fields; unknown ones are refused."""
    if isinstance(given, Recipe):
        return given
    if not isinstance(given, Mapping | None):
        raise UsageError(f"recipe must be a table of settings, not {given!r}")
    known = list(Recipe.__dataclass_fields__)
    for name in given or {}:
        if name not in known:
            raise UsageError(f"unknown recipe setting {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    return Recipe(**(given or {}))

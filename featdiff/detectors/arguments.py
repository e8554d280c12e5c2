"""Checks of a detector's arguments, so that nonsense is refused before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..calibration import check_fpr
from ..exceptions import UsageError, did_you_mean
from ..training import Recipe


def check_arguments(arguments: Mapping[str, Any], heads: Sequence[str]) -> None:
    """Ranges of the constructor's arguments (``UsageError`` names the first that is wrong)."""
    positive = ("hidden_ratio", "hidden_max", "blocks", "timesteps", "draws", "image_batch", "max_pixels")
    for name in (*positive, "stride", "workers"):
        value = arguments[name]
        if value is None and name not in positive:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise UsageError(f"{name} must be a number above 0, not {value!r}")
    times = arguments["start_times"]
    if not times or not all(isinstance(t, int) and 0 <= t < arguments["timesteps"] for t in times):
        raise UsageError(f"start_times must lie in 0 .. {arguments['timesteps'] - 1}, not {times!r}")
    if arguments["head"] not in heads:
        raise UsageError(f"unknown head {arguments['head']!r}; known: {', '.join(heads)}")
    for name in ("calibration", "validation"):
        if not 0 < arguments[name] < 0.5:
            raise UsageError(f"{name} is a share of the images between 0 and 0.5, not {arguments[name]!r}")
    check_fpr(arguments["fpr"])


def make_recipe(given: Recipe | Mapping[str, Any] | None) -> Recipe:
    """A recipe from its fields; unknown ones are refused."""
    if isinstance(given, Recipe):
        return given
    known = list(Recipe.__dataclass_fields__)
    for name in given or {}:
        if name not in known:
            raise UsageError(f"unknown recipe setting {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    return Recipe(**(given or {}))


def resolve_device(name: str) -> torch.device:
    """``auto`` takes CUDA, then MPS, then the CPU; anything else must exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"no device {name!r}: {str(error).splitlines()[0]}") from None

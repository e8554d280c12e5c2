"""A TOML file -> arguments of a detector and names of images; unknown keys are refused."""

from __future__ import annotations

import importlib.resources
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TABLES = {"detector": "arguments of a detector", "data": "images = [...]"}
FEATURE = "feature"


@dataclass
class Config:
    """``mode``: which kind of detector; ``detector``: its arguments; ``images``: what to train on, may be empty."""

    mode: str = FEATURE
    detector: dict[str, Any] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)


def preset_folder() -> Path:
    """Where the presets lie, installed or in a checkout."""
    try:
        return Path(str(importlib.resources.files(f"{__package__}.configs")))
    except ModuleNotFoundError:  # python -m cli
        return Path(__file__).parents[1] / "configs"


def load_config(name: str) -> Config:
    """A preset by name, or a TOML file; relative image paths count from the file's folder.

    The table ``[detector]`` holds arguments of the detector of its ``mode`` (default: feature).

    Raises
    ------
    UsageError
        No such preset or file, not TOML, an unknown mode, or an unknown key.
    """
    from featdiff.detectors.config import SETTINGS
    from featdiff.exceptions import UsageError, did_you_mean
    from featdiff.files.toml import check_keys, read_toml

    presets = sorted(file.stem for file in preset_folder().glob("*.toml"))
    file = preset_folder() / f"{name}.toml" if name in presets else Path(name)
    if not os.path.exists(file):  # unlike Path.exists, never an error
        hint = did_you_mean(name, presets)
        raise UsageError(f"no config file or preset {name!r}{hint}; presets: {', '.join(presets)}")
    content = read_toml(file)
    detector, data = content.pop("detector", {}), content.pop("data", {})
    for name, table in (("detector", detector), ("data", data)):
        if not isinstance(table, dict):
            raise UsageError(f"{file}: {name} must be a table, [{name}]")
    mode = detector.pop("mode", FEATURE)
    if not isinstance(mode, str) or mode not in SETTINGS:
        raise UsageError(
            f"{file}: unknown mode {mode!r}{did_you_mean(str(mode), list(SETTINGS))}; known: {', '.join(SETTINGS)}"
        )
    known = SETTINGS[mode].names()
    for kind, keys, valid in (
        ("table", content, list(_TABLES)),
        ("key", detector, known),
        ("key", data, ["images"]),
    ):
        check_keys(keys, valid, str(file), kind)
    images = data.get("images", [])
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise UsageError(f"{file}: images must be a path or a list of paths, not {images!r}")
    return Config(mode, detector, [str(file.parent / image) for image in images])

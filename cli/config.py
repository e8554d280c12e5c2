"""A TOML file -> arguments of a detector and names of images; unknown keys are refused."""

from __future__ import annotations

import importlib.resources
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TABLES = {"detector": "arguments of a detector", "data": "images = [...], groups = ..."}
FEATURE = "feature"


@dataclass
class Config:
    """What to train, and on what.

    ``mode``: which kind of detector; ``detector``: its arguments; ``images``: what to train on, may be empty;
    ``groups``: which of the images belong together.
    """

    mode: str = FEATURE
    detector: dict[str, Any] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)
    groups: str | None = None


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

    file = _find(name)
    content = read_toml(file)
    detector = _table(content, "detector", file)
    data = _table(content, "data", file)

    mode = detector.pop("mode", FEATURE)
    if not isinstance(mode, str) or mode not in SETTINGS:
        hint = did_you_mean(str(mode), list(SETTINGS))
        raise UsageError(f"{file}: unknown mode {mode!r}{hint}; known: {', '.join(SETTINGS)}")
    check_keys(content, list(_TABLES), str(file), "table")
    check_keys(detector, SETTINGS[mode].names(), str(file))
    check_keys(data, ["images", "groups"], str(file))

    images = data.get("images", [])
    if isinstance(images, str):
        images = [images]
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise UsageError(f"{file}: images must be a path or a list of paths, not {images!r}")
    groups = data.get("groups")
    if not isinstance(groups, str | None):
        raise UsageError(f"{file}: groups must be text, not {groups!r}")
    if groups is not None and groups.lower().endswith((".csv", ".tsv")):
        groups = str(file.parent / groups)
    return Config(mode, detector, [str(file.parent / image) for image in images], groups)


def _find(name: str) -> Path:
    """The file of a preset, or the file of this name."""
    from featdiff.exceptions import UsageError, did_you_mean

    presets = {file.stem: file for file in sorted(preset_folder().glob("*.toml"))}
    file = presets.get(name, Path(name))
    if not os.path.exists(file):  # unlike Path.exists, never an error
        hint = did_you_mean(name, list(presets))
        raise UsageError(f"no config file or preset {name!r}{hint}; presets: {', '.join(presets)}", argument="config")
    return file


def _table(content: dict[str, Any], name: str, file: Path) -> dict[str, Any]:
    """Take a table out of a file's content; empty if there is none."""
    from featdiff.exceptions import UsageError

    table = content.pop(name, {})
    if not isinstance(table, dict):
        raise UsageError(f"{file}: {name} must be a table, [{name}]")
    return table

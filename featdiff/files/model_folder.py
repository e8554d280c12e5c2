"""A fitted detector <-> a folder of ``config.json`` and ``model.safetensors``. No pickle; strict; atomic."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..exceptions import ModelError, UsageError
from .atomic import _write
from .hub import find_folder, is_repository

#: Raised when the layout of the folder changes; a newer one is refused.
FORMAT_VERSION = 4
CONFIG, TENSORS = "config.json", "model.safetensors"


def save(folder: str | os.PathLike[str], config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write config and tensors; a featdiff model already in the folder is replaced, other files in it stay.

    Raises
    ------
    UsageError
        The folder holds something other than a featdiff model.
    ModelError
        The disk is full or the place cannot be written; nothing is left behind, an older model stays whole.
    """
    check_target(folder)
    write_pair(folder, {"format": "featdiff", "format_version": FORMAT_VERSION} | config, tensors)


def write_pair(folder: str | os.PathLike[str], config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write config and tensors, whatever is in the folder.

    Both files are written in full under other names before either takes its place, and both carry the same ``id``, so
    that a pair left half replaced by a crash is refused by :func:`check_pair`.

    Raises
    ------
    ModelError
        The disk is full or the place cannot be written; nothing is left behind, an older pair stays whole.
    """
    from safetensors.torch import save as to_bytes

    target = Path(folder)
    plain = {name: value.cpu().contiguous() for name, value in tensors.items()}
    identity = hashlib.sha256(json.dumps(config).encode() + to_bytes(plain)).hexdigest()[:16]
    text = json.dumps({**config, "id": identity}, indent=2) + "\n"
    data = to_bytes(plain, metadata={"id": identity})
    existed = target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        staged = {name: target / f".{name}.{uuid.uuid4().hex}.tmp" for name in (TENSORS, CONFIG)}
        try:
            _write(staged[TENSORS], data)
            _write(staged[CONFIG], text.encode())
            for name, file in staged.items():
                file.replace(target / name)
        finally:
            for file in staged.values():
                file.unlink(missing_ok=True)
            if not existed and not any(target.iterdir()):
                target.rmdir()
    except OSError as error:
        raise ModelError(f"the model could not be written to {target}: {error.strerror or error}") from None


def check_pair(folder: str | os.PathLike[str], config: dict[str, Any]) -> None:
    """Refuse a config and tensors of different models (``ModelError``; tensors without an ``id`` pass)."""
    from safetensors import safe_open

    with safe_open(Path(folder) / TENSORS, framework="pt") as file:
        identity = (file.metadata() or {}).get("id")
    if identity not in (None, config.get("id")):
        raise ModelError(f"the model at {folder} is damaged: {CONFIG} and {TENSORS} were not written together")


def check_target(
    folder: str | os.PathLike[str], is_ours: Callable[[Path], bool] | None = None, what: str = "featdiff model"
) -> None:
    """Refuse to write into anything but an empty folder or what ``is_ours`` (default: an earlier featdiff model).

    Raises
    ------
    UsageError
        There is something else, and it is not replaced.
    """
    target, is_ours = Path(folder), is_ours or is_model
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or is_ours(target))):
        raise UsageError(f"{target} exists and is not a {what}; choose another folder with -o")


def is_model(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder holds a saved detector (many other tools call their files the same)."""
    try:
        config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("format") == "featdiff"


def load(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read config and tensors, and check that they are whole.

    Raises
    ------
    ModelError
        No model there, a damaged file, a newer format, or NaN in a tensor.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    config = load_config(folder)
    try:
        with safe_open(folder / TENSORS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ModelError(f"the model at {folder} is damaged: {error}") from None
    except OSError as error:
        raise ModelError(f"the model at {folder} cannot be read: {error.strerror}") from None
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ModelError(f"the model at {folder} is damaged: tensor {name} holds NaN or infinite values")
    check_pair(folder, config)
    return config, tensors


def load_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the config alone; ``ModelError`` as for :func:`load`."""
    folder = Path(folder)
    if not ((folder / CONFIG).is_file() and (folder / TENSORS).is_file()):
        what = "no such folder" if not folder.exists() else f"it has no {CONFIG} and {TENSORS}"
        raise ModelError(f"no featdiff model at {folder}: {what}. Make one with: featdiff train IMAGES -o {folder}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"the model at {folder} is damaged: {error}") from None
    except OSError as error:
        raise ModelError(f"the model at {folder} cannot be read: {error.strerror}") from None
    check_config(config, folder)
    return dict(config)


def check_config(config: Any, folder: Path) -> None:
    """Refuse what is not ours or newer than we are."""
    if not isinstance(config, dict) or config.get("format") != "featdiff":
        raise ModelError(f"{folder / CONFIG} was not written by featdiff")
    version = config.get("format_version")
    if isinstance(version, int) and version < FORMAT_VERSION:
        raise ModelError(
            f"the model at {folder} has the old format {version}, this featdiff writes {FORMAT_VERSION}: train it again"
        )
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ModelError(
            f"the model at {folder} has format {version}, this featdiff reads up to {FORMAT_VERSION}: "
            "pip install -U featdiff"
        )


def check_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor], folder: Path) -> None:
    """Compare names, shapes and types with those of a fresh state dict (``ModelError`` names the first difference)."""
    both = [name for name in expected if name in tensors]
    for kind, names in (
        ("lacks tensor", sorted(set(expected) - set(tensors))),
        ("has an unknown tensor", sorted(set(tensors) - set(expected))),
        ("has another shape for tensor", [name for name in both if tensors[name].shape != expected[name].shape]),
        ("has another type for tensor", [name for name in both if tensors[name].dtype != expected[name].dtype]),
    ):
        if names:
            raise ModelError(f"the model at {folder} is damaged: {TENSORS} {kind} {names[0]}")


def locate(name: str | os.PathLike[str], local_files_only: bool = False) -> Path:
    """A folder as it is, or the local copy of a hub repository ``org/name`` (downloaded when not cached).

    Raises
    ------
    ModelError
        Neither a folder nor a repository that can be had.
    """
    if not is_repository(name):
        return Path(name)  # what is wrong with it, if anything, is said by those who read it
    return find_folder(name, [CONFIG, TENSORS], lambda why: ModelError(f"no model {name}: {why}"), local_files_only)

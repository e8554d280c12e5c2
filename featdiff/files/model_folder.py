"""A fitted detector <-> a folder of ``config.json`` and ``model.safetensors``. No pickle; strict; atomic."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..exceptions import ModelError, UsageError
from .atomic import write_together
from .hub import find_folder, is_repository

#: Raised when the layout of the folder changes; a newer one is refused.
FORMAT_VERSION = 5
CONFIG = "config.json"
TENSORS = "model.safetensors"


# ---- writing ----


def save(folder: str | os.PathLike[str], config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the config and tensors of a detector.

    Parameters
    ----------
    folder : str or Path
        Made when missing. A featdiff model already in it is replaced; other files beside that stay.
    config : dict
        Anything that JSON can hold.
    tensors : dict of str to Tensor

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

    Both files are on disk in full before either takes its place, and both carry the same ``id``, so that
    :func:`check_pair` refuses a pair of which a crash has replaced only one.

    Parameters
    ----------
    folder, config, tensors
        As for :func:`save`.

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
        try:
            write_together({target / TENSORS: data, target / CONFIG: text.encode()})
        finally:
            if not existed and not any(target.iterdir()):
                target.rmdir()
    except OSError as error:
        raise ModelError(f"the model could not be written to {target}: {error.strerror or error}") from None


def check_target(
    folder: str | os.PathLike[str], is_ours: Callable[[Path], bool] | None = None, what: str = "featdiff model"
) -> None:
    """Refuse to write into a folder that holds something else.

    Parameters
    ----------
    folder : str or Path
        An empty or missing folder passes.
    is_ours : callable, optional
        Whether what is in a folder may be replaced; by default an earlier featdiff model may.
    what : str, default "featdiff model"
        What may be replaced, for the message.

    Raises
    ------
    UsageError
        There is something else, and it is not replaced.
    """
    target = Path(folder)
    is_ours = is_ours or is_model
    if not target.exists():
        return
    if not (target.is_dir() and (not any(target.iterdir()) or is_ours(target))):
        raise UsageError(f"{target} exists and is not a {what}; choose another folder", argument="folder")


# ---- reading ----


def is_model(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder holds a saved detector (many other tools call their files the same)."""
    try:
        config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("format") == "featdiff"


def load(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read config and tensors, and check that they are whole.

    Parameters
    ----------
    folder : str or Path

    Returns
    -------
    config : dict
    tensors : dict of str to Tensor

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
    """Read the config alone.

    Raises
    ------
    ModelError
        No model there, a damaged config, or a format that this featdiff does not read.
    """
    folder = Path(folder)
    if not ((folder / CONFIG).is_file() and (folder / TENSORS).is_file()):
        problem = f"it has no {CONFIG} and {TENSORS}" if folder.exists() else "no such folder"
        raise ModelError(f"no featdiff model at {folder}: {problem}. Train one first: featdiff train IMAGES")

    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"the model at {folder} is damaged: {error}") from None
    except OSError as error:
        raise ModelError(f"the model at {folder} cannot be read: {error.strerror}") from None

    if not isinstance(config, dict) or config.get("format") != "featdiff":
        raise ModelError(f"{folder / CONFIG} was not written by featdiff")
    _check_version(config.get("format_version"), folder)
    return config


def _check_version(version: object, folder: Path) -> None:
    """Refuse older and newer formats, each with the way out."""
    if isinstance(version, int) and version < FORMAT_VERSION:
        raise ModelError(
            f"the model at {folder} has the old format {version}, this featdiff writes {FORMAT_VERSION}: train it again"
        )
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ModelError(
            f"the model at {folder} has format {version}, this featdiff reads up to {FORMAT_VERSION}: "
            "pip install -U featdiff"
        )


def check_pair(folder: str | os.PathLike[str], config: dict[str, Any]) -> None:
    """Refuse a config and tensors of different models (``ModelError``; tensors without an ``id`` pass)."""
    from safetensors import safe_open

    with safe_open(Path(folder) / TENSORS, framework="pt") as file:
        identity = (file.metadata() or {}).get("id")
    if identity not in (None, config.get("id")):
        raise ModelError(f"the model at {folder} is damaged: {CONFIG} and {TENSORS} were not written together")


def check_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor], folder: Path) -> None:
    """Compare names, shapes and types with those of a fresh state dict (``ModelError`` names the first difference)."""
    shared = [name for name in expected if name in tensors]
    for kind, names in (
        ("lacks tensor", sorted(set(expected) - set(tensors))),
        ("has an unknown tensor", sorted(set(tensors) - set(expected))),
        ("has another shape for tensor", [name for name in shared if tensors[name].shape != expected[name].shape]),
        ("has another type for tensor", [name for name in shared if tensors[name].dtype != expected[name].dtype]),
    ):
        if names:
            raise ModelError(f"the model at {folder} is damaged: {TENSORS} {kind} {names[0]}")


def locate(name: str | os.PathLike[str], local_files_only: bool = False) -> Path:
    """A folder as it is, or the local copy of a repository on the hub, downloaded when it is not cached.

    Parameters
    ----------
    name : str or Path
        A folder, or ``org/name``.
    local_files_only : bool, default False
        Nothing is downloaded.

    Raises
    ------
    ModelError
        Neither a folder nor a repository that can be downloaded.
    """
    if not is_repository(name):
        return Path(name)  # who reads it says what is wrong with it, if anything
    return find_folder(name, [CONFIG, TENSORS], lambda why: ModelError(f"no model {name}: {why}"), local_files_only)

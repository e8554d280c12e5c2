"""A fitted detector <-> a folder of ``config.json`` and ``model.safetensors``. No pickle; strict; atomic."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .exceptions import ModelError, UsageError

#: Raised when the layout of the folder changes; a newer one is refused.
FORMAT_VERSION = 1
CONFIG, TENSORS = "config.json", "model.safetensors"


def save(folder: str | os.PathLike[str], config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the folder whole or not at all; an older featdiff model in its place is replaced.

    Raises
    ------
    UsageError
        The folder holds something other than a featdiff model.
    ModelError
        The disk is full or the place cannot be written; nothing is left behind, an older model stays.
    """
    from safetensors.torch import save as to_bytes

    target = Path(folder)
    check_target(target)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        text = json.dumps({"format": "featdiff", "format_version": FORMAT_VERSION, **config}, indent=2)
        (temporary / CONFIG).write_text(text + "\n", encoding="utf-8")
        (temporary / TENSORS).write_bytes(to_bytes({name: value.cpu().contiguous() for name, value in tensors.items()}))
        for name in (CONFIG, TENSORS):
            _sync(temporary / name)
        _swap(temporary, target)
    except OSError as error:
        raise ModelError(f"the model could not be written to {target}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_target(folder: str | os.PathLike[str]) -> None:
    """Refuse to replace anything but an earlier featdiff model or an empty folder (``UsageError``)."""
    target = Path(folder)
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or is_model(target))):
        raise UsageError(f"{target} exists and is not a featdiff model; choose another folder with -o")


def is_model(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder looks like a saved detector."""
    return (Path(folder) / CONFIG).is_file() and (Path(folder) / TENSORS).is_file()


def load(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read config and tensors, and check that they are whole.

    Raises
    ------
    ModelError
        No model there, a damaged file, a newer format, or NaN in a tensor.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    if not is_model(folder):
        what = "no such folder" if not folder.exists() else f"it has no {CONFIG} and {TENSORS}"
        raise ModelError(f"no featdiff model at {folder}: {what}. Make one with: featdiff train IMAGES -o {folder}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
    except (ValueError, SafetensorError) as error:
        raise ModelError(f"the model at {folder} is damaged: {error}") from None
    except OSError as error:
        raise ModelError(f"the model at {folder} cannot be read: {error.strerror}") from None
    check_config(config, folder)
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ModelError(f"the model at {folder} is damaged: tensor {name} holds NaN or infinite values")
    return config, tensors


def check_config(config: Any, folder: Path) -> None:
    """Refuse what is not ours or newer than we are."""
    if not isinstance(config, dict) or config.get("format") != "featdiff":
        raise ModelError(f"{folder / CONFIG} was not written by featdiff")
    version = config.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ModelError(
            f"the model at {folder} has format {version}, this featdiff reads up to {FORMAT_VERSION}: "
            "pip install -U featdiff"
        )


def check_tensors(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Compare names and shapes with what the config calls for; ``-1`` in a shape fits any length."""
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    shapes = [name for name in expected if name in tensors and not _fits(tuple(tensors[name].shape), expected[name])]
    for kind, names in (
        ("lacks tensor", missing),
        ("has an unknown tensor", extra),
        ("has another shape for tensor", shapes),
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
    if Path(name).exists() or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(str(name), allow_patterns=[CONFIG, TENSORS], local_files_only=local_files_only)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"no folder {name}, and no such model could be had from the hub: {reason}") from None
    return Path(found)


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return len(shape) == len(expected) and all(want in (-1, got) for got, want in zip(shape, expected, strict=True))


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(temporary: Path, target: Path) -> None:
    """Put the new folder in place; the old one is moved aside first and brought back if that fails."""
    if not target.exists():
        temporary.rename(target)
        return
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old")
    target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)

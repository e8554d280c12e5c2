"""A fitted detector <-> a folder of ``config.json`` and ``model.safetensors``. No pickle; strict; atomic.

``config.json`` holds the size and SHA-256 of ``model.safetensors``, and a digest: the SHA-256 of all that it says
itself, that SHA-256 included. So one digest stands for the whole model, and both files are checked against it when they
are read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..exceptions import ModelError, UsageError, first_line
from .atomic import meant_for, write_together
from .hub import find_folder, is_repository
from .strict_json import parse_json

#: Raised when the layout of the folder changes; older and newer ones are refused.
FORMAT_VERSION = 12
CONFIG = "config.json"
TENSORS = "model.safetensors"
#: Key of ``config.json`` for the digest of the whole model.
DIGEST = "digest"
# Key of ``config.json`` for the size and SHA-256 of the other file.
_FILE = "tensors"


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

    Both files are on disk in full before either takes its place. The config says what the other file must be, so that
    :func:`read_verified` refuses a pair of which a crash has replaced only one.

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
    data = to_bytes({name: value.cpu().contiguous() for name, value in tensors.items()})
    signed = config | {_FILE: facts_of(data)}
    signed[DIGEST] = digest_of(signed)
    try:
        text = json.dumps(signed, indent=2, allow_nan=False) + "\n"
    except ValueError:  # it could not be loaded
        raise ModelError(f"the model cannot be written to {target}: a loss or setting is NaN or infinite") from None

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


def facts_of(data: bytes) -> dict[str, Any]:
    """What the config says of the file of tensors: its size and SHA-256."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def digest_of(config: dict[str, Any]) -> str:
    """SHA-256 of all that a config says, but the digest itself; spaces and line breaks in the file do not count."""
    rest = {name: value for name, value in config.items() if name != DIGEST}
    return hashlib.sha256(json.dumps(rest, separators=(",", ":")).encode()).hexdigest()


def check_target(
    folder: str | os.PathLike[str], is_ours: Callable[[Path], bool] | None = None, what: str = "featdiff model"
) -> None:
    """Refuse to write into a folder that holds something else.

    Parameters
    ----------
    folder : str or Path
        An empty or missing folder passes, and one in which a save was killed.
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
    if not (target.is_dir() and (_is_empty(target) or is_ours(target))):
        raise UsageError(f"{target} exists and is not a {what}; choose another folder", argument="folder")


def _is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing, or only what a first save leaves that is killed."""
    files = list(folder.iterdir())
    unfinished = {meant_for(file) for file in files}
    others = {file.name for file in files if not meant_for(file)}
    return not others or (others == {TENSORS} and CONFIG in unfinished)  # the tensors take their place first


# ---- reading ----


def is_model(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder holds a saved detector (many other tools call their files the same)."""
    try:
        config = parse_json((Path(folder) / CONFIG).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("format") == "featdiff"


def load(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read config and tensors, and check that both are what was saved.

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
        No model there, a file that was damaged or changed after it was saved, another format, or NaN in a tensor.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = _tensors_of(read_verified(folder, config), folder)
    return config, tensors


def read_config(folder: Path) -> dict[str, Any]:
    """The config, in a format that this featdiff reads; not verified yet (``ModelError``)."""
    if not ((folder / CONFIG).is_file() and (folder / TENSORS).is_file()):
        problem = f"it has no {CONFIG} and {TENSORS}" if folder.exists() else "no such folder"
        raise ModelError(f"no featdiff model at {folder}: {problem}. Train one first: featdiff train IMAGES")

    try:
        config = parse_json((folder / CONFIG).read_bytes())
    except ValueError as error:
        raise ModelError(f"the model at {folder} is damaged: {CONFIG}: {error}") from None
    except OSError as error:
        raise ModelError(f"the model at {folder} cannot be read: {error.strerror}") from None

    if not isinstance(config, dict) or config.get("format") != "featdiff":
        raise ModelError(f"{folder / CONFIG} was not written by featdiff")
    _check_version(config.get("format_version"), folder)
    return config


def read_verified(folder: str | os.PathLike[str], config: dict[str, Any], what: str = "model") -> bytes:
    """Check a config against its digest, and the file of tensors against the config.

    Parameters
    ----------
    folder : str or Path
    config : dict
        As :func:`write_pair` wrote it there.
    what : str, default "model"
        What lies in the folder, for the message.

    Returns
    -------
    bytes
        The file of tensors. Use these: the file might have changed by the next time it is read.

    Raises
    ------
    ModelError
        One of the files was damaged or changed after it was saved, or they were not saved together.
    """
    expected = config.get(_FILE)
    if config.get(DIGEST) != digest_of(config) or not isinstance(expected, dict):
        raise _changed(what, folder, CONFIG)

    file = Path(folder) / TENSORS
    try:
        # the size is compared first: a huge file in its place is not read at all
        data = file.read_bytes() if file.stat().st_size == expected.get("bytes") else b""
    except OSError as error:
        raise ModelError(f"the {what} at {folder} cannot be read: {TENSORS}: {error.strerror}") from None
    except MemoryError:
        raise ModelError(f"the {what} at {folder} does not fit into memory") from None

    if facts_of(data) != expected:
        raise _changed(what, folder, TENSORS)
    return data


def _changed(what: str, folder: str | os.PathLike[str], name: str) -> ModelError:
    return ModelError(
        f"the {what} at {folder} is damaged or was changed: {name} is not what was saved there. Copy both files again "
        "from where they came from"
    )


def _tensors_of(data: bytes, folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    try:
        tensors = from_bytes(data)
        infinite = [n for n, value in tensors.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # types that PyTorch does not know
        raise ModelError(f"the model at {folder} is damaged: {TENSORS}: {first_line(error)}") from None

    if infinite:
        raise ModelError(f"the model at {folder} is damaged: tensor {infinite[0]} holds NaN or infinite values")
    return tensors


def _check_version(version: object, folder: Path) -> None:
    """Refuse older and newer formats, each with the way out."""
    if isinstance(version, int) and version < FORMAT_VERSION:
        raise ModelError(
            f"the model at {folder} has the old format {version}, this featdiff writes {FORMAT_VERSION}: train it again"
        )
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ModelError(
            f"the model at {folder} has format {version}, this featdiff reads {FORMAT_VERSION}: pip install -U featdiff"
        )


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


def locate(
    name: str | os.PathLike[str],
    local_files_only: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    parts: Sequence[str] = (),
) -> Path:
    """A folder as it is, or the local copy of a repository on the hub, downloaded when it is not cached.

    Parameters
    ----------
    name : str or Path
        A folder, ``org/name`` or ``org/name@revision``.
    local_files_only : bool, default False
        Nothing is downloaded.
    revision : str, optional
        Branch, tag or commit; default: the main branch.
    token : str or bool, optional
        Of the hub; default: ``HF_TOKEN``, or that of ``hf auth login``.
    parts : sequence of str, default ()
        Folders of the repository that may hold such a pair of files, too.

    Raises
    ------
    ModelError
        Neither a folder nor a repository that can be downloaded.
    """
    if revision is None and not is_repository(name):
        return Path(name)  # who reads it says what is wrong with it, if anything

    def refuse(why: str) -> ModelError:
        return ModelError(f"no model {name}{f' at revision {revision}' if revision else ''}: {why}")

    files = [f"{place}{file}" for place in ("", *(f"{part}/" for part in parts)) for file in (CONFIG, TENSORS)]
    return find_folder(name, files, refuse, local_files_only, revision, token)

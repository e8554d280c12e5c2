"""Folder layout of a hardened student. Imports nothing heavy: commands check for it before they load anything."""

from __future__ import annotations

import os
from pathlib import Path

from ..files.hub import is_repository

#: Subfolder of the classifier, in timm's layout.
STUDENT = "student"
#: Subfolder of the guard that was fitted on it.
GUARD = "guard"


def is_hardened(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a student and its guard."""
    return (Path(folder) / STUDENT).is_dir() and (Path(folder) / GUARD).is_dir()


def find_model(name: str | os.PathLike[str]) -> str:
    """The folder of a model, which may be a hardened student; of ``org/name`` on the hub, the local copy.

    Errors are those of :func:`featdiff.files.model_folder.locate`.
    """
    if not is_repository(name):
        return str(name)
    from ..files.model_folder import locate

    return str(locate(name, parts=(STUDENT, GUARD)))

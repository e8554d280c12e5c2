"""Folder layout of a hardened student. Imports nothing heavy: commands check for it before they load anything."""

from __future__ import annotations

import os
from pathlib import Path

#: Subfolder of the classifier, in timm's layout.
STUDENT = "student"
#: Subfolder of the guard that was fitted on it.
GUARD = "guard"


def is_hardened(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a student and its guard."""
    return (Path(folder) / STUDENT).is_dir() and (Path(folder) / GUARD).is_dir()

"""Where things lie in the folder of a hardened student. Light to import: commands ask before they load anything."""

from __future__ import annotations

import os
from pathlib import Path

#: Subfolders: a timm classifier, and the guard that was fitted on it.
STUDENT, GUARD = "student", "guard"


def is_hardened(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a student and its guard."""
    return (Path(folder) / STUDENT).is_dir() and (Path(folder) / GUARD).is_dir()

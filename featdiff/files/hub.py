"""A folder, or the name of a repository on the Hugging Face hub -> a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ..exceptions import FeatdiffError, first_line


def is_repository(name: str | os.PathLike[str]) -> bool:
    """Whether ``name`` is not the path of anything, and could be ``org/name`` on the hub."""
    return not Path(name).exists() and str(name).count("/") == 1 and not str(name).startswith((".", "/", "~"))


def find_folder(
    name: str | os.PathLike[str],
    files: Sequence[str],
    refuse: Callable[[str], FeatdiffError],
    local_files_only: bool = False,
) -> Path:
    """The folder itself, or the local copy of a repository on the hub, downloaded when it is not cached.

    Parameters
    ----------
    name : str or Path
        A folder, or ``org/name``.
    files : sequence of str
        Patterns of the files that are downloaded.
    refuse : callable
        Makes the error to raise, from a reason, when there is neither folder nor repository.
    local_files_only : bool, default False
        Nothing is downloaded.

    Returns
    -------
    Path
    """
    if Path(name).is_dir():
        return Path(name)
    if not is_repository(name):
        raise refuse("there is no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=list(files), local_files_only=local_files_only))
    except Exception as error:  # the hub has many ways to fail
        raise refuse(f"there is no such folder, and it could not be had from the hub: {first_line(error)}") from None

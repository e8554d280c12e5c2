"""A folder, or the name of a repository on the Hugging Face hub -> a folder; and a folder -> the hub."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..exceptions import FeatdiffError, UsageError, first_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_LOG = logging.getLogger(__name__)
_NAMES = "those are called org/name, of letters, digits, '-', '_' and '.'"
# Status code of an answer -> what to do.
_STATUS = {
    401: "the hub wants a valid token: hf auth login, or set HF_TOKEN",
    403: "the token has no right to do that: take one with write access to it",
    413: "the files are too large for the hub",
    429: "the hub was asked too often: try again in some minutes",
}


# ---- names ----


def is_repository(name: str | os.PathLike[str]) -> bool:
    """Whether ``name`` is not the path of anything, and could be ``org/name`` or ``org/name@revision`` on the hub."""
    repository, _ = split_revision(name)
    return not Path(name).exists() and repository.count("/") == 1 and not repository.startswith((".", "/", "~"))


def split_revision(name: str | os.PathLike[str]) -> tuple[str, str | None]:
    """``org/name@revision`` -> repository and revision; the latter is None where none is named.

    Examples
    --------
    >>> split_revision("org/name@v1.0")
    ('org/name', 'v1.0')
    >>> split_revision("org/name")
    ('org/name', None)
    """
    repository, _, revision = str(name).partition("@")
    return repository, revision or None


def check_token(token: str | bool | None) -> None:
    """Refuse what cannot be a token, without showing it: other libraries print such headers whole (``UsageError``)."""
    if isinstance(token, str) and (not token or not token.isascii() or not token.isprintable() or " " in token):
        raise UsageError("token is not one of the hub's: those are letters, digits and _, without spaces", "token")


# ---- from the hub ----


def find_folder(
    name: str | os.PathLike[str],
    files: Sequence[str],
    refuse: Callable[[str], FeatdiffError],
    local_files_only: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """The folder itself, or the local copy of a repository on the hub, downloaded when it is not cached.

    Parameters
    ----------
    name : str or Path
        A folder, ``org/name`` or ``org/name@revision``.
    files : sequence of str
        Patterns of the files that are downloaded.
    refuse : callable
        Makes the error to raise, from a reason, when there is neither folder nor repository.
    local_files_only : bool, default False
        Nothing is downloaded.
    revision : str, optional
        Branch, tag or commit; default: the main branch.
    token : str or bool, optional
        Of the hub; default: ``HF_TOKEN``, or that of ``hf auth login``. It is not stored.

    Returns
    -------
    Path

    Raises
    ------
    UsageError
        A revision of a folder, two revisions, or a token that cannot be one.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise UsageError(f"{name} is a folder, and only a repository on the hub has revisions", argument="revision")
        return Path(name)
    if not is_repository(name):
        raise refuse("there is no such folder")

    repository, named = split_revision(name)
    if named and revision not in (None, named):
        raise UsageError(f"{name} names another revision than {revision}: give one of them", argument="revision")
    check_token(token)
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repository,
            revision=revision or named,
            token=token,
            allow_patterns=list(files),
            local_files_only=local_files_only,
        )
    except Exception as error:  # the hub has many ways to fail
        raise refuse(f"there is no such folder, and it could not be had from the hub: {hub_reason(error)}") from None
    _LOG.info("%s is in %s", name, folder)
    return Path(folder)


def hub_reason(error: Exception) -> str:
    """What went wrong with the hub, and what to do, in one line that holds no token."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return "its owner decides who may have it: ask for access on its page, and log in with hf auth login"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private and the token cannot see it (hf auth login)"
    if isinstance(error, errors.HfHubHTTPError) and status in _STATUS:
        return _STATUS[status]
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return f"{first_line(error)} ({type(error.__cause__).__name__})"
    return first_line(error)


# ---- to the hub ----


def push_folder(
    folder: str | os.PathLike[str],
    files: Sequence[str],
    name: str,
    refuse: Callable[[str], FeatdiffError],
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    message: str = "featdiff model",
) -> str:
    """Files of a folder -> one commit in a repository on the hub, which is made when it is missing.

    One commit, so that nobody ever finds the new config beside the old tensors.

    Parameters
    ----------
    folder : path
    files : sequence of str
        Names in it; those that are missing are left out. Other files of the repository stay as they are.
    name : str
        ``org/name``.
    refuse : callable
        Makes the error to raise, from a reason.
    private : bool, optional
        Whether a new repository is private; default: as the organisation has it. True refuses a public one.
    revision : str, optional
        Branch, made when it is missing; default: the main one.
    token : str or bool, optional
        With write access; default: ``HF_TOKEN``, or that of ``hf auth login``. It is not stored.
    message : str, default "featdiff model"
        Of the commit.

    Returns
    -------
    str
        Address of the commit.

    Raises
    ------
    UsageError
        A name that no repository can have, a public repository where a private one is wanted, or a token that cannot
        be one.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HFValidationError

    check_token(token)
    unknown = UsageError(f"{name!r} is no repository on the hub: {_NAMES}", argument="name")
    if name.count("/") != 1:
        raise unknown

    api = HfApi(token=token)
    operations = [
        CommitOperationAdd(path_in_repo=file, path_or_fileobj=Path(folder) / file)
        for file in files
        if (Path(folder) / file).is_file()
    ]
    try:
        _prepare(api, name, private, revision)
        commit = api.create_commit(name, operations, commit_message=message, revision=revision)
    except FeatdiffError:
        raise
    except HFValidationError:
        raise unknown from None
    except Exception as error:  # the hub has many ways to fail
        raise refuse(hub_reason(error)) from None
    _LOG.info("%s is on the hub: %s", name, commit.commit_url)
    return str(commit.commit_url)


def _prepare(api: HfApi, name: str, private: bool | None, revision: str | None) -> None:
    """Make the repository and the branch, where they are missing."""
    api.create_repo(name, private=private, exist_ok=True)
    if private and api.repo_info(name).private is False:  # the hub keeps what a repository is
        raise UsageError(f"{name} exists and everybody can see it: choose another name", argument="private")
    if revision is not None:
        api.create_branch(name, branch=revision, exist_ok=True)

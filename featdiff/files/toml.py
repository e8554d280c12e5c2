"""TOML files as plain tables. Readers check the keys, so that no misspelt setting is silently ignored."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..exceptions import UsageError, did_you_mean


def read_toml(file: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Parameters
    ----------
    file : Path

    Returns
    -------
    dict

    Raises
    ------
    UsageError
        It cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not TOML: {error}") from None
    except RecursionError:
        raise UsageError(f"{file} is not TOML that can be read: too many brackets within each other") from None


def check_keys(keys: Iterable[str], known: list[str], where: str, kind: str = "key") -> None:
    """Refuse a key that nothing reads.

    Parameters
    ----------
    keys : iterable of str
        Those that the user wrote.
    known : list of str
        Those that mean something.
    where : str
        The file, or the table in it, for the message.
    kind : str, default "key"
        What such a key is called in the message.

    Raises
    ------
    UsageError
        Naming the first unknown key and similar known ones.

    Examples
    --------
    >>> check_keys(["backbone"], known=["backbone", "layers"], where="my.toml")
    """
    for key in keys:
        if key not in known:
            raise UsageError(f"{where}: unknown {kind} {key!r}{did_you_mean(key, known)}; known: {', '.join(known)}")

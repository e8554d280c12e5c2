"""TOML files as plain tables. Who reads one checks its keys, so that a misspelt setting is never silently ignored."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..exceptions import UsageError, did_you_mean


def read_toml(file: Path) -> dict[str, Any]:
    """The tables of a file.

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


def check_keys(keys: Iterable[str], known: list[str], where: str, kind: str = "key") -> None:
    """Refuse a key that nobody reads (``UsageError`` names it and its nearest neighbours)."""
    for key in keys:
        if key not in known:
            raise UsageError(f"{where}: unknown {kind} {key!r}{did_you_mean(key, known)}; known: {', '.join(known)}")

"""JSON from a file that may be damaged or made to do harm: plain finite values, or ``ValueError``."""

from __future__ import annotations

import json
import math
from typing import Any

# No file of featdiff's has more levels.
_DEEPEST = 32


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text, without what JSON readers differ about.

    Parameters
    ----------
    text : str or bytes
        Bytes must be UTF-8.

    Returns
    -------
    dict, list, str, int, float, bool or None

    Raises
    ------
    ValueError
        It is no JSON, holds NaN, infinite or huge numbers, names a key twice, or is nested deeply. One line.

    Examples
    --------
    >>> parse_json('{"a": [1, 2.5]}')
    {'a': [1, 2.5]}
    >>> parse_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
        ...
    ValueError: it names 'a' twice
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check(value, depth=0)
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it names {repeated!r} twice")
    return table


def _check(value: Any, depth: int) -> None:
    """Refuse numbers that other parts of the library cannot compute with, and deep nesting."""
    if depth > _DEEPEST:
        raise ValueError("it is nested too deeply")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("it holds NaN or an infinite number")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("it holds a whole number of more than 64 bits")

    children: Any = ()
    if isinstance(value, dict):
        children = value.values()
    elif isinstance(value, list):
        children = value
    for child in children:
        _check(child, depth + 1)

"""Checks of settings, so that nonsense is refused before any work.

Each raises ``UsageError`` and names the argument.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from ..diffusion.training import Recipe
from ..exceptions import UsageError, did_you_mean


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number (True and False are not)."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number (True and False are not)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether a value is a sequence other than text."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def check_whole(name: str, value: object, optional: bool = False) -> None:
    """A whole number above 0; with ``optional``, None will do as well."""
    if optional and value is None:
        return
    if not is_whole(value) or value < 1:
        raise UsageError(f"{name} must be a whole number above 0, not {value!r}", argument=name)


def check_positive(name: str, value: object) -> None:
    """A finite number above 0."""
    if not is_number(value) or value <= 0:
        raise UsageError(f"{name} must be a number above 0, not {value!r}", argument=name)


def check_number(name: str, value: object) -> None:
    """A finite number."""
    if not is_number(value):
        raise UsageError(f"{name} must be a number, not {value!r}", argument=name)


def check_seed(name: str, value: object) -> None:
    """A whole number of 0 or more that random generators take."""
    if not is_whole(value) or not 0 <= value < 2**63:
        raise UsageError(f"{name} must be a whole number of 0 or more, not {value!r}", argument=name)


def check_kept(paths: object, thumbnails: object) -> None:
    """What a model keeps of the images in its bank: their paths, and small pictures of them beside the paths."""
    check_bool("keep_paths", paths)
    check_bool("keep_thumbnails", thumbnails)
    if thumbnails and not paths:
        raise UsageError(
            "keep_thumbnails shows the images whose paths keep_paths=False leaves out: choose one of the two",
            argument="keep_thumbnails",
        )


def check_local(value: object) -> None:
    """``"auto"``, True or False."""
    if value != "auto" and not isinstance(value, bool):
        raise UsageError(f'local must be "auto", True or False, not {value!r}', argument="local")


def check_input_size(size: object) -> None:
    """Three whole numbers above 0, or None."""
    if size is None:
        return
    if not is_list(size) or len(size) != 3 or not all(is_whole(n) and n > 0 for n in size):
        raise UsageError(
            f"input_size must be three whole numbers (channels, height, width), not {size!r}", "input_size"
        )


def check_share(name: str, value: object, of: str = "images") -> None:
    """A number between 0 and 0.5."""
    if not is_number(value) or not 0 < value < 0.5:
        raise UsageError(f"{name} is a share of the {of} between 0 and 0.5, not {value!r}", argument=name)


def check_bool(name: str, value: object) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise UsageError(f"{name} must be true or false, not {value!r}", argument=name)


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """One of some names."""
    if value not in known:
        hint = did_you_mean(str(value), list(known))
        raise UsageError(f"unknown {name} {value!r}{hint}; known: {', '.join(known)}", argument=name)


def check_different_names(name: str, value: object) -> None:
    """A list of names, each of them once."""
    is_good = is_list(value) and all(isinstance(item, str) for item in value) and len(set(value)) == len(value)
    if not is_good:
        raise UsageError(f"{name} must be a list of different names, not {value!r}", argument=name)


def check_times(name: str, value: object, last: int) -> None:
    """At least one whole number in 0 .. ``last``."""
    if not is_list(value) or not value or not all(is_whole(t) and 0 <= t <= last for t in value):
        raise UsageError(f"{name} must be whole numbers in 0 .. {last}, not {value!r}", argument=name)


def check_neighbors(neighbors: object, bank_size: int) -> None:
    """A whole number, 0 or more, of neighbours in a bank of this size."""
    if not is_whole(neighbors) or neighbors < 0:
        raise UsageError(f"neighbors must be a whole number, 0 or more, not {neighbors!r}", argument="neighbors")
    if bank_size < neighbors:
        raise UsageError(f"a bank of {bank_size} vectors has no {neighbors} neighbours", argument="neighbors")


def make_recipe(recipe: Recipe | Mapping[str, Any] | None) -> Recipe:
    """A recipe from its fields (``UsageError`` for unknown ones)."""
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, Mapping | None):
        raise UsageError(f"recipe must be a table of settings, not {recipe!r}", argument="recipe")
    known = list(Recipe.__dataclass_fields__)
    for name in recipe or {}:
        if name not in known:
            hint = did_you_mean(name, known)
            raise UsageError(f"unknown recipe setting {name!r}{hint}; known: {', '.join(known)}", argument="recipe")
    return Recipe(**(recipe or {}))


def check_names(names: Sequence[str] | Mapping[str, Any], known: list[str], where: str) -> None:
    """Refuse a setting that there is not (``UsageError`` names its nearest neighbours)."""
    for name in names:
        if name not in known:
            place = f"{where}: " if where else ""
            raise UsageError(f"{place}unknown argument {name!r}{did_you_mean(name, known)}", argument=name)


def check_path(name: str, value: object) -> None:
    """A path, or None."""
    if not isinstance(value, str | os.PathLike | None):
        raise UsageError(f"{name} must be a path, not {value!r}", argument=name)


def check_text(name: str, value: object) -> None:
    """Text."""
    if not isinstance(value, str):
        raise UsageError(f"{name} must be text, not {value!r}", argument=name)


def check_table(name: str, value: object, or_callable: bool = False) -> None:
    """A table of settings, or None; with ``or_callable``, a function will do as well."""
    if value is None or isinstance(value, Mapping) or (or_callable and callable(value)):
        return
    what = "a table of settings, or a function" if or_callable else "a table of settings"
    raise UsageError(f"{name} must be {what}, not {value!r}", argument=name)

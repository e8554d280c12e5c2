"""Constructors that take settings, with the settings' own parameters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from .checks import check_names
from .config import Settings

P = ParamSpec("P")
D = TypeVar("D")
SettingsT = TypeVar("SettingsT", bound=Settings)


def takes(
    kind: Callable[P, SettingsT],
) -> Callable[[Callable[[D, SettingsT], None]], Callable[Concatenate[D, P], None]]:
    """Give a constructor that takes settings the parameters of the settings, for people and type checkers alike."""

    def decorate(init: Callable[[D, SettingsT], None]) -> Callable[Concatenate[D, P], None]:
        @functools.wraps(init)
        def wrapped(self: D, /, *args: P.args, **kwargs: P.kwargs) -> None:
            settings: Any = kind
            check_names(kwargs, settings.names(), "")
            init(self, kind(*args, **kwargs))

        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        signature = inspect.signature(kind)
        parameters = [own, *signature.parameters.values()]
        wrapped.__signature__ = signature.replace(parameters=parameters, return_annotation=None)  # type: ignore[attr-defined]
        return wrapped

    return decorate

"""Environment variables ``FEATDIFF_*``: which there are, and a word on those that mean nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable

import click

from .speech import is_first_process, say

PREFIX = "FEATDIFF_"
#: Those that are no option of a command.
VARIABLES = (
    "FEATDIFF_CACHE",
    "FEATDIFF_DEBUG",
    "FEATDIFF_LOG_FILE",
    "FEATDIFF_LOG_FORMAT",
    "FEATDIFF_LOG_SECONDS",
    "FEATDIFF_TIMEOUT",
)
# Set by images and build scripts for themselves.
_IGNORED = ("FEATDIFF_VERSION",)


def name_variables(name: str, command: click.Command) -> None:
    """Let ``FEATDIFF_<COMMAND>_<OPTION>`` be called as the option is, where its parameter has another name.

    click itself knows ``FEATDIFF_SCORE_IMAGE_BATCH`` for ``--batch-size``.
    """
    for option in _options(command):
        variable = _variable(name, option)
        if option.envvar is None and variable != _by_parameter(name, option):
            option.envvar = variable


def warn_of_unknown(name: str, command: click.Command, commands: Iterable[str]) -> None:
    """A line for each variable that nothing reads, most often misspelt.

    Parameters
    ----------
    name, command
        The command that is run; variables of its options are known one by one.
    commands : iterable of str
        Names of all commands. Those of the others are not imported: whatever names one of them passes.
    """
    given = [variable for variable in sorted(os.environ) if variable.startswith(PREFIX)]
    if not given or not is_first_process():
        return

    options = [_variable(name, option) for option in _options(command)]
    accepted = {*VARIABLES, *_IGNORED, *options, *(_by_parameter(name, option) for option in _options(command))}
    others = tuple(f"{_of(other)}_" for other in commands if other != name)
    for variable in given:
        if variable in accepted or variable.startswith(others):
            continue
        from difflib import get_close_matches

        close = get_close_matches(variable, [*VARIABLES, *options], n=1, cutoff=0.75)
        hint = f"; did you mean {close[0]}?" if close else ""
        say(f"WARNING: nothing reads the environment variable {variable}{hint}")


def _options(command: click.Command) -> list[click.Option]:
    return [parameter for parameter in command.params if isinstance(parameter, click.Option)]


def _of(name: str) -> str:
    return PREFIX + name.replace("-", "_").upper()


def _variable(name: str, option: click.Option) -> str:
    """As the option is called on the command line."""
    called = max(option.opts, key=len).lstrip("-").replace("-", "_")
    return f"{_of(name)}_{called.upper()}"


def _by_parameter(name: str, option: click.Option) -> str:
    """As click calls it by itself."""
    return f"{_of(name)}_{str(option.name).upper()}"

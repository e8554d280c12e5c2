"""What people read on a terminal: one line at a time, and nothing in it can steer the terminal."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from .log import record_line, replaces_lines


def is_first_process() -> bool:
    """Whether to talk and to write: of the processes of ``accelerate launch`` only one does."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str, quiet: bool = False, **fields: Any) -> None:
    """Print a line for people on standard error, and log it; ``fields`` are what it says, for programs."""
    if not quiet and not replaces_lines():
        show(text, err=True)
    record_line(text, quiet, **fields)


def show(text: str, err: bool = False) -> None:
    """Print a line on standard output, or on standard error; control characters in it are shown as ``\\x1b``."""
    from featdiff.files.text import for_terminal

    if not err:
        click.echo(for_terminal(text))
    elif sys.stderr is not None:  # as it is where the caller has closed it
        # named, because click would look behind what rich puts in its place, and write into the middle of a bar
        click.echo(for_terminal(text), file=sys.stderr)


def without_duplicates(count: int) -> str:
    """Part of a summary: that so many copies of images or rows do not count; empty if there are none."""
    if not count:
        return ""
    return f", {count:,} duplicate{'' if count == 1 else 's'} left out"


def say_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any
) -> None:
    """Print a warning in Python's own words, a line at a time; they may hold names of files."""
    if replaces_lines():
        say(f"WARNING: {message}", category=category.__name__, file=f"{filename}:{lineno}")
        return
    for line in warnings.formatwarning(message, category, filename, lineno).splitlines():
        say(line)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Inside, warnings of all libraries are printed by :func:`say_warning`."""
    with warnings.catch_warnings():
        warnings.showwarning = say_warning
        yield

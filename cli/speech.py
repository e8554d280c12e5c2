"""What people read on a terminal: one line at a time, and nothing in it can steer the terminal."""

from __future__ import annotations

import click


def say(text: str, quiet: bool = False) -> None:
    """Print a line for people on standard error."""
    if not quiet:
        show(text, err=True)


def show(text: str, err: bool = False) -> None:
    """Print a line on standard output, or on standard error; control characters in it are shown as ``\\x1b``."""
    from featdiff.files.text import for_terminal

    click.echo(for_terminal(text), err=err)

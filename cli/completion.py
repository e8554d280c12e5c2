"""Shell completion: what completes paths, and words of bash that hold ``=``."""

from __future__ import annotations

import re

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class

# Words in the help of a parameter, such as NAME=IMAGES or [MODEL], that stand for a path.
_FOLDERS = {"DIR", "FOLDER", "MODEL"}
_FILES = {"FILE", "IMAGE", "IMAGES", "MANIFEST", "SUITE", "HOW"}


class PathText(click.types.StringParamType):
    """Text as it is; the shell completes it as a path.

    ``click.Path`` would check it, and images may be patterns, members of archives or ``-``.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """What the shell shall complete: ``file`` (folders, too) or ``dir``."""
        return [CompletionItem(incomplete, type=self._kind)]


def complete_paths(command: click.Command) -> None:
    """Let the shell complete parameters of plain text whose help says that they are paths."""
    context = click.Context(command)
    for parameter in command.params:
        words = set(re.findall(r"[A-Z]+", parameter.make_metavar(context)))
        if parameter.type is click.STRING and words & (_FILES | _FOLDERS):
            parameter.type = PathText("file" if words & _FILES else "dir")


class WordsWithEquals(BashComplete):
    """Bash takes ``NAME=IMAGES`` and ``--output=FILE`` for three words each: joined again, they are found."""

    def get_completion_args(self) -> tuple[list[str], str]:
        args, incomplete = super().get_completion_args()
        words: list[str] = []
        for word in (*args, incomplete):
            if words and (word == "=" or words[-1].endswith("=")):
                words[-1] += word
            else:
                words.append(word)
        return words[:-1], words[-1]


add_completion_class(WordsWithEquals, "bash")

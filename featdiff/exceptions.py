"""Every error featdiff raises on purpose. One root, so that a caller can catch them all."""

from collections.abc import Sequence


class FeatdiffError(Exception):
    """Something could not be done; the message is one line that says what to do next."""


class UsageError(FeatdiffError, ValueError):
    """The request itself makes no sense: an unknown name, an unsupported rate, nothing to read.

    Parameters
    ----------
    message : str
        One line that says what to do. It names arguments of the library, never options of the command line.
    argument : str, optional
        The argument that is wrong, so that the command line can name its own option for it.
    """

    def __init__(self, message: str = "", argument: str = "") -> None:
        super().__init__(message)
        self.argument = argument


class UnlabelledError(UsageError):
    """Images that should lie in folders of classes and do not."""


class TooFewRows(UsageError, UserWarning):
    """A false-alarm rate that so few rows cannot support. A warning where a larger rate can stand in."""


class UnreadableImage(FeatdiffError, ValueError):
    """One image could not be decoded. Never ends a run: it becomes a row with a reason."""


class WeightsError(FeatdiffError):
    """The weights of a backbone could not be had, or do not fit it."""


class ModelError(FeatdiffError):
    """A saved detector cannot be trusted: missing, damaged, made for another backbone, or newer."""


class NotFittedError(FeatdiffError, ValueError, AttributeError):
    """A detector was asked for scores before it was fitted."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, cut to one line; its kind if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def some_of(names: Sequence[str]) -> str:
    """The first of some names, and where there are more than four, how many there are."""
    return ", ".join(names[:4]) + (f" ... ({len(names)})" if len(names) > 4 else "")


def did_you_mean(word: str, known: list[str]) -> str:
    """A short ending for an error message: the nearest known names, or nothing."""
    from difflib import get_close_matches

    by_lower = {name.lower(): name for name in known}
    close = [by_lower[name] for name in get_close_matches(word.lower(), by_lower, n=3, cutoff=0.5)]
    return f"; did you mean {' or '.join(close)}?" if close else ""

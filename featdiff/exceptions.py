"""Every error featdiff raises on purpose. One root, so that a caller can catch them all."""

from collections.abc import Sequence


class FeatdiffError(Exception):
    """Something could not be done.

    Parameters
    ----------
    message : str
        One line that says what to do next. It names arguments of the library, never options of the command line.
    argument : str, default ""
        The argument that is wrong, if it is a single one, so that the command line can name its own option for it.

    Attributes
    ----------
    argument : str
        As above; empty where no single argument is to blame.

    Examples
    --------
    >>> from featdiff.exceptions import FeatdiffError, UsageError
    >>> try:
    ...     raise UsageError("seed must be a whole number of 0 or more, not -1", argument="seed")
    ... except FeatdiffError as error:
    ...     print(f"{error.argument}: {error}")
    seed: seed must be a whole number of 0 or more, not -1
    """

    def __init__(self, message: str = "", argument: str = "") -> None:
        super().__init__(message)
        self.argument = argument


class UsageError(FeatdiffError, ValueError):
    """The request itself makes no sense: an unknown name, an unsupported rate, nothing to read."""


class UnlabelledError(UsageError):
    """Images that should lie in folders of classes and do not."""


class TooFewRows(UsageError, UserWarning):
    """A false-alarm rate that so few rows cannot support. A warning where a larger rate can stand in."""


class NearCopiesFound(FeatdiffError, UserWarning):
    """A warning: many images are near-copies of each other, and were kept together without being asked for."""


class LargeShift(FeatdiffError, UserWarning):
    """A warning: most of the images that calibrate a detector anew were strange to it before."""


class KnownImages(FeatdiffError, UserWarning):
    """A warning: images that were scored are among the training images, and look ordinary for that reason alone."""


class DamagedCache(FeatdiffError, UserWarning):
    """A warning: a file of the cache was damaged. It is removed, and what it held is computed again."""


class OtherEngine(FeatdiffError, UserWarning):
    """A warning: a model that was fitted in bfloat16 is run by another engine, whose rounding moves scores a little."""


class LogStopped(FeatdiffError, UserWarning):
    """A warning: TensorBoard or MLflow takes no more numbers of a training, which goes on."""


class UnreadableImage(FeatdiffError, ValueError):
    """One image could not be decoded. Never ends a run: it becomes a row with a reason."""


class WeightsError(FeatdiffError):
    """The weights of a backbone cannot be found or downloaded, or do not fit it."""


class ModelError(FeatdiffError):
    """A saved detector cannot be trusted: missing, damaged, made for another backbone, or newer."""


class NotFittedError(FeatdiffError, ValueError, AttributeError):
    """A detector was asked for scores before it was fitted."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error message; the name of its type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def one_line(error: BaseException) -> str:
    """The whole message of an error on one line; the name of its type if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__


def some_of(names: Sequence[str]) -> str:
    """The first four names, and how many there are if there are more.

    Examples
    --------
    >>> some_of(["a", "b", "c", "d", "e"])
    'a, b, c, d ... (5)'
    """
    more = f" ... ({len(names)})" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def did_you_mean(word: str, known: list[str]) -> str:
    """The end of an error message that suggests similar names; empty if there are none.

    Examples
    --------
    >>> did_you_mean("Resnet5", ["resnet50", "vit"])
    '; did you mean resnet50?'
    """
    from difflib import get_close_matches

    by_lower = {name.lower(): name for name in known}
    close = get_close_matches(word.lower(), by_lower, n=3, cutoff=0.5)
    if not close:
        return ""

    return f"; did you mean {' or '.join(by_lower[name] for name in close)}?"

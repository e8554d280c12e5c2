"""How often an alarm may be false: of normal images, in a day, or of the flags of a batch."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, TypeVar

import click

if TYPE_CHECKING:
    from featdiff import Scores
    from featdiff.verdicts.calibration import Calibration

F = TypeVar("F", bound=Callable[..., Any])


def rate_options(function: F) -> F:
    """``--fpr``, or ``--alarms-per-day`` and ``--rate``, as arguments of :class:`Rate`."""
    for option in (
        click.option("--rate", type=float, metavar="IMAGES", help="How many images come in a day."),
        click.option(
            "--alarms-per-day", type=float, metavar="N", help="In place of --fpr: false alarms of --rate normal images."
        ),
        click.option("--fpr", type=float, help="False-alarm rate [the one given at training]."),
    ):
        function = option(function)
    return function


fdr_option = click.option(
    "--fdr", type=float, metavar="Q", help="Mark a share of the batch of which at most Q is normal, in fdr_flag."
)


@dataclass(frozen=True)
class Rate:
    """The false-alarm rate that was asked for, of images or in a day; None of all: the model's own."""

    fpr: float | None
    alarms: float | None
    images: float | None

    @classmethod
    def of(cls, options: dict[str, Any]) -> Self:
        """As the options say (``UsageError`` if they do not go together)."""
        from featdiff.exceptions import UsageError

        rate = cls(options["fpr"], options["alarms_per_day"], options["rate"])
        if (rate.alarms is None) != (rate.images is None):
            raise UsageError("--alarms-per-day N needs --rate IMAGES, how many come in a day, and the other way round")
        if rate.alarms is None or rate.images is None:
            return rate
        if rate.fpr is not None:
            raise UsageError("--alarms-per-day and --rate say what --fpr is: drop --fpr")
        if not 0 < rate.alarms < rate.images < math.inf:
            raise UsageError(
                f"--alarms-per-day {rate.alarms:g} must be more than 0 and less than --rate {rate.images:g}"
            )
        return rate

    def supported_by(self, calibration: Calibration, own: float) -> float:
        """The rate, or a model's own, if the calibration supports it (``UsageError``)."""
        from featdiff.exceptions import UsageError
        from featdiff.verdicts.calibration import is_supported, needed_for

        if self.alarms is None or self.images is None:
            rate = own if self.fpr is None else self.fpr
            calibration.check(rate)
            return rate

        rate = self.alarms / self.images
        if not is_supported(rate, calibration.groups):
            what = "images" if calibration.groups == len(calibration) else "groups of images"
            fewest = math.ceil(self.images / (calibration.groups + 1))
            raise UsageError(
                f"--alarms-per-day {self.alarms:g} of {self.images:,.0f} images is a rate of {rate:.2g}, which needs "
                f"{needed_for(rate):,} held-out {what}, and there are {calibration.groups:,}: train on more images, or "
                f"allow {fewest:,} a day"
            )
        return rate


@dataclass
class Batch:
    """What ``--fdr`` flags, known when all images have a p-value.

    ``level``: share of false flags among these.
    """

    level: float
    _count: int = 0  # images with a p-value
    _p_values: array[float] = field(default_factory=lambda: array("d"))  # those that may be flagged

    def add(self, part: Scores) -> None:
        """The next rows."""
        import numpy as np

        from featdiff.verdicts.calibration import ROUNDING

        values = np.asarray(part.p_value)
        self._count += int((~np.isnan(values)).sum())
        self._p_values.extend(values[values <= self.level + ROUNDING])

    def add_row(self, row: dict[str, Any]) -> None:
        """A row that an earlier run has written."""
        if row["p_value"] is not None:
            self._count += 1
            self._p_values.append(row["p_value"])

    def largest(self) -> float:
        """The largest p-value that is marked, and what it may gain by being written; below all of them if none is."""
        import numpy as np

        from featdiff.verdicts.calibration import ROUNDING
        from featdiff.verdicts.fdr import fdr_threshold

        return fdr_threshold(np.array(self._p_values), self.level, self._count) + ROUNDING

    def in_words(self, groups: int = 0) -> str:
        """What was flagged; if nothing was, what it would have taken, where the held-out ``groups`` are known."""
        import numpy as np

        from featdiff.verdicts.fdr import fewest_flags
        from featdiff.verdicts.results import FDR_FLAG

        p_values = np.array(self._p_values)
        marked = p_values[p_values <= self.largest()]
        if len(marked):
            return (
                f"fdr {self.level:g}: {len(marked):,} of {self._count:,} are marked in {FDR_FLAG}, those with a "
                f"p-value up to {marked.max():.2g}; on average at most {100 * self.level:g} % of such marks are false"
            )
        none = f"fdr {self.level:g}: none of {self._count:,} is marked in {FDR_FLAG}"
        if not groups:
            return none
        fewest = fewest_flags(self._count, self.level, groups)
        return f"{none}; with {groups:,} held-out images, at least {fewest:,} must stand out at once"

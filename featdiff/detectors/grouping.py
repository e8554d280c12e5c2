"""Which images are taken to belong together at fit, and the plan of who trains and who calibrates that follows."""

from __future__ import annotations

import math
import sys
import warnings
from dataclasses import dataclass

import numpy as np

from ..data.groups import AUTO, NONE, Groups
from ..data.splits import CALIBRATION, FEW, Plan, make_plan
from ..exceptions import NearCopiesFound, UsageError
from ..features.layout import FeatureLayout
from ..features.store import Features
from ..scores.near_copies import find_near_copies
from ..scores.nearest import views
from ..verdicts.calibration import is_supported, needed_for, offered

# Near-copies among fewer images mean nothing.
_FEWEST = 20
# Of more images, unless asked, only stretches of neighbours in the list are looked at first: bursts lie side by side.
_MANY = 100_000
_STRETCHES, _STRETCH = 20, 1_000


@dataclass(frozen=True)
class Grouping:
    """Which images belong together.

    Attributes
    ----------
    how : str
        ``none`` (each image is a group of its own), ``auto`` (near-copies), or what was given.
    numbers : ndarray of shape (N,) of int, optional
        The group of each different image; None where each is a group of its own.
    copied : float, optional
        Share of the images that have near-copies, where these were looked for.
    false_alarms : float, optional
        The false-alarm rate that a split by chance is estimated to give where 5 % are asked for.
    """

    how: str = NONE
    numbers: np.ndarray | None = None
    copied: float | None = None
    false_alarms: float | None = None

    @classmethod
    def of(cls, numbers: np.ndarray, groups: Groups) -> Grouping:
        """Groups that were given."""
        how = str(groups) if isinstance(groups, str) else "labels"
        return cls() if how == NONE else cls(how, numbers)

    @classmethod
    def found(cls, features: Features, layout: FeatureLayout, asked: bool, divided: bool = True) -> Grouping:
        """Near-copies among different images: always the groups if asked for, else where a split by chance would fail.

        ``divided``: there is to be a split; else all images calibrate, and the warning says so.

        Warns
        -----
        NearCopiesFound
            They are the groups without being asked for.
        """
        n = len(features)
        if n < _FEWEST or (n > _MANY and not asked and not _suspicious(features, layout)):
            return cls()

        near = find_near_copies(features, views(layout))
        if asked:
            return cls(AUTO, near.groups, near.copied, near.false_alarms)
        if not near.spoil_a_split:
            return cls(NONE, None, near.copied, near.false_alarms)

        consequence = "They are no independent evidence, so near-copies count together"
        if divided:
            consequence = (
                f"Divided by chance, about {near.false_alarms:.0%} of ordinary images would be flagged where 5% are "
                "asked for, so near-copies are kept together"
            )
        message = (
            f"{near.copied:.0%} of the images have near-copies among the others, as in bursts, videos, or several "
            f"pictures of one part. {consequence}, as with groups=auto. Say which belong together if you know, or "
            "groups=none"
        )
        warnings.warn(NearCopiesFound(message, argument="groups"), stacklevel=_level_of_caller())
        return cls(AUTO, near.groups, near.copied, near.false_alarms)

    @property
    def count(self) -> int | None:
        """How many groups there are; None where each image is its own."""
        return None if self.numbers is None else len(np.unique(self.numbers))


def _level_of_caller() -> int:
    """The stack level, seen from the caller, of the line outside this package that called fit."""
    package = __name__.partition(".")[0]
    frame = sys._getframe(1)
    level = 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame = frame.f_back
        level += 1
    return level


def _suspicious(features: Features, layout: FeatureLayout) -> bool:
    """Whether stretches of neighbours in a long list hold many near-copies."""
    starts = np.linspace(0, len(features) - _STRETCH, _STRETCHES).astype(int)
    rows = np.unique(np.concatenate([np.arange(start, start + _STRETCH) for start in starts]))
    return find_near_copies(features.select(rows), views(layout)).spoil_a_split


def make_checked_plan(
    n: int, calibration: float | str, validation: float, seed: int, groups: np.ndarray | None, fpr: float
) -> Plan:
    """Who trains, validates and calibrates; see :func:`featdiff.data.splits.make_plan`.

    Raises
    ------
    UsageError
        Too few images, or groups, for ``fpr``: it says how many would do.
    """
    plan = make_plan(n, calibration, validation, seed, groups)
    if is_supported(fpr, plan.groups):
        return plan

    count = n if groups is None else len(np.unique(groups))
    what = "images" if groups is None else "groups of images that belong together"
    needed = needed_in_all(fpr, calibration)
    hint = "" if groups is None else "; groups=none takes each image for a group, but then false alarms will not hold"
    raise UsageError(
        f"fpr {fpr:g} needs about {needed:,} {what}, and there are {count:,}: give more, or ask for "
        f"{offered(plan.groups)}{hint}",
        argument="fpr",
    )


def needed_in_all(fpr: float, calibration: float | str) -> int:
    """How many images, or groups, a false-alarm rate needs in all."""
    needed = needed_for(fpr)
    if calibration == "auto" and needed <= FEW:
        return needed
    return math.ceil(needed / (CALIBRATION if calibration == "auto" else float(calibration)))

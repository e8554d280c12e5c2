"""A fitted detector and further good images -> a detector of both, without starting anew.

Only the new images go through the backbone. Features of the older ones come from the cache, or a few of them from the
model itself. Banks get the new rows. The denoisers train on from where they are, on older and new rows alike, so that
they forget nothing. The older held-out images are measured again, for with other scores their old ones mean nothing,
and a part of the new images is held out beside them. No image changes sides: what has trained never calibrates.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.groups import Groups, check_groups
from ..data.splits import MOST_CALIBRATION, MOST_VALIDATION, Plan, Split, evenly
from ..exceptions import UsageError
from ..features.store import Joined
from ..runtime.gradients import gradients
from ..runtime.progress import Progress, shown
from ..scores.fused import Heads
from ..scores.registry import Context
from ..verdicts.calibration import Calibration, is_supported
from .bank_images import BankImages
from .base import BaseDetector
from .checks import make_recipe
from .feature import Detector
from .fitting import as_digests, calibrated, choose_bank, further
from .grouping import make_checked_plan
from .kept_images import CALIBRATION, TRAINING, VALIDATION, KeptImages
from .local_update import listed_again, update_local
from .new_images import NewImages, check_ordinary, joint_groups, read_new_images, sides_of
from .old_images import OldImages, find_old_images
from .soundness import SAMPLE


@dataclass(frozen=True)
class Changes:
    """What an update has changed.

    Attributes
    ----------
    added : int
        New images: different ones, which the detector did not know.
    known : int
        Images that were left out, for the detector was fitted on the same contents.
    unreadable : list of (path, reason)
    strange : float
        Share of the new images that the detector flagged before.
    source : str
        Where features of the older images came from: ``cache``, ``given``, or ``model``, which keeps a few.
    old_images, at_hand : int
        Older images, and how many of them had features.
    local : bool
        Whether the detector has a local score, which was updated, too.
    anew : bool
        Whether the scores were fitted anew on features: what is calibrated by folds has no held-out images to keep.
    fpr : float
        False-alarm rate of the thresholds and rates.
    held_out : (int, int)
        Older and new images that calibrate now.
    threshold : (float, float)
        Before and after; each is in standard deviations of its own held-out images.
    false_alarms : dict of str to (float, float)
        Shares of the held-out images that are flagged, before and after: of the ``old`` and the ``new`` ones. NaN where
        there are none.
    seconds : float
    """

    added: int
    known: int
    unreadable: list[tuple[str, str]]
    strange: float
    source: str
    old_images: int
    at_hand: int
    local: bool
    anew: bool
    fpr: float
    held_out: tuple[int, int]
    threshold: tuple[float, float]
    false_alarms: dict[str, tuple[float, float]]
    seconds: float


def update(
    detector: BaseDetector[Any],
    images: object,
    *,
    accept: bool = False,
    old: object = None,
    groups: Groups | None = None,
    progress: Progress | bool | None = None,
) -> tuple[Detector, Changes]:
    """Add good images to what a detector takes for normal.

    Parameters
    ----------
    detector : Detector
        Fitted. It stays as it is.
    images : object
        At least 20 new images, as for :meth:`featdiff.Detector.fit`. Those whose contents it was fitted on are left
        out. For a detector with a local score, images that can be read again.
    accept : bool, default False
        Add them though most of them are out-of-distribution to the detector.
    old : object, optional
        The images it was fitted on, should their features be gone from the cache: they are computed again. Otherwise,
        the few hundred rows of features that the detector keeps stand for them. A detector with a local score always
        needs them, for nothing is kept of their places.
    groups : str, path, sequence or mapping, optional
        Which of the new images belong together, as for :meth:`featdiff.Detector.fit`. By default near-copies are looked
        for among older and new images.
    progress : bool or callable (stage, done, total), optional
        True shows bars.

    Returns
    -------
    Detector
        A new one, fitted on older and new images.
    Changes
        What is different about it.

    Raises
    ------
    NotFittedError
    UsageError
        A detector that cannot be updated, too few new images, most of them out-of-distribution (unless accepted), or
        ``old`` images that are not those it was fitted on.
    FeatdiffError
        The cache cannot be written, or training diverged.
    """
    check_groups(groups)
    before = copy.copy(_checked(detector))
    began = time.monotonic()
    with shown(progress) as report, gradients():
        if before.local_ is not None:
            images, old = listed_again(before, images, old)
        after = copy.copy(before.without_local())
        past = find_old_images(after, old, report)
        fresh = read_new_images(before, after, images, past, report)
        flagged = before.calibration_.flags(fresh.scores, before.fpr)[1]
        check_ordinary(flagged, before.fpr, accept)

        numbers = joint_groups(after, past, fresh, groups)
        fit = _fit_anew if past.by_folds else _fit_further
        plan, scores, layers = fit(after, past, fresh, numbers, report)
        if before.local_ is not None:
            scores = update_local(before.local_, after, past, fresh, plan, scores, report)
        after.calibration_ = Calibration(scores, plan.groups, layers)
        given = BankImages.of(fresh.images, fresh.extraction, _added(after, fresh), after.settings, report)
        after.bank_images_ = BankImages.together(after.bank_digests_, [before.bank_images_, given])
    after.n_images_ = len(past.digests) + len(fresh.digests)

    is_old = plan.calibration < len(past.at_hand)
    held_out = plan.calibration[~is_old] - len(past.at_hand)
    now = after.calibration_.flags(scores, after.fpr)[1]
    was = before.calibration_.flags(before.calibration_.scores, before.fpr)[1]
    changes = Changes(
        added=len(fresh.digests),
        known=fresh.known,
        unreadable=after.unreadable_,
        strange=float(flagged.mean()),
        source=past.source,
        old_images=len(past.digests),
        at_hand=len(past.at_hand),
        local=after.local_ is not None,
        anew=past.by_folds,
        fpr=after.fpr,
        held_out=(len(scores) - len(held_out), len(held_out)),
        threshold=(before.calibration_.threshold(before.fpr), after.calibration_.threshold(after.fpr)),
        false_alarms={
            "old": (_share(was), _share(now[is_old])),
            "new": (_share(flagged[held_out]), _share(now[~is_old])),
        },
        seconds=time.monotonic() - began,
    )
    return after, changes


def _checked(detector: BaseDetector[Any]) -> Detector:
    """The detector, if it is one that can be updated."""
    detector.check_fitted()
    if not isinstance(detector, Detector):
        raise UsageError(f"a detector of the {detector.mode} mode cannot be updated: train anew, on old and new images")
    if detector.recalibrations_:
        raise UsageError(
            "this detector was recalibrated, and an update would bring back its first held-out images: update "
            "the one it was made of, then recalibrate that"
        )
    return detector


# ---- fits ----


def _fit_further(
    detector: Detector, past: OldImages, fresh: NewImages, numbers: np.ndarray, progress: Progress | None
) -> tuple[Plan, np.ndarray, dict[str, np.ndarray]]:
    """Go on from the detector's heads.

    Returns the sides of the older images at hand and the new ones, end to end; and of those that calibrate the scores,
    and those of each layer.
    """
    settings = detector.settings
    count = len(past.at_hand)
    sides = sides_of(past, numbers, settings.calibration, settings.validation, settings.seed)
    old_sides = past.sides[past.at_hand]

    def on(side: int, most: int) -> np.ndarray:
        rows = np.flatnonzero(np.concatenate([old_sides, sides]) == side)
        return np.sort(np.random.default_rng(settings.seed).permutation(rows)[:most])

    split = Split(on(TRAINING, len(numbers)), on(VALIDATION, MOST_VALIDATION), on(CALIBRATION, MOST_CALIBRATION))
    every = Joined([past.features, fresh.features])
    training, validation, calibration = map(every.select, (split.training, split.validation, split.calibration))
    rows = split.calibration
    groups = len(np.unique(numbers[rows]))
    if not is_supported(detector.fpr, groups):
        raise UsageError(
            f"fpr {detector.fpr:g} needs more held-out images than the {groups:,} that are at hand: give the images "
            "that the model was fitted on, too (old=IMAGES)",
            argument="old",
        )

    context = Context(
        training=training,
        validation=validation,
        recipe=further(make_recipe(settings.recipe), len(training)),
        seed=settings.seed,
        classifier=detector._classifier(),
        progress=progress,
    )
    heads, seconds = _heads_from(detector, past, fresh, np.flatnonzero(sides == TRAINING), context)
    detector.training_seconds_ += seconds
    some = training[evenly(np.arange(len(training)), SAMPLE)]
    scores, layers = calibrated(heads, heads.measure_all(calibration), some)
    detector.heads_ = heads
    detector.calibration_digests_ = [*(past.digests[past.at_hand[i]] for i in rows[rows < count])]
    detector.calibration_digests_ += [fresh.digests[i - count] for i in rows[rows >= count]]
    detector.kept_ = _kept(detector, past, fresh, sides, numbers)
    return Plan(split, (), groups), scores, layers


def _heads_from(
    detector: Detector, past: OldImages, fresh: NewImages, new: np.ndarray, context: Context
) -> tuple[Heads, float]:
    """Heads that go on from the detector's, and the seconds of training; sets the digests of their bank."""
    settings = detector.settings
    bank = detector.bank_digests_
    old_rows = past.rows_of(bank)
    every = Joined([old_rows or past.features, fresh.features.select(new)])
    size = min(settings.bank_size, len(bank) + len(new))
    heads = detector._make_heads(size)
    method = settings.coreset if old_rows is not None else "random"  # others look at the rows
    chosen = choose_bank(every, np.arange(len(bank) + len(new)), size, method, settings.seed, heads.diffusion.stages)

    kept = chosen[chosen < len(bank)]
    added = new[chosen[chosen >= len(bank)] - len(bank)]
    rows = None if old_rows is None else every.select(chosen)
    state = heads.fit_further(detector.heads_, kept, fresh.features.select(added), rows, context)
    detector.bank_digests_ = np.concatenate([bank[kept], as_digests(fresh.digests, added)])
    detector.validation_loss_ = state.best_loss
    return heads, state.seconds


def _kept(detector: Detector, past: OldImages, fresh: NewImages, sides: np.ndarray, numbers: np.ndarray) -> KeptImages:
    """What the next update needs: all older images, at hand or not, and the new ones."""
    old = len(past.digests)
    count = len(past.at_hand)
    groups = np.arange(old) if past.groups is None else past.groups
    if len(np.unique(numbers)) == len(numbers) and past.groups is None:
        joint = None
    else:  # a new image takes the number of an older one of its group
        number_of = dict(zip(numbers[:count].tolist(), groups[past.at_hand].tolist(), strict=True))
        beyond = int(groups.max()) + 1
        joint = np.concatenate([groups, [number_of.get(n, beyond + n) for n in numbers[count:].tolist()]])
    return KeptImages.of(
        [*past.digests, *fresh.digests],
        np.concatenate([past.sides, sides]),
        joint,
        np.concatenate([past.at_hand, old + np.arange(len(fresh.digests))]),
        Joined([past.features, fresh.features]),
        detector.extractor_.layout,
    )


def _fit_anew(
    detector: Detector, past: OldImages, fresh: NewImages, numbers: np.ndarray, progress: Progress | None
) -> tuple[Plan, np.ndarray, dict[str, np.ndarray]]:
    """Fit on the features of all images: by folds each image has trained, so that none is left to calibrate again.

    Returns as :func:`_fit_further`.
    """
    settings = detector.settings
    features = Joined([past.features, fresh.features])
    digests = [*(past.digests[i] for i in past.at_hand), *fresh.digests]
    groups = None if len(np.unique(numbers)) == len(numbers) else numbers
    plan = make_checked_plan(
        len(digests), settings.calibration, settings.validation, settings.seed, groups, detector.fpr
    )
    fitted = detector.fit_rows(features, digests, plan, fresh.store.folder, progress)
    detector.calibration_digests_ = [digests[i] for i in plan.final.calibration]
    detector.kept_ = KeptImages.of_split(digests, features, plan.final, groups, detector.extractor_.layout)
    return plan, fitted.calibration, fitted.layers


# ---- small parts ----


def _added(detector: Detector, fresh: NewImages) -> np.ndarray:
    """Contents (n, 16) of the bank that are new."""
    new = set(fresh.digests)
    return detector.bank_digests_[[digest.tobytes() in new for digest in detector.bank_digests_]]


def _share(flags: np.ndarray) -> float:
    return float(flags.mean()) if len(flags) else float("nan")

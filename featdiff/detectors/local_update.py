"""The local score of a detector that is updated: it looks at places, so the images are read again, old and new."""

from __future__ import annotations

import numpy as np

from ..data.loaders import is_loader
from ..data.references import ImageRef, list_images
from ..data.splits import Plan
from ..exceptions import UsageError
from ..runtime.progress import Progress
from .feature import Detector
from .local_part import LocalPart
from .new_images import NewImages
from .old_images import OldImages


def listed_again(detector: Detector, images: object, old: object) -> tuple[list[ImageRef], list[ImageRef]]:
    """New and old images, if both can be read again (``UsageError``).

    The engine is chosen as for all of them, so that features of old and new images come from the same one.
    """
    if old is None:
        raise UsageError(
            "the model has a local score, and keeps nothing of the places of its images: give the images that it was "
            "fitted on again (old=IMAGES)",
            argument="old",
        )
    for name, given in (("images", images), ("old", old)):
        if is_loader(given):
            raise UsageError(
                f"{name}: the model has a local score, which needs images that can be read again (files, pictures or "
                "arrays, no loader or generator)",
                argument=name,
            )
    listed = list_images(images), list_images(old)
    detector._ready([*listed[1], *listed[0]])
    return listed


def update_local(
    older: LocalPart,
    detector: Detector,
    past: OldImages,
    fresh: NewImages,
    plan: Plan,
    scores: np.ndarray,
    progress: Progress | None,
) -> np.ndarray:
    """Give a detector that was updated without it a local score again.

    It goes on from the older one, or is fitted anew where calibration is by folds. It calibrates with the images that
    calibrate the global score, in the same order.

    Parameters
    ----------
    older : LocalPart
        Of the detector before the update.
    detector : Detector
        Changed.
    past : OldImages
        All of them at hand.
    fresh : NewImages
    plan : Plan
        Sides of older and new images, end to end.
    scores : ndarray of shape (n,)
        Global scores of the images that calibrate.
    progress : callable (stage, done, total), optional

    Returns
    -------
    ndarray of shape (n,)
        Their joint scores.
    """
    assert isinstance(fresh.images, list)
    positions = fresh.extraction.first_positions(fresh.digests)
    lists = [past.refs, [fresh.images[position] for position in positions]]
    digests = [*past.digests, *fresh.digests]
    fit = detector.local_fit(lists, digests, fresh.store.folder, progress)
    if past.by_folds:
        fitted = fit.fit(plan)
    else:
        fitted = fit.fit_further(older.joint.local, plan.final, np.arange(len(digests)) >= len(past.digests))

    detector.kept_ = detector.kept_.without_rows()
    return detector.join_local(fitted, scores, plan.groups)

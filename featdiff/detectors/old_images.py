"""The images that a detector was fitted on, as far as they are at hand for an update: features, sides and groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..data.loaders import is_loader
from ..data.references import ImageRef, list_images
from ..exceptions import UsageError
from ..features.extraction import Extraction
from ..features.store import Features, FeatureStore, Rows
from ..runtime.progress import Progress
from .feature import Detector

#: Where features come from: the cache, images that were given again, or the model, which keeps a few.
CACHE, GIVEN, MODEL = "cache", "given", "model"


@dataclass(frozen=True, eq=False)
class OldImages:
    """Different images that a detector was fitted on.

    Parameters
    ----------
    digests : list of bytes
        Contents of all N of them.
    sides : ndarray of shape (N,) of int
        ``TRAINING``, ``VALIDATION`` or ``CALIBRATION``.
    groups : ndarray of shape (N,) of int, optional
        Images of one number belong together; None where each is a group of its own.
    by_folds : bool
        Whether those that trained calibrated, too.
    at_hand : ndarray of shape (n,) of int
        Images with features, ascending.
    features : Features
        Their rows.
    source : str
        Where these come from.
    refs : list of ImageRef
        The images themselves (N), in the same order, where they are given again; else empty.
    """

    digests: list[bytes]
    sides: np.ndarray
    groups: np.ndarray | None
    by_folds: bool
    at_hand: np.ndarray
    features: Features
    source: str
    refs: Sequence[ImageRef] = ()

    def share_at_hand(self, side: int) -> float:
        """Share of the images of one side that are at hand."""
        return float((self.sides[self.at_hand] == side).sum() / max(1, (self.sides == side).sum()))

    def rows_of(self, digests: np.ndarray) -> Features | None:
        """Rows of these contents (n, 16), in this order; None unless all are at hand."""
        rows = {self.digests[image]: row for row, image in enumerate(self.at_hand)}
        found = [rows.get(digest.tobytes(), -1) for digest in digests]
        return self.features.select(np.array(found, dtype=np.int64)) if min(found, default=0) >= 0 else None


def find_old_images(detector: Detector, old: object, progress: Progress | None) -> OldImages:
    """What is at hand of the images that a detector was fitted on.

    Parameters
    ----------
    detector : Detector
    old : object
        The images themselves; None where they are not given.
    progress : callable (stage, done, total), optional

    Raises
    ------
    UsageError
        Nothing to go on from, or ``old`` images that are not those it was fitted on.
    """
    if old is not None:
        return _given(detector, old, progress)
    kept = detector.kept_
    digests = kept.contents
    for store in (detector.training_store(), detector.feature_store()):
        if all(digest in store for digest in digests):
            every = np.arange(len(digests))
            return OldImages(digests, kept.sides, kept.groups, kept.by_folds, every, store.table(digests), CACHE)

    if not len(kept.chosen):
        raise UsageError(
            "features of the images that the model was fitted on are gone from the cache, and it keeps none: give the "
            "images again (old=IMAGES)",
            argument="old",
        )
    if kept.by_folds and len(kept.chosen) < len(digests):
        raise UsageError(
            f"the model is calibrated by folds, and needs features of all {len(digests):,} images that it was fitted "
            "on, which are gone from the cache: give these images too (old=IMAGES)",
            argument="old",
        )
    rows = Rows(kept.rows(detector.extractor_.layout))
    return OldImages(digests, kept.sides, kept.groups, kept.by_folds, kept.chosen, rows, MODEL)


def _given(detector: Detector, old: object, progress: Progress | None) -> OldImages:
    """Features of images that are given again."""
    images = old if is_loader(old) else list_images(old)
    extraction, store = detector._extract(images, progress)
    found = _known_again(detector, extraction, store)
    if not isinstance(images, list):
        return found
    return replace(found, refs=[images[position] for position in extraction.first_positions(found.digests)])


def _known_again(detector: Detector, extraction: Extraction, store: FeatureStore) -> OldImages:
    kept = detector.kept_
    digests = kept.contents
    _check_all_there(set(extraction.digests), digests)
    every = np.arange(len(digests))
    return OldImages(digests, kept.sides, kept.groups, kept.by_folds, every, store.table(digests), GIVEN)


def _check_all_there(given: set[bytes], wanted: Sequence[bytes]) -> None:
    missing = sum(digest not in given for digest in wanted)
    if missing:
        raise UsageError(
            f"{missing:,} of the {len(wanted):,} images that the model was fitted on are not among the old images",
            argument="old",
        )

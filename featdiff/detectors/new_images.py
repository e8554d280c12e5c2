"""New images that are to be added to a detector: which are new, which belong together, and which of them train."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..data.groups import AUTO, Groups, connected, is_word, label_images, numbered
from ..data.loaders import is_loader
from ..data.references import list_images
from ..data.splits import CALIBRATION as SHARE
from ..data.splits import split
from ..exceptions import UsageError
from ..features.extraction import Extraction
from ..features.store import Features, FeatureStore, Joined
from ..runtime.progress import Progress
from .feature import Detector
from .grouping import Grouping
from .kept_images import CALIBRATION, TRAINING, VALIDATION
from .old_images import OldImages

#: Fewer new images cannot be divided into some that train and some that are held out.
FEWEST = 20
#: If a larger share of the new images is strange to the detector, they are taken for a mistake unless accepted.
MOSTLY = 0.5
# The side of an image that may be on any.
_FREE = 3


@dataclass(frozen=True, eq=False)
class NewImages:
    """Different new images: what was given, what was read of it, and of those to add contents, features, old scores."""

    images: object
    extraction: Extraction
    store: FeatureStore
    digests: list[bytes]
    features: Features
    scores: np.ndarray
    known: int


def read_new_images(
    before: Detector, detector: Detector, images: object, past: OldImages, progress: Progress | None
) -> NewImages:
    """New images, as the detector before the update sees them, and their features, as its global scores take them.

    Those that it was fitted on are left out (``UsageError`` if few are left).
    """
    if not is_loader(images):
        images = list_images(images)
    extraction, seen = (before if before.local_ else detector)._extract(images, progress)
    detector.unreadable_ = extraction.unreadable
    known = {*past.digests, *(digest.tobytes() for digest in detector.bank_digests_)}
    digests = [digest for digest in dict.fromkeys(extraction.digests) if digest not in known]
    count = sum(digest in known for digest in extraction.digests)
    detector.n_duplicates_ = len(extraction.digests) - count - len(digests)

    if len(digests) < FEWEST:
        besides = f", besides {count:,} that the model was fitted on" if count else ""
        raise UsageError(f"an update needs at least {FEWEST} new images that can be read, not {len(digests)}{besides}")

    rows = seen.table(digests)
    scores = np.concatenate([before.score_features(part) for part in rows.chunks()])
    store = seen if before.local_ is None else _without_local_score(rows, digests, detector.feature_store())
    return NewImages(images, extraction, store, digests, store.table(digests), scores, count)


def _without_local_score(rows: Features, digests: list[bytes], store: FeatureStore) -> FeatureStore:
    """The store with these rows, but for the local score that they end with."""
    every = (row for part in rows.chunks() for row in part.numpy())
    for digest, row in zip(digests, every, strict=True):
        store.add(digest, row[: store.width])
    store.flush()
    return store


def check_ordinary(flagged: np.ndarray, fpr: float, accept: bool) -> None:
    """Refuse images of which the detector flags most: they may be the wrong folder."""
    if not accept and flagged.mean() > MOSTLY:
        raise UsageError(
            f"{flagged.mean():.0%} of the {len(flagged):,} new images are out-of-distribution to the model (at fpr "
            f"{fpr:g}): look at them; if they are good all the same, accept them",
            argument="accept",
        )


def joint_groups(detector: Detector, past: OldImages, fresh: NewImages, groups: Groups | None) -> np.ndarray:
    """A group number for each older image at hand, then for each new one.

    Near-copies of older images stay on their side: as held-out images, they would look too ordinary.
    """
    count = len(past.at_hand)
    total = count + len(fresh.digests)
    numbers = np.arange(total)
    if past.groups is not None:
        numbers[:count] = total + past.groups[past.at_hand]
    asked = is_word(groups, AUTO)
    if groups is None or asked:
        both = Joined([past.features, fresh.features])
        detector.grouping_ = Grouping.found(both, detector.extractor_.layout, asked)
        found = detector.grouping_.numbers
    else:
        extraction = fresh.extraction
        labels = label_images(groups, extraction.paths, extraction.positions, extraction.total)
        of_content = dict(zip(dict.fromkeys(extraction.digests), numbered(labels, extraction.digests), strict=True))
        found = np.arange(total)
        found[count:] = [total + of_content[digest] for digest in fresh.digests]
        detector.grouping_ = Grouping.of(found, groups)
    return numbers if found is None else _merged(numbers, found)


def _merged(numbers: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Groups of images that belong together by either number (n,)."""
    every = np.arange(len(numbers))
    columns = [len(every) + np.unique(numbers, return_inverse=True)[1]]
    columns.append(columns[0].max() + 1 + np.unique(others, return_inverse=True)[1])
    size = int(columns[1].max()) + 1
    return connected(size, np.tile(every, 2), np.concatenate(columns))[: len(every)]


def sides_of(
    past: OldImages, numbers: np.ndarray, calibration: float | str, validation: float, seed: int
) -> np.ndarray:
    """The side of each new image: that of older ones of its group, or by chance.

    Of older images that are at hand in part, only so many new ones are held out that old and new ones have their due.
    """
    count = len(past.at_hand)
    bound = np.full(numbers.max() + 1, _FREE)
    np.minimum.at(bound, numbers[:count], past.sides[past.at_hand])
    sides = bound[numbers[count:]]

    free = np.flatnonzero(sides == _FREE)
    groups = numbers[count:][free]
    if len(np.unique(groups)) < FEWEST:  # nearly all are near-copies of older images
        sides[free] = TRAINING
        return sides
    share = SHARE if calibration == "auto" else float(calibration)
    parts = split(len(free), share * past.share_at_hand(CALIBRATION), validation, seed, groups)
    for side, chosen in ((TRAINING, parts.training), (VALIDATION, parts.validation), (CALIBRATION, parts.calibration)):
        sides[free[chosen]] = side
    sides[sides == _FREE] = VALIDATION  # beyond the most that calibrate
    return sides

"""A fitted detector and normal images from elsewhere -> the same detector with a calibration from these."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..data.decoding import Transform
from ..data.groups import Groups, check_groups
from ..exceptions import LargeShift, UsageError, some_of
from ..features.extraction import Extraction, extract
from ..features.extractor import FeatureExtractor
from ..features.store import FeatureStore, FeatureTable
from ..runtime.progress import Progress, shown
from ..scores.joint import NAMES
from ..verdicts.calibration import Calibration, check_fpr, is_supported, needed_for, offered
from ..verdicts.shares import interval_of_share, range_of_rate
from .base import BaseDetector
from .feature_scoring import FeatureScoring
from .grouping import Grouping
from .local_part import HEAT
from .soundness import check_spread

#: Above this share of flagged images, more has changed than a threshold can make up for.
LARGE = 0.5

_LAYER = "layer "

D = TypeVar("D", bound=BaseDetector[Any])


class Calibrated(Protocol):
    """A detector of images, or an estimator on rows."""

    calibration_: Calibration
    recalibrations_: tuple[Mapping[str, Any], ...]


C = TypeVar("C", bound=Calibrated)


@dataclass(frozen=True)
class Recalibration(Generic[C]):
    """A detector with a new calibration, and what changed.

    Attributes
    ----------
    detector : BaseDetector or FeatureDiffusion
        The new one; the old one is as it was.
    old : Calibration
        Of the old one.
    fpr : float
        The false-alarm rate that the numbers below are for.
    flagged : int, optional
        How many of the new images (or rows) the old calibration flags; None if it does not support ``fpr``.
    n_duplicates : int
        Copies that were left out.
    grouping : Grouping
        Which of the new images were taken to belong together.
    unreadable : list of (path, reason)
        Images that were left out.
    """

    detector: C
    old: Calibration
    fpr: float
    flagged: int | None
    n_duplicates: int
    grouping: Grouping
    unreadable: list[tuple[str, str]]

    @property
    def share(self) -> tuple[float, float, float] | None:
        """The share of the new images that the old calibration flags, and its 95 % interval; None as ``flagged``.

        Images of one group count as one in the interval.
        """
        if self.flagged is None:
            return None
        new = self.detector.calibration_
        share = self.flagged / len(new)
        return share, *interval_of_share(share, new.groups)

    @property
    def expected(self) -> tuple[float, float]:
        """The share of further such images that the new calibration flags lies here (95 %), around ``fpr``."""
        return range_of_rate(self.fpr, self.detector.calibration_.groups)

    @property
    def thresholds(self) -> tuple[float | None, float]:
        """Scores that just pass at ``fpr``, by the old and by the new calibration."""
        old = None if self.flagged is None else self.old.threshold(self.fpr)
        return old, self.detector.calibration_.threshold(self.fpr)

    def facts(self) -> dict[str, Any]:
        """What ``config.json`` keeps of it."""
        new = self.detector.calibration_
        old_threshold, threshold = self.thresholds
        return {
            "images": len(new),
            "groups": new.groups,
            "fpr": self.fpr,
            "threshold": threshold,
            "old_images": len(self.old),
            "old_groups": self.old.groups,
            "old_threshold": old_threshold,
            "old_flagged": self.flagged,
        }


def recalibrate(
    detector: D,
    images: object,
    *,
    fpr: float | None = None,
    groups: Groups | None = None,
    progress: Progress | bool | None = None,
) -> Recalibration[D]:
    """Calibrate a fitted detector anew, for another site or camera with the same object.

    Only what p-values are compared with is replaced. Backbone, denoisers, banks and the scale of the score stay, so
    the score of an image is the same as before; what changes is where it counts as strange.

    Parameters
    ----------
    detector : BaseDetector
        Fitted, of either mode; it stays as it is.
    images : object
        Normal images of the new place that took no part in training, as for :meth:`featdiff.Detector.fit`; those of
        the same content count once. All of them calibrate, so that 19 do for ``fpr`` 0.05, and 99 for 0.01.
    fpr : float, optional
        False-alarm rate of the new detector; default: that of the old one.
    groups : str, path, sequence or mapping, optional
        Which images belong together, as for :meth:`featdiff.Detector.fit`: they are no independent evidence. Default:
        near-copies are looked for, and are groups if there are many (not in pixel mode).
    progress : bool or callable (stage, done, total), optional
        True shows bars.

    Returns
    -------
    Recalibration

    Raises
    ------
    NotFittedError
    UsageError
        No image can be read; some were in training, as far as the detector keeps these; or too few for ``fpr``.
    FeatdiffError
        Scores without spread, or that are not finite.

    Warns
    -----
    LargeShift
        The old calibration flags most of the images.
    NearCopiesFound
        Near-copies were taken as groups without being asked for.

    Examples
    --------
    >>> from featdiff import Detector
    >>> photos = np.random.default_rng(0).integers(0, 255, (80, 32, 32, 3), dtype=np.uint8)  # yours go here
    >>> quick = {"layers": ["layer1"], "recipe": {"epochs": 1, "min_steps": 5}, "fpr": 0.2}
    >>> detector = Detector("test_resnet", pretrained=False, **quick).fit(photos[:40])
    >>> changed = recalibrate(detector, photos[40:] // 2 + 90)
    >>> len(changed.detector.calibration_), changed.fpr
    (40, 0.2)
    """
    check_groups(groups)
    detector.check_fitted()
    if detector.mode == "joined":
        raise UsageError("a model of several encoders cannot be recalibrated yet: train one for the new place")
    rate = detector.fpr if fpr is None else check_fpr(fpr)
    with shown(progress) as report:
        extraction, digests, features = _read(detector, images, report)
        _check_unknown(detector, extraction, digests)
        grouping = _group(detector, extraction, features, groups)
        count = grouping.count or len(digests)
        check_enough(rate, count, grouping, "images")
        scores = _scores(detector, features, report)

    own = scores.pop("")
    check_spread(own)
    other = _with(detector, own, scores, count, rate)
    other.unreadable_ = extraction.unreadable
    other.calibration_digests_ = digests

    duplicates = len(extraction.digests) - len(digests)
    return changes(detector, other, own, rate, duplicates, grouping, extraction.unreadable, "images")


class _WithHottestPlace:
    """An extractor of features whose rows end with the heat of the strangest place, so that one pass gives both."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        self.extractor = extractor
        self.width = extractor.width + 1

    @property
    def device(self) -> torch.device:
        return self.extractor.device

    @property
    def transform(self) -> Transform:
        return self.extractor.transform

    def key(self, variant: str = "") -> str:
        return self.extractor.key(f"hottest place {variant}")

    def __call__(self, pixels: Tensor) -> Tensor:
        rows, heat = self.extractor.with_heat(pixels)
        assert heat is not None
        return torch.cat([rows, heat.flatten(1).amax(1, keepdim=True).to(rows)], dim=1)


def _read(
    detector: BaseDetector[Any], images: object, progress: Progress | None
) -> tuple[Extraction, list[bytes], FeatureTable]:
    """The images, their different contents, and rows of these; kept in the cache, as those of a fit are."""
    if isinstance(detector, FeatureScoring) and detector.local_ is not None:
        images = detector._ready(images)
        watching = _WithHottestPlace(detector.extractor_)
        store = FeatureStore(detector.settings.cache_folder / "features" / watching.key(), watching.width)
        batches, total = detector.batches(images, store)
        extraction = extract(batches, watching, store, total, progress)
        if not extraction.digests:
            raise UsageError("none of the images could be read; the first: " + ": ".join(extraction.unreadable[0]))
    else:
        extraction, store = detector._extract(images, progress)
    digests = list(dict.fromkeys(extraction.digests))
    return extraction, digests, store.table(digests)


def _check_unknown(detector: BaseDetector[Any], extraction: Extraction, digests: list[bytes]) -> None:
    """Refuse images that the detector has seen: they look ordinary to it wherever they come from."""
    rows = detector.rows_in_bank(digests)
    if rows is None or not (rows >= 0).any():
        return
    known = {digest for digest, row in zip(digests, rows, strict=True) if row >= 0}
    paths = [path for path, digest in zip(extraction.paths, extraction.digests, strict=True) if digest in known]
    raise UsageError(
        f"{len(paths):,} of the {len(extraction.paths):,} images were in training, so they look more ordinary than new "
        f"ones, and a calibration with them would raise false alarms: leave them out: {some_of(paths)}"
    )


def _group(
    detector: BaseDetector[Any], extraction: Extraction, features: FeatureTable, groups: Groups | None
) -> Grouping:
    """As at fit, but for what is said of near-copies: here nothing is divided."""
    if groups is None and isinstance(detector, FeatureScoring):
        return Grouping.found(features, detector.extractor_.layout, asked=False, divided=False)
    return detector._group(extraction, features, groups)


def check_enough(fpr: float, count: int, grouping: Grouping, name: str) -> None:
    """Refuse a rate that so few images (or what they are called), or groups, cannot support."""
    if is_supported(fpr, count):
        return
    what = name if grouping.count is None else f"groups of {name} that belong together"
    raise UsageError(
        f"fpr {fpr:g} needs at least {needed_for(fpr):,} {what}, and there are {count:,}: give more, or ask for "
        f"{offered(count)}",
        argument="fpr",
    )


def _scores(detector: BaseDetector[Any], features: FeatureTable, progress: Progress | None) -> dict[str, np.ndarray]:
    """The ``ood_score`` of each row, under an empty name, and what else is calibrated: layers, and a local part."""
    parts: list[dict[str, np.ndarray]] = []
    done = 0
    for rows in features.chunks(detector.rows_at_once):
        if isinstance(detector, FeatureScoring):
            score, layers, joined = detector.measured(rows[:, : detector.extractor_.width])
            by_layer = {_LAYER + name: layers[:, i] for i, name in enumerate(detector.layers)}
            tensors = {"": score, **joined, **by_layer}
            if detector.local_ is not None:
                tensors[HEAT] = rows[:, -1]
            parts.append({name: values.double().cpu().numpy() for name, values in tensors.items()})
        else:
            parts.append({"": detector.score_features(rows)})
        done += len(rows)
        if progress:
            progress("scoring", done, len(features))

    scores = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if not all(np.isfinite(values).all() for values in scores.values()):
        bad = int((~np.isfinite(scores[""])).sum())
        raise UsageError(f"the scores of {bad:,} of the images are not finite, so that they cannot calibrate anything")
    return scores


def _with(detector: D, own: np.ndarray, parts: dict[str, np.ndarray], groups: int, fpr: float) -> D:
    """The same detector, calibrated with these scores (n,)."""
    other = copy.copy(detector)
    layers = {name.removeprefix(_LAYER): scores for name, scores in parts.items() if name.startswith(_LAYER)}
    other.calibration_ = Calibration(own, groups, layers)
    other.settings = detector.settings.with_(fpr=fpr)
    if isinstance(other, FeatureScoring) and other.local_ is not None:
        calibrations = {name: Calibration(parts[name], groups) for name in (*NAMES, HEAT)}
        other.local_ = replace(other.local_, calibrations=calibrations)
    return other


def changes(
    before: C,
    after: C,
    scores: np.ndarray,
    fpr: float,
    n_duplicates: int,
    grouping: Grouping,
    unreadable: list[tuple[str, str]],
    name: str,
) -> Recalibration[C]:
    """What another calibration, by these scores (n,) of images (or what they are called), has changed.

    ``after`` remembers it. Warns, as of the caller's caller, if most of them are strange to the old calibration.
    """
    old = before.calibration_
    flagged = int(old.flags(scores, fpr)[1].sum()) if is_supported(fpr, old.groups) else None
    result = Recalibration(after, old, fpr, flagged, n_duplicates, grouping, unreadable)
    after.recalibrations_ = (*before.recalibrations_, result.facts())

    share = result.share
    if share is not None and share[0] > LARGE:
        message = (
            f"{share[0]:.0%} of these {name} are strange to the old calibration: more has changed than a threshold can "
            f"make up for, and strange {name} will pass with them. Make sure that they are normal, or train on them"
        )
        warnings.warn(LargeShift(message), stacklevel=3)
    return result

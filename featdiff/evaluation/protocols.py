"""A fitted detector + an in-domain set + OOD sets -> metrics for every head, under named protocols."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..data.decoding import Downscale, short_sides
from ..data.groups import AUTO, NONE, check_groups, label_images
from ..data.labels import list_labelled
from ..data.references import ImageRef, list_images
from ..detectors import BaseDetector, Detector, JoinedDetector
from ..exceptions import UsageError, did_you_mean, some_of
from ..features.extraction import Extraction, extract
from ..features.store import FeatureTable
from ..runtime.progress import Progress
from ..scores.near_copies import find_near_copies
from ..scores.nearest import views
from .baselines import Baselines
from .metrics import evaluate

#: matched: every set is first brought to the smaller resolution of the pair; as-published: straight to the model.
PROTOCOLS = ("matched", "as-published")
# Images whose sizes are read between two reports of progress.
_SIZES_AT_ONCE = 100


@dataclass(frozen=True)
class ImageSet:
    """A named set of images.

    Parameters
    ----------
    name : str
    refs : sequence of ImageRef
        The images, unread.
    sides : ndarray of shape (N,)
        Short sides of the images in pixels, NaN where unreadable.
    """

    name: str
    refs: Sequence[ImageRef]
    sides: np.ndarray

    @property
    def resolution(self) -> int:
        """The median short side in pixels."""
        return int(np.nanmedian(self.sides))

    def shrunk_to(self, size: int | None) -> int | None:
        """``size`` if any image of the set is larger, else None: nothing needs to be done."""
        if size is None or np.nanmax(self.sides) <= size:
            return None
        return size


@dataclass(frozen=True)
class ScoredSet:
    """Scores of the readable images of a set.

    Parameters
    ----------
    scores : dict of str to ndarray of shape (N,)
        By name of the head.
    contributions : dict of str to ndarray of shape (N,)
        What the (global) score is made of, by name of the part; empty if it is no sum, or if nobody asked.
    groups : ndarray of shape (N,) of int, optional
        The group of each image.
    refs : list of ImageRef
        The images.
    """

    scores: dict[str, np.ndarray]
    contributions: dict[str, np.ndarray]
    groups: np.ndarray | None
    refs: list[ImageRef]


@dataclass(frozen=True)
class ScoredPair:
    """What the metrics of an OOD set under one protocol are made of.

    Parameters
    ----------
    ood : str
        Name of the OOD set.
    protocol : str
    id_scores, ood_scores : dict of str to ndarray
        Scores of the readable in-domain images (n_id,) and OOD images (n_ood,) by name of the head, higher = more OOD.
    id_flags, ood_flags : ndarrays of shape (n_id,) and (n_ood,) of bool
        Which of them the detector flags at its false-alarm rate.
    id_refs, ood_refs : lists of ImageRef
        The images.
    id_contributions, ood_contributions : dict of str to ndarray
        What their scores are made of, by name of the part (n_id,) and (n_ood,): the parts of an image add up to its
        score, or to its global score, if the detector has a local one as well. Empty where the score is no sum.
    labels : dict of str to str
        What each part looks at, in plain words.
    """

    ood: str
    protocol: str
    id_scores: dict[str, np.ndarray]
    ood_scores: dict[str, np.ndarray]
    id_flags: np.ndarray
    ood_flags: np.ndarray
    id_refs: list[ImageRef]
    ood_refs: list[ImageRef]
    id_contributions: dict[str, np.ndarray]
    ood_contributions: dict[str, np.ndarray]
    labels: dict[str, str]


def evaluate_detector(
    detector: BaseDetector[Any],
    in_domain: object,
    ood: Mapping[str, object],
    protocols: Sequence[str] = PROTOCOLS,
    progress: Progress | None = None,
    unreadable: dict[str, str] | None = None,
    baselines: Baselines | None = None,
    groups: str | None = None,
    scored: list[ScoredPair] | None = None,
    sets: list[tuple[ScoredSet, ScoredSet]] | None = None,
) -> dict[str, Any]:
    """Score an in-domain test set against OOD sets.

    Features are extracted once for each set and resolution, and kept in the detector's cache.

    Parameters
    ----------
    detector : BaseDetector
        Fitted.
    in_domain : images
        Test images, not used for training, as for :func:`featdiff.data.references.list_images`.
    ood : mapping of images
        OOD sets by name.
    protocols : sequence of str, default :data:`PROTOCOLS`
        ``"matched"`` first brings both sets of a pair to the smaller of their two median resolutions;
        ``"as-published"`` resizes every image straight to the size of the model.
    progress : callable (stage, done, total), optional
    unreadable : dict, optional
        Filled with {path: reason} of images that were left out.
    baselines : Baselines, optional
        From :func:`featdiff.evaluation.baselines.fit_baselines`: their scores are measured beside the detector's.
    groups : str, optional
        Which images of a set belong together; see :func:`featdiff.data.groups.label_images`. Intervals then come from
        resamples of whole groups. ``auto`` looks for near-copies. Default: each image counts alone.
    scored : list, optional
        Filled with a :class:`ScoredPair` for each pair of the result.
    sets : list, optional
        Filled with the in-domain set and the OOD set of each pair of the result: their scores alone, which cost nothing
        more and need no false-alarm rate.

    Returns
    -------
    dict
        ``{"id": .., "model": .., "pairs": [{"ood", "protocol", "n_id", "n_ood", "heads": {name: metrics}}]}``, the
        contract of ``featdiff eval --json``. The head ``featdiff`` is the detector's own ``ood_score``.

    Raises
    ------
    UsageError
        An unknown protocol, or a set without a readable image.
    """
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise UsageError(f"unknown protocol {protocol!r}{did_you_mean(protocol, list(PROTOCOLS))}")
    check_groups(groups)
    detector.check_fitted()
    unreadable = {} if unreadable is None else unreadable

    def score_set(images: ImageSet, size: int | None) -> ScoredSet:
        return _score_set(detector, baselines, images, size, groups, scored is not None, unreadable, progress)

    id_set = _image_set("id", in_domain, progress)
    id_scores: dict[int | None, ScoredSet] = {}  # by resolution: many pairs share one
    pairs = []
    for name, source in ood.items():
        ood_set = _image_set(name, source, progress)
        for protocol in protocols:
            size = min(id_set.resolution, ood_set.resolution) if protocol == "matched" else None

            id_size = id_set.shrunk_to(size)
            if id_size not in id_scores:
                id_scores[id_size] = score_set(id_set, id_size)

            ood_size = ood_set.shrunk_to(size)
            ood_scores = score_set(ood_set, ood_size)
            pairs.append(_pair(name, protocol, id_scores[id_size], ood_scores, progress))
            if scored is not None:
                scored.append(_scored_pair(detector, name, protocol, id_scores[id_size], ood_scores))
            if sets is not None:
                sets.append((id_scores[id_size], ood_scores))

    return {"id": label_of(in_domain, len(id_set.refs)), "model": detector.name, "pairs": pairs}


def measure_accuracy(
    detector: Detector, images: object, classes: Sequence[str], progress: Progress | None = None
) -> float:
    """Share of labelled images whose largest logit is that of their class, for a detector on a classifier's logits.

    Parameters
    ----------
    detector : Detector
        Its features include logits.
    images : images in folders of classes
        As for :func:`featdiff.data.labels.list_labelled`.
    classes : sequence of str
        Names in the order of the logits.
    progress : callable (stage, done, total), optional

    Returns
    -------
    float
        In 0..1, among the images that can be read.

    Raises
    ------
    UsageError
        The detector sees no logits, the images are in no folders of classes, or a folder is no class of the classifier.
    """
    logits = detector.extractor_.layout.logits
    if logits is None:
        raise UsageError("accuracy needs logits, and this detector does not see any")

    refs, labels, names = list_labelled(images)
    for name in names:
        if name not in classes:
            raise UsageError(f"{name} is no class of the classifier; it knows {some_of(classes)}")
    class_of = {ref.path: classes.index(names[label]) for ref, label in zip(refs, labels, strict=True)}

    paths, table = detector.features(refs, progress)
    expected = np.array([class_of[path] for path in paths])
    predicted = np.concatenate([features[:, logits.columns].argmax(1).numpy() for features in table.chunks()])
    return float(np.mean(predicted == expected))


def label_of(source: object, count: int) -> str:
    """Name of a set of so many images in a result: its paths, or its number of images."""
    items: list[Any] = list(source) if isinstance(source, list | tuple) else [source]
    if all(isinstance(item, str | os.PathLike) for item in items):
        return ", ".join(os.fspath(item) for item in items)
    return f"{count} images in memory"


def _image_set(name: str, source: object, progress: Progress | None) -> ImageSet:
    refs = list_images(source)
    parts = [np.empty(0)]
    for start in range(0, len(refs), _SIZES_AT_ONCE):
        parts.append(short_sides(refs[start : start + _SIZES_AT_ONCE]))
        if progress:
            progress("sizes", min(start + _SIZES_AT_ONCE, len(refs)), len(refs))

    sides = np.concatenate(parts)
    if np.isnan(sides).all():
        raise UsageError(f"none of the images of the set {name!r} could be read")
    return ImageSet(name, refs, sides)


def _score_set(
    detector: BaseDetector[Any],
    baselines: Baselines | None,
    images: ImageSet,
    size: int | None,
    groups: str | None,
    explained: bool,
    unreadable: dict[str, str],
    progress: Progress | None,
) -> ScoredSet:
    """Scores of all heads and baselines for the readable images of a set, first shrunk to ``size`` if given.

    If ``explained``, also what the detector's own score is made of.
    """
    extractor = detector.extractor_
    transform = Downscale(size, extractor.transform) if size else None
    store = detector.feature_store(f"matched {size}" if size else "")
    batches, total = detector.batches(images.refs, store, transform)
    extraction = extract(batches, extractor, store, total, progress)
    unreadable.update(extraction.unreadable)
    if not extraction.digests:
        reason = extraction.unreadable[0][1]
        raise UsageError(f"none of the images of the set {images.name!r} could be read: {reason}")

    parts: list[dict[str, np.ndarray]] = []
    contributions: list[dict[str, np.ndarray]] = []
    done = 0
    table = store.table(extraction.digests)
    for features in table.chunks(detector.rows_at_once):
        scores = detector.all_heads(features)
        if baselines is not None:
            scores |= baselines(features)
        parts.append(scores)
        contributions.append(_contributions(detector, features) if explained else {})

        done += len(features)
        if progress:
            progress("scoring", done, len(extraction.digests))
    refs = [images.refs[position] for position in extraction.positions]
    group_of_each = _group(detector, extraction, table, groups)
    return ScoredSet(_concatenated(parts), _concatenated(contributions), group_of_each, refs)


def _contributions(detector: BaseDetector[Any], features: Tensor) -> dict[str, np.ndarray]:
    """What the own score of each row is made of, by name; empty where it is no sum."""
    if not isinstance(detector, Detector | JoinedDetector):
        return {}
    parts = detector.contributions(features)
    return {name: amount.double().cpu().numpy() for name, (_, amount) in parts.items()}


def _concatenated(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays of the same names end to end."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _group(
    detector: BaseDetector[Any], extraction: Extraction, features: FeatureTable, groups: str | None
) -> np.ndarray | None:
    """The group of each readable image of a set; None if each counts alone."""
    if groups in (None, NONE):
        return None
    if groups == AUTO and isinstance(detector, Detector):
        return find_near_copies(features, views(detector.extractor_.layout)).groups
    labels = label_images(str(groups), extraction.paths)
    return np.unique([repr(label) for label in labels], return_inverse=True)[1]


def _scored_pair(
    detector: BaseDetector[Any], name: str, protocol: str, in_domain: ScoredSet, ood: ScoredSet
) -> ScoredPair:
    """Scores of a pair, and which images the detector flags."""
    _, id_flags = detector.calibration_.flags(in_domain.scores["featdiff"], detector.fpr)
    _, ood_flags = detector.calibration_.flags(ood.scores["featdiff"], detector.fpr)
    return ScoredPair(
        ood=name,
        protocol=protocol,
        id_scores=in_domain.scores,
        ood_scores=ood.scores,
        id_flags=id_flags,
        ood_flags=ood_flags,
        id_refs=in_domain.refs,
        ood_refs=ood.refs,
        id_contributions=in_domain.contributions,
        ood_contributions=ood.contributions,
        labels=detector.labels if isinstance(detector, Detector | JoinedDetector) else {},
    )


def _pair(name: str, protocol: str, in_domain: ScoredSet, ood: ScoredSet, progress: Progress | None) -> dict[str, Any]:
    """Metrics of every head for one OOD set under one protocol."""
    metrics: dict[str, dict[str, object]] = {}
    for head, id_scores in in_domain.scores.items():
        measured = evaluate(id_scores, ood.scores[head], id_groups=in_domain.groups, ood_groups=ood.groups)
        metrics[head] = measured.to_dict()
        if progress:  # each is a thousand resamples
            progress("intervals", len(metrics), len(in_domain.scores))
    return {
        "ood": name,
        "protocol": protocol,
        "n_id": len(in_domain.scores["featdiff"]),
        "n_ood": len(ood.scores["featdiff"]),
        "heads": metrics,
    }

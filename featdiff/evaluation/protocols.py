"""A fitted detector + an in-domain set + OOD sets -> metrics for every head, under named protocols."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.decoding import Downscale, short_sides
from ..data.labels import list_labelled
from ..data.references import ImageRef, list_images
from ..detectors import BaseDetector, Detector
from ..exceptions import UsageError, did_you_mean, some_of
from ..features.extraction import extract
from ..runtime.progress import Progress
from .baselines import Baselines
from .metrics import evaluate

#: matched: every set is first brought to the smaller resolution of the pair; as-published: straight to the model.
PROTOCOLS = ("matched", "as-published")


@dataclass(frozen=True)
class ImageSet:
    """A named set of images and the short sides (N,) of its pictures in pixels, NaN where unreadable."""

    name: str
    refs: Sequence[ImageRef]
    sides: np.ndarray

    @property
    def resolution(self) -> int:
        """The median short side in pixels."""
        return int(np.nanmedian(self.sides))

    def shrunk_to(self, size: int | None) -> int | None:
        """``size`` if any picture of the set is larger, else None: nothing need be done."""
        return size if size is not None and np.nanmax(self.sides) > size else None


def evaluate_detector(
    detector: BaseDetector[Any],
    in_domain: object,
    ood: Mapping[str, object],
    protocols: Sequence[str] = PROTOCOLS,
    progress: Progress | None = None,
    unreadable: dict[str, str] | None = None,
    baselines: Baselines | None = None,
) -> dict[str, Any]:
    """Score an in-domain test set against OOD sets.

    Features are extracted once for each set and resolution, and kept in the detector's cache.

    Parameters
    ----------
    in_domain, ood : sources as for :func:`featdiff.data.references.list_images`; ``ood`` by name
    unreadable : dict, optional
        Filled with {path: reason} of images that were left out.
    baselines : Baselines, optional
        From :func:`featdiff.evaluation.baselines.fit_baselines`: their scores are measured beside the detector's.

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
    detector.check_fitted()
    home = _image_set("id", in_domain)
    known: dict[int | None, dict[str, np.ndarray]] = {}  # in-domain scores by resolution, needed for every pair
    unreadable = {} if unreadable is None else unreadable
    pairs = []
    for name, source in ood.items():
        away = _image_set(name, source)
        for protocol in protocols:
            size = min(home.resolution, away.resolution) if protocol == "matched" else None
            here = home.shrunk_to(size)
            if here not in known:
                known[here] = _heads(detector, baselines, home, here, unreadable, progress)
            there = _heads(detector, baselines, away, away.shrunk_to(size), unreadable, progress)
            pairs.append(_pair(name, protocol, known[here], there))
    return {"id": _label(in_domain), "model": detector.name, "pairs": pairs}


def measure_accuracy(
    detector: Detector, images: object, classes: Sequence[str], progress: Progress | None = None
) -> float:
    """Share of labelled images whose largest logit is that of their class, for a detector on a classifier's logits.

    Parameters
    ----------
    images : as for :func:`featdiff.data.labels.list_labelled`
    classes : names in the order of the logits

    Raises
    ------
    UsageError
        The detector sees no logits, or the images are in no folders of classes, or in others.
    """
    logits = detector.extractor_.layout.logits
    if logits is None:
        raise UsageError("accuracy needs logits, and this detector does not see any")
    refs, labels, names = list_labelled(images)
    if others := [name for name in names if name not in classes]:
        raise UsageError(f"{others[0]} is no class of the classifier; it knows {some_of(classes)}")
    wanted = {ref.path: classes.index(names[label]) for ref, label in zip(refs, labels, strict=True)}
    paths, table = detector.features(refs, progress)
    predicted = np.concatenate([rows[:, logits.columns].argmax(1).numpy() for rows in table.chunks()])
    return float(np.mean([wanted[path] == label for path, label in zip(paths, predicted, strict=True)]))


def _label(source: object) -> str:
    """What to call a set: its paths, or how many images it is."""
    items: list[Any] = list(source) if isinstance(source, list | tuple) else [source]
    if all(isinstance(item, str | os.PathLike) for item in items):
        return ", ".join(os.fspath(item) for item in items)
    return f"{len(items)} images in memory"


def _image_set(name: str, source: object) -> ImageSet:
    refs = list_images(source)
    sides = short_sides(refs)
    if np.isnan(sides).all():
        raise UsageError(f"none of the images of the set {name!r} could be read")
    return ImageSet(name, refs, sides)


def _heads(
    detector: BaseDetector[Any],
    baselines: Baselines | None,
    images: ImageSet,
    size: int | None,
    unreadable: dict[str, str],
    progress: Progress | None,
) -> dict[str, np.ndarray]:
    """Scores of all heads and baselines for the readable images of a set, first shrunk to ``size`` if one is given."""
    extractor = detector.extractor_
    transform = Downscale(size, extractor.transform) if size else None
    store = detector.feature_store(f"matched {size}" if size else "")
    batches, total = detector.batches(images.refs, store, transform)
    found = extract(batches, extractor, store, total, progress)
    unreadable.update(found.unreadable)
    if not found.digests:
        raise UsageError(f"none of the images of the set {images.name!r} could be read: {found.unreadable[0][1]}")
    parts, done = [], 0
    for rows in store.table(found.digests).chunks(detector.rows_at_once):
        parts.append(detector.all_heads(rows) | (baselines(rows) if baselines else {}))
        done += len(rows)
        if progress:
            progress("scoring", done, len(found.digests))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _pair(name: str, protocol: str, home: dict[str, np.ndarray], away: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        "ood": name,
        "protocol": protocol,
        "n_id": len(home["featdiff"]),
        "n_ood": len(away["featdiff"]),
        "heads": {head: evaluate(home[head], away[head]).to_dict() for head in home},
    }

"""Makes outliers for a fitted detector.

In: a detector and in-domain images, in class folders or not. Out: outlier features with class labels, and how far they
lie and how often the detector flags them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.labels import list_labelled
from ..detectors import BaseDetector, Detector
from ..exceptions import FeatdiffError, UnlabelledError, UsageError, did_you_mean
from ..features.store import FeatureTable
from ..runtime.progress import Progress
from ..scores.neighbors import check_backend, make_index
from .boundary import (
    CANDIDATES,
    BoundaryNoise,
    boundary_points,
    check_classes,
    check_neighbours,
    check_noise,
    default_k,
    draw_outliers,
)
from .denoised import STRENGTH, DenoisedDirections, check_strength
from .outlier_file import Outliers
from .space import Space

METHODS = ("diffusion", "boundary")
#: Name of the class of images without class folders.
ONE_CLASS = "in-domain"

# Larger sets are reduced to a random choice of this size: images of a class that are searched for its boundary ...
_MAX_CLASS_SIZE = 5_000
# ... images among which the nearest one is looked up ...
_MAX_IN_DOMAIN = 10_000
# ... and images or outliers of a kind that are measured and drawn.
_MAX_MEASURED = 2_000


@dataclass(frozen=True)
class Synthesis:
    """Outliers, the in-domain features beside them, and measurements of both.

    Attributes
    ----------
    outliers : Outliers
    in_domain : Tensor of shape (N, D)
        In-domain features; a random choice where there are many.
    boundary : Tensor of shape (B, D)
        In-domain features at the boundary of their class.
    distances : dict of str to float
        For ``in-domain``, ``boundary`` and ``outliers``: median distance to the nearest in-domain image, in joined
        space (:class:`featdiff.outliers.space.Space`). The image itself, or the one that an outlier started from,
        does not count.
    flagged : dict of str to float
        For the same three: share that the detector flags at its ``fpr``, in [0, 1]. Outliers beside images that the
        detector was trained on are flagged less often, since its banks hold what they started from.
    """

    outliers: Outliers
    in_domain: Tensor
    boundary: Tensor
    distances: dict[str, float]
    flagged: dict[str, float]

    def projection(self, most: int = _MAX_MEASURED) -> tuple[dict[str, np.ndarray], float]:
        """Project all features to the first two principal components of the in-domain ones.

        Parameters
        ----------
        most : int, default 2000
            Points of each kind, at most.

        Returns
        -------
        points : dict of str to ndarray of shape (n, 2)
            For ``in-domain``, ``boundary`` and ``outliers``.
        share : float
            Share of the in-domain variance in these two components, in [0, 1].
        """
        from sklearn.decomposition import PCA

        space = Space(self.outliers.layout, self.in_domain)
        features = {
            "in-domain": self.in_domain,
            "boundary": self.boundary,
            "outliers": self.outliers.vectors,
        }
        joined = {name: space.join(_subset(values, most)).numpy() for name, values in features.items()}

        pca = PCA(2, random_state=0).fit(joined["in-domain"])
        points = {name: pca.transform(vectors) for name, vectors in joined.items()}
        return points, float(pca.explained_variance_ratio_.sum())


def feature_detector(detector: object) -> Detector:
    """Return the detector, judged by pooled features alone, if outliers can be made in its features.

    Raises
    ------
    UsageError
        A detector of another mode.
    NotFittedError
        It is not fitted.
    """
    if not isinstance(detector, Detector):
        mode = getattr(detector, "mode", "vectors")
        raise UsageError(
            f"outliers are made from features of images, and this model is of mode {mode}: train one of mode feature",
            argument="detector",
        )
    detector.check_fitted()
    return detector.without_local()


def with_classes(images: object, labelled: bool | None) -> tuple[object, dict[str, int], list[str]]:
    """List images with their classes.

    Parameters
    ----------
    images, labelled
        As for :func:`synthesise`.

    Returns
    -------
    images : object
    labels : dict of str to int
        Class of each image, by its path; empty if all images are one class.
    classes : list of str
    """
    if labelled is not False:
        try:
            refs, labels, classes = list_labelled(images)
        except UnlabelledError:
            if labelled:
                raise
        else:
            return refs, {ref.path: int(label) for ref, label in zip(refs, labels, strict=True)}, classes
    return images, {}, [ONE_CLASS]


def synthesise(
    detector: BaseDetector[Any],
    images: object,
    n: int,
    method: str = "diffusion",
    *,
    labelled: bool | None = None,
    k: int | None = None,
    select: int | None = None,
    strength: float = STRENGTH,
    sigma: float | None = None,
    candidates: int = CANDIDATES,
    seed: int = 0,
    backend: str = "auto",
    progress: Progress | None = None,
) -> Synthesis:
    """Make outliers just beyond in-domain images, class by class, in the feature space of a fitted detector.

    Features that the detector's cache holds are not computed again. Unreadable images are listed in the detector's
    ``unreadable_``. Images of the same content count once in a class.

    Parameters
    ----------
    detector : Detector
        Of mode feature.
    images : object
        As for :meth:`featdiff.Detector.fit`.
    n : int
        Outliers in all; every class gets the same number.
    method : {"diffusion", "boundary"}, default "diffusion"
        Boundary images pushed away from their denoised version (:mod:`featdiff.outliers.denoised`), or noise around
        them (:mod:`featdiff.outliers.boundary`).
    labelled : bool, optional
        Whether the first folder below each source is a class. Default: yes, if every image lies in one. Otherwise all
        images are one class.
    k : int, optional
        Boundary images are those with the farthest k-th neighbour in their class. Default: 60 % of the class, at most
        300. Of classes of more than 5,000 images, a random choice is used.
    select : int, optional
        Boundary images of each class. Default: a tenth of the class.
    strength : float, default 0.5
        For ``diffusion``: how far to push.
    sigma : float, optional
        For ``boundary``: see :class:`featdiff.outliers.boundary.BoundaryNoise`.
    candidates : int, default 32
        For ``boundary``: see there.
    seed : int, default 0
        Decides everything random.
    backend : str, default "auto"
        See :func:`featdiff.scores.neighbors.make_index`.
    progress : callable, optional
        Called with a stage, and how much of it is done and in total.

    Returns
    -------
    Synthesis

    Raises
    ------
    UsageError
        A detector of another mode, an unknown method, a number outside its range, or a class with too few images.
    """
    _check_count(n)
    if method not in METHODS:
        hint = did_you_mean(method, list(METHODS))
        raise UsageError(f"unknown method {method!r}{hint}; known: {', '.join(METHODS)}", argument="method")
    check_neighbours(k, select)
    check_strength(strength)
    check_noise(sigma, candidates)
    check_backend(backend)
    fitted = feature_detector(detector)

    # in-domain features, by class
    images, label_of, classes = with_classes(images, labelled)
    if n < len(classes):
        raise UsageError(
            f"{n} outliers are fewer than the {len(classes)} classes: ask for {len(classes)} or more", argument="n"
        )
    paths, table = fitted.features(images, progress)
    members = _class_members(table, np.array([label_of.get(path, 0) for path in paths]), len(classes), seed)
    check_classes(np.array([len(indices) for indices in members]), k, classes)
    in_domain = _random_choice(np.sort(np.concatenate(members)), _MAX_IN_DOMAIN, seed)
    space = Space(fitted.extractor_.layout, table[in_domain])

    # outliers of each class
    make: Callable[..., Any] = partial(BoundaryNoise, sigma=sigma, candidates=candidates)
    if method == "diffusion":
        make = partial(DenoisedDirections, fitted.heads_, strength=strength, backend=backend)
    counts = [len(part) for part in np.array_split(np.empty(n), len(classes))]
    vectors = []
    boundary = []
    starts = []
    for label, (indices, count) in enumerate(zip(members, counts, strict=True)):
        features = table[indices].to(fitted.device)
        neighbour = k or default_k(len(indices))
        points = boundary_points(space.join(features), np.zeros(len(indices)), neighbour, select)
        draw_round = make(
            space=space,
            features=features,
            points=torch.from_numpy(points).to(features.device),
            k=neighbour,
        )
        outliers, start = draw_outliers(draw_round, count, np.random.SeedSequence([seed, label]))

        vectors.append(_with_logits(fitted, outliers).cpu())
        boundary.append(indices[points])
        starts.append(indices[points][start.cpu().numpy()])
        if progress:
            progress("outliers", sum(counts[: label + 1]), n)

    labels = np.repeat(np.arange(len(classes)), counts)
    result = _as_outliers(fitted, torch.cat(vectors), labels, classes, method)
    sources = {
        "in-domain": in_domain,
        "boundary": np.concatenate(boundary),
        "outliers": np.concatenate(starts),
    }
    return _measure(fitted, space, table, sources, result, backend)


def self_check(detector: BaseDetector[Any], n: int = 500, seed: int = 0) -> float:
    """Share of nearby synthetic outliers that a detector flags at its own ``fpr``.

    A share of about ``fpr`` means that the detector does not work. The outliers are made by the method ``diffusion``
    from held-out in-domain images, which are in no bank and trained nothing; a detector that was calibrated by folds
    has none. They use the detector's own denoisers. So this check finds what is broken, such as features without
    information; it does not predict how many real OOD images will be flagged.

    Parameters
    ----------
    detector : Detector
        Fitted in this process, so that it knows which images were held out.
    n : int, default 500
        Outliers, each from another image if there are so many.
    seed : int, default 0

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    UsageError
        A detector of another mode, one that was loaded, one calibrated by folds, or fewer than 3 held-out images.
    """
    _check_count(n)
    fitted = feature_detector(detector)
    digests = getattr(fitted, "calibration_digests_", None)
    if digests is None:
        raise UsageError("a loaded detector does not know its held-out images any more: check it where it was fitted")
    if not digests:
        raise UsageError("a self-check needs images that trained nothing, and with five folds all of them train")
    if len(digests) < 3:
        raise UsageError(f"a self-check needs at least 3 held-out images, and there are {len(digests)}")

    held_out = _random_choice(np.arange(len(digests)), _MAX_MEASURED, seed)
    features = fitted.training_store().table(digests)[held_out].to(fitted.device)
    points = torch.from_numpy(_random_choice(np.arange(len(features)), n, seed)).to(features.device)
    space = Space(fitted.extractor_.layout, features)

    draw_round = DenoisedDirections(fitted.heads_, space, features, points, default_k(len(features)), keep=1)
    outliers, _ = draw_outliers(draw_round, n, np.random.SeedSequence(seed))
    return _flagged(fitted, _check_finite(_with_logits(fitted, outliers)))


def _check_count(n: int) -> None:
    if n < 1:
        raise UsageError(f"the number of outliers must be above 0, not {n}", argument="n")


def _class_members(table: FeatureTable, labels: np.ndarray, classes: int, seed: int) -> list[np.ndarray]:
    """Indices of the images of each class, ascending; of copies only the first."""
    members = []
    for label in range(classes):
        indices = np.flatnonzero(labels == label)
        first = np.unique(table.where[indices], axis=0, return_index=True)[1]  # copies have one place in the table
        members.append(_random_choice(indices[np.sort(first)], _MAX_CLASS_SIZE, seed))
    return members


def _random_choice(indices: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most ``most`` of the indices, in their order."""
    if len(indices) <= most:
        return indices
    return indices[np.sort(np.random.default_rng(seed).permutation(len(indices))[:most])]


def _subset(features: Tensor, most: int) -> Tensor:
    return features[_random_choice(np.arange(len(features)), most, 0)]


def _as_outliers(detector: Detector, vectors: Tensor, labels: np.ndarray, classes: list[str], method: str) -> Outliers:
    extractor = detector.extractor_
    return Outliers(
        vectors=_check_finite(vectors),
        labels=torch.from_numpy(labels),
        classes=classes,
        layout=extractor.layout,
        method=method,
        fingerprint=extractor.backbone.fingerprint,
        layers=list(extractor.layers),
    )


@torch.inference_mode()
def _with_logits(detector: Detector, features: Tensor) -> Tensor:
    """Append the logits that the classifier computes from the pre-logits, if the detector's features have logits."""
    layout = detector.extractor_.layout
    if layout.logits is None:
        return features
    if layout.pre_logits is None:
        raise UsageError(
            "this guard looks at logits: for outliers, pre_logits must be among its layers, too", argument="layers"
        )
    last = detector.extractor_.last_linear()
    weight = last.weight.flatten(1).to(features)
    bias = None if last.bias is None else last.bias.to(features)
    logits = F.linear(features[:, layout.pre_logits.columns], weight, bias)
    return torch.cat([features, logits], dim=1)


def _check_finite(vectors: Tensor) -> Tensor:
    if not torch.isfinite(vectors).all():
        raise FeatdiffError("some outliers are not finite: use a smaller strength or sigma")
    return vectors


def _measure(
    detector: Detector,
    space: Space,
    table: FeatureTable,
    sources: Mapping[str, np.ndarray],
    outliers: Outliers,
    backend: str,
) -> Synthesis:
    """Distances and flagged shares of in-domain images, boundary images and outliers.

    ``sources`` has, for each of the three, the images in ``table`` that they are or started from; these do not count
    as nearest neighbours.
    """
    reference = sources["in-domain"]
    in_domain = table[reference]
    boundary = table[sources["boundary"]]
    index = make_index(space.join(in_domain).to(detector.device), backend)

    distances = {}
    shares = {}
    for name, features in (("in-domain", in_domain), ("boundary", boundary), ("outliers", outliers.vectors)):
        chosen = _random_choice(np.arange(len(features)), _MAX_MEASURED, 0)
        nearest_two, neighbors = index.search(space.join(features[chosen]), 2)
        first, second = nearest_two.cpu().numpy().T
        first_is_source = reference[neighbors[:, 0].cpu().numpy()] == sources[name][chosen]
        distances[name] = float(np.median(np.where(first_is_source, second, first)))
        shares[name] = _flagged(detector, features[chosen])
    return Synthesis(outliers, in_domain, boundary, distances, shares)


def _flagged(detector: Detector, rows: Tensor) -> float:
    scores = np.concatenate([detector.score_features(part) for part in rows.split(detector.rows_at_once)])
    _, is_ood = detector.calibration_.flags(scores, detector.fpr)
    return float(is_ood.mean())

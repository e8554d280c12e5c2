"""A detector and in-domain images -> outliers, and what is to be said of them."""

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
from ..verdicts.calibration import flagged, p_values
from .boundary import CANDIDATES, Beyond, boundary_points, check_classes, check_neighbours, check_noise, default_k, draw
from .denoised import STRENGTH, Explained, check_strength
from .outlier_file import Outliers
from .space import Space

METHODS = ("diffusion", "boundary")
#: What a class is called where there are none.
ONE_CLASS = "in-domain"

# Rows of a class in which boundary and neighbours are looked for, rows among which the nearest one is, and rows of a
# kind that are measured and drawn, at most: a random choice where there are more.
_MOST_OF_A_CLASS, _MOST_IN_DOMAIN, _MOST_MEASURED = 5_000, 10_000, 2_000


@dataclass(frozen=True)
class Synthesis:
    """Outliers and the rows beside which they are seen.

    outliers : Outliers
    in_domain, boundary : (N, D) and (B, D) rows, random choices where there are many
    distances : {"in-domain", "boundary", "outliers"}: median distance to the nearest in-domain row other than the row
        itself, or the one that an outlier started from, in joined space (:class:`featdiff.outliers.space.Space`)
    flagged : {"in-domain", "boundary", "outliers"}: share that the detector flags at its ``fpr``. Beside images that it
        was trained on, outliers are found less often: a detector's banks hold what they started from.
    """

    outliers: Outliers
    in_domain: Tensor
    boundary: Tensor
    distances: dict[str, float]
    flagged: dict[str, float]

    def projection(self, most: int = _MOST_MEASURED) -> tuple[dict[str, np.ndarray], float]:
        """Two principal components of the in-domain rows (joined), and what they explain.

        Returns
        -------
        ``{"in-domain", "boundary", "outliers"}``: (N, 2) points, at most ``most`` of each; and the share of the
        in-domain variance that the plane shows, in [0, 1].
        """
        from sklearn.decomposition import PCA

        space = Space(self.outliers.layout, self.in_domain)
        sets = {"in-domain": self.in_domain, "boundary": self.boundary, "outliers": self.outliers.vectors}
        joined = {name: space.join(_some(rows, most)).numpy() for name, rows in sets.items()}
        plane = PCA(2, random_state=0).fit(joined["in-domain"])
        return {n: plane.transform(v) for n, v in joined.items()}, float(plane.explained_variance_ratio_.sum())


def feature_detector(detector: object) -> Detector:
    """The detector, if outliers can be made in its features (``UsageError``, ``NotFittedError``)."""
    if not isinstance(detector, Detector):
        mode = getattr(detector, "mode", "vectors")
        raise UsageError(
            f"outliers are made from features of images, and this model is of mode {mode}: train one on "
            "images with --mode feature"
        )
    detector.check_fitted()
    return detector


def with_classes(images: object, labelled: bool | None) -> tuple[object, dict[str, int], list[str]]:
    """Images, the class of each by its path (none: class 0), and the names of the classes; see :func:`synthesise`."""
    if labelled is not False:
        try:
            refs, labels, classes = list_labelled(images)
            return refs, {ref.path: int(label) for ref, label in zip(refs, labels, strict=True)}, classes
        except UnlabelledError:
            if labelled:
                raise
    return images, {}, [ONE_CLASS]


def synthesise(
    detector: BaseDetector,
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

    Features are read from the detector's cache where they are there. What cannot be read is listed in the detector's
    ``unreadable_``; images of the same content count once in a class.

    Parameters
    ----------
    detector : Detector
        Of mode feature.
    images : as for :func:`featdiff.data.references.list_images`, or a DataLoader of preprocessed batches
    n : int
        Outliers in all; classes get equal shares.
    method : "diffusion" or "boundary"
        Boundary rows pushed away from what the denoisers make of them (:mod:`featdiff.outliers.denoised`), or noise
        around them (:mod:`featdiff.outliers.boundary`).
    labelled : bool, optional
        Whether the first folder below each source is a class; default: if every image lies in one. Else all images are
        one class.
    k, select : int, optional
        Boundary rows are the ``select`` ones of a class (default: a tenth) with the farthest k-th neighbour (default:
        60 % of the class, at most the 300th). In classes of more than 5,000 images a random choice is looked at.
    strength : float
        For ``diffusion``: how far they are pushed.
    sigma, candidates
        For ``boundary``: see :class:`featdiff.outliers.boundary.Beyond`.
    seed : int
        Decides all that is random.
    backend : str
        See :func:`featdiff.scores.neighbors.make_index`.

    Raises
    ------
    UsageError
        A detector of another mode, an unknown method, a number outside its range, or a class too small.
    """
    if n < 1:
        raise UsageError(f"the number of outliers must be above 0, not {n}")
    if method not in METHODS:
        raise UsageError(f"unknown method {method!r}{did_you_mean(method, list(METHODS))}; known: {', '.join(METHODS)}")
    check_neighbours(k, select)
    check_strength(strength)
    check_noise(sigma, candidates)
    check_backend(backend)
    fitted = feature_detector(detector)
    images, label_of, classes = with_classes(images, labelled)
    if n < len(classes):
        raise UsageError(f"{n} outliers are fewer than the {len(classes)} classes: ask for {len(classes)} or more")
    paths, table = fitted.features(images, progress)
    members = _members(table, np.array([label_of.get(path, 0) for path in paths]), len(classes), seed)
    check_classes(np.array([len(rows) for rows in members]), k, classes)
    known = _choice(np.sort(np.concatenate(members)), _MOST_IN_DOMAIN, seed)
    space = Space(fitted.extractor_.layout, table[known])
    make: Callable[..., Any] = partial(Beyond, sigma=sigma, candidates=candidates)
    if method == "diffusion":
        make = partial(Explained, fitted.heads_, strength=strength, backend=backend)
    made, starts, edge = [], [], []
    shares = [len(part) for part in np.array_split(np.empty(n), len(classes))]
    for label, (rows, share) in enumerate(zip(members, shares, strict=True)):
        inside = table[rows].to(fitted.device)
        neighbour = k or default_k(len(rows))
        points = boundary_points(space.join(inside), np.zeros(len(rows)), neighbour, select)
        rounds = make(space=space, rows=inside, points=torch.from_numpy(points).to(inside.device), k=neighbour)
        found, start = draw(rounds, share, np.random.SeedSequence([seed, label]))
        made.append(_complete(fitted, found).cpu())
        edge.append(rows[points])
        starts.append(rows[points][start.cpu().numpy()])
        if progress:
            progress("outliers", sum(shares[: label + 1]), n)
    outliers = _outliers(fitted, torch.cat(made), np.repeat(np.arange(len(classes)), shares), classes, method)
    own = {"in-domain": known, "boundary": np.concatenate(edge), "outliers": np.concatenate(starts)}
    return _measured(fitted, space, table, known, own, outliers, backend)


def self_check(detector: BaseDetector, n: int = 500, seed: int = 0) -> float:
    """Share of near synthetic outliers that a detector flags at its own ``fpr``; about ``fpr`` would be hopeless.

    Outliers of the method ``diffusion`` start from held-out in-domain images, which are in no bank and trained nothing.
    They are made with the detector's own denoisers, so this finds what is broken, such as features that tell nothing;
    it does not foretell how many real OOD images will be found.

    Parameters
    ----------
    detector : Detector
        One that was fitted in this process, so that it knows which images were held out.
    n : int
        Outliers, each from another image where there are so many.
    seed : int

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    UsageError
        A detector of another mode, one that was loaded, or fewer than 3 held-out images.
    """
    if n < 1:
        raise UsageError(f"the number of outliers must be above 0, not {n}")
    fitted = feature_detector(detector)
    digests = getattr(fitted, "calibration_digests_", None)
    if digests is None:
        raise UsageError("a loaded detector does not know its held-out images any more: check it where it was fitted")
    if len(digests) < 3:
        raise UsageError(f"a self-check needs at least 3 held-out images, and there are {len(digests)}")
    chosen = _choice(np.arange(len(digests)), _MOST_MEASURED, seed)
    rows = fitted.feature_store().table(digests)[chosen].to(fitted.device)
    points = torch.from_numpy(_choice(np.arange(len(rows)), n, seed)).to(rows.device)
    space = Space(fitted.extractor_.layout, rows)
    rounds = Explained(fitted.heads_, space, rows, points, default_k(len(rows)), keep=1)
    found, _ = draw(rounds, n, np.random.SeedSequence(seed))
    return _flagged(fitted, _finite(_complete(fitted, found)))


def _members(table: FeatureTable, labels: np.ndarray, classes: int, seed: int) -> list[np.ndarray]:
    """Row numbers of each class, ascending; of copies the first."""
    found = []
    for label in range(classes):
        rows = np.flatnonzero(labels == label)
        first = np.unique(table.where[rows], axis=0, return_index=True)[1]  # copies lie in one place
        found.append(_choice(rows[np.sort(first)], _MOST_OF_A_CLASS, seed))
    return found


def _choice(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most so many of the rows, in their order."""
    if len(rows) <= most:
        return rows
    return rows[np.sort(np.random.default_rng(seed).permutation(len(rows))[:most])]


def _some(rows: Tensor, most: int) -> Tensor:
    return rows[_choice(np.arange(len(rows)), most, 0)]


def _outliers(detector: Detector, vectors: Tensor, labels: np.ndarray, classes: list[str], method: str) -> Outliers:
    extractor = detector.extractor_
    return Outliers(
        vectors=_finite(vectors),
        labels=torch.from_numpy(labels),
        classes=classes,
        layout=extractor.layout,
        method=method,
        fingerprint=extractor.backbone.fingerprint,
        layers=list(extractor.layers),
    )


@torch.inference_mode()
def _complete(detector: Detector, rows: Tensor) -> Tensor:
    """Rows with the logits that the classifier gives for their pre-logits, where a guard looks at logits."""
    layout = detector.extractor_.layout
    if layout.logits is None:
        return rows
    if layout.pre_logits is None:
        raise UsageError("this guard looks at logits: for outliers, pre_logits must be among its layers, too")
    last = detector.extractor_.last_linear()
    weight, bias = last.weight.flatten(1).to(rows), None if last.bias is None else last.bias.to(rows)
    return torch.cat([rows, F.linear(rows[:, layout.pre_logits.columns], weight, bias)], dim=1)


def _finite(vectors: Tensor) -> Tensor:
    if not torch.isfinite(vectors).all():
        raise FeatdiffError("some outliers are not finite: push less far, with a smaller strength or sigma")
    return vectors


def _measured(
    detector: Detector,
    space: Space,
    table: FeatureTable,
    known: np.ndarray,
    own: Mapping[str, np.ndarray],
    outliers: Outliers,
    backend: str,
) -> Synthesis:
    """Distances to the rows ``known`` other than their ``own``, and flagged shares, of some rows of each kind."""
    in_domain, edge = table[known], table[own["boundary"]]
    index = make_index(space.join(in_domain).to(detector.device), backend)
    distances, shares = {}, {}
    for name, rows in (("in-domain", in_domain), ("boundary", edge), ("outliers", outliers.vectors)):
        some = _choice(np.arange(len(rows)), _MOST_MEASURED, 0)
        found, near = index.search(space.join(rows[some]), 2)
        is_own = known[near[:, 0].cpu().numpy()] == own[name][some]
        distances[name] = float(np.median(np.where(is_own, *found.T.flip(0).cpu().numpy())))
        shares[name] = _flagged(detector, rows[some])
    return Synthesis(outliers, in_domain, edge, distances, shares)


def _flagged(detector: Detector, rows: Tensor) -> float:
    scores = np.concatenate([detector.score_features(part) for part in rows.split(detector.rows_at_once)])
    return float(flagged(p_values(scores, detector.calibration_), detector.fpr).mean())

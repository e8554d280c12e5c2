"""One set of images -> which of them are odd among the others, without a model and without labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..data.groups import AUTO, Groups, check_groups, is_word, label_images, numbered
from ..exceptions import UsageError
from ..features.extraction import Extraction
from ..runtime.progress import Progress, shown
from ..scores.near_copies import find_near_copies, nearest_outside, oddness
from ..scores.nearest import views
from ..verdicts.calibration import ROUNDING, Calibration, check_fpr, check_supported
from ..verdicts.judge import judge
from ..verdicts.results import Scores
from .feature import Detector

#: Fewer images say nothing about each other.
FEWEST = 20
#: From this score on an image stands apart, whatever share was asked for; at most about one in 100 of ordinary sets.
STANDS_APART = 3.0


def audit(
    images: object,
    *,
    groups: Groups = AUTO,
    fpr: float = 0.05,
    progress: Progress | bool | None = None,
    **arguments: Any,
) -> Scores:
    """Find the odd images of a set by comparing its images with each other.

    A detector that is trained on a folder and scores the same folder meets each image again, and finds nothing. Here
    each image is compared with the others alone, near-copies of itself left out: odd images that resemble each other
    would hide each other otherwise. Up to a tenth of a set may be odd in the same way.

    Parameters
    ----------
    images : object
        As for :meth:`featdiff.Detector.fit`; at least 20 different ones.
    groups : str, path, sequence or mapping, default "auto"
        Which images belong together: ``auto`` (near-copies), ``none``, or as for :meth:`featdiff.Detector.fit`.
    fpr : float, default 0.05
        Which images ``is_ood`` marks: the p-value is a rank, so about this share of the images is always marked.
    progress : bool or callable (stage, done, total), optional
        True shows bars.
    **arguments
        What to look with: ``backbone``, ``weights``, ``layers``, ``view``, ``device``, ``cache`` and others of
        :class:`featdiff.Detector`.

    Returns
    -------
    Scores
        In the order of the images. ``ood_score`` is 0 +- 1 for the bulk of the images, by median and median absolute
        deviation; above about 3 an image stands apart. ``p_value`` is the share of images that are at least as odd,
        itself included: exact where all images are alike. ``extra`` holds ``group`` (a number where near-copies or
        duplicates were found), ``nearest`` (the nearest image outside the own group) and ``duplicate_of`` (the first
        image of the same content).

    Raises
    ------
    UsageError
        Fewer than 20 different images that can be read, or a rate that so few cannot support.

    Examples
    --------
    >>> noise = np.random.default_rng(0)
    >>> pictures = noise.integers(100, 156, (40, 32, 32, 3), dtype=np.uint8)
    >>> pictures[7] = 255 * (np.arange(32) % 8 < 4)[:, None, None]  # stripes
    >>> scores = audit(pictures, backbone="test_resnet", pretrained=False, device="cpu")
    >>> scores.sorted()[0].path
    'array[0][7]'
    """
    check_groups(groups)
    check_fpr(fpr)
    detector = Detector(**arguments)
    with shown(progress) as report:
        extraction, store = detector.read(images, report)

    different = list(dict.fromkeys(extraction.digests))
    if len(different) < FEWEST:
        raise UsageError(
            f"an audit compares images with each other and needs at least {FEWEST} different ones that can be read, "
            f"not {len(different)}"
        )
    count = len(extraction.paths)
    check_supported(fpr, count - 1, "other images")

    features = store.table(different)
    spaces = views(detector.extractor_.layout)
    if is_word(groups, AUTO):
        near = find_near_copies(features, spaces)
        numbers = near.groups
        nearest = near.nearest
    else:
        labels = label_images(groups, extraction.paths, extraction.positions, extraction.total)
        numbers = numbered(labels, extraction.digests)
        nearest = nearest_outside(features, spaces, numbers)
    odd = oddness(features, spaces, numbers)
    return _as_scores(extraction, different, odd, numbers, nearest, fpr)


def _as_scores(
    extraction: Extraction,
    different: list[bytes],
    odd: np.ndarray,
    numbers: np.ndarray,
    nearest: np.ndarray,
    fpr: float,
) -> Scores:
    """A row for each image, from what is known about each different content."""
    content = {digest: i for i, digest in enumerate(different)}
    index = [content[digest] for digest in extraction.digests]
    first_path: dict[int, str] = {}
    for i, name in zip(index, extraction.paths, strict=True):
        first_path.setdefault(i, name)

    names, reasons = _all_names(extraction)
    scores = judge(names, extraction.positions, reasons, odd[index], {}, Calibration(odd[index]), fpr)
    # the images are their own calibration: the one in question is among those that are at least as odd
    rank = (scores.p_value * (len(index) + 1) - 1) / len(index)

    group_names = _group_names(numbers[index])
    extra = {name: [""] * len(names) for name in ("group", "nearest", "duplicate_of")}
    for row, position in enumerate(extraction.positions):
        own = index[row]
        extra["group"][position] = group_names[row]
        extra["nearest"][position] = first_path.get(int(nearest[own]), "")
        if first_path[own] != names[position]:
            extra["duplicate_of"][position] = first_path[own]
    return replace(scores, p_value=rank, is_ood=rank <= fpr + ROUNDING, extra=extra)


def _all_names(extraction: Extraction) -> tuple[list[str], dict[int, str]]:
    """Names of all images in their order, and why those could not be read that could not, by position."""
    names = [""] * extraction.total
    reasons: dict[int, str] = {}
    for name, position in zip(extraction.paths, extraction.positions, strict=True):
        names[position] = name

    others = np.setdiff1d(np.arange(extraction.total), extraction.positions)
    for position, (name, reason) in zip(others.tolist(), extraction.unreadable, strict=True):
        names[position] = name
        reasons[position] = reason
    return names, reasons


def _group_names(numbers: np.ndarray) -> list[str]:
    """A number, from 1 in the order of the images, for each group of more than one; empty for the others."""
    sizes = np.bincount(numbers)
    names: dict[int, str] = {}
    for number in numbers:
        if sizes[number] > 1:
            names.setdefault(int(number), str(len(names) + 1))
    return [names.get(int(number), "") for number in numbers]

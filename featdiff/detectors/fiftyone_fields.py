"""Scores as fields of the samples of a FiftyOne dataset (extra ``fiftyone``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from ..data.listing import Listing
from ..data.references import ref_of
from ..exceptions import UsageError
from ..runtime.progress import Progress
from ..verdicts.results import UNREADABLE, Scores


class Scorer(Protocol):
    """What scores images part by part: a detector of any kind, exported ones too."""

    def iter_scores(
        self, images: object, fpr: float | None = None, progress: Progress | bool | None = None
    ) -> Iterator[Scores]:
        """Images -> their rows, in their order."""


def score_samples(
    samples: Any,
    detector: Scorer,
    field: str = "ood",
    fpr: float | None = None,
    progress: Progress | bool | None = None,
) -> None:
    """Score the images of a dataset or view of FiftyOne, and set fields of its samples.

    Fields are set part by part: what was scored before an interruption stays. Fields of an earlier call are replaced.

    Parameters
    ----------
    samples : fiftyone.Dataset or fiftyone.DatasetView
        Of images. ``filepath`` may be whatever :func:`featdiff.data.references.ref_of` reads.
    detector : Detector, PixelDetector or ExportedDetector
    field : str, default "ood"
        What the names of the fields begin with: ``ood_score`` (float, higher = more OOD), ``ood_p_value`` (float, in
        (0, 1], small = OOD), ``ood_flag`` (bool), and ``ood_reason`` (str: why an image has no score, or a note). An
        image that cannot be read has none of the first three.
    fpr : float, optional
        False-alarm rate behind the flag; default: that of the detector.
    progress : bool or callable (stage, done, total), optional
        True shows bars.

    Raises
    ------
    UsageError
        FiftyOne is not installed; these are no samples, none, or not of whole images; a name that makes no field; an
        ``fpr`` that the calibration images cannot support.
    NotFittedError
    """
    _check(samples, field)
    ids, paths = samples.values(["id", "filepath"])
    parts = detector.iter_scores(Listing(map(ref_of, paths)), fpr, progress)
    begin = 0
    for scores in parts:
        end = begin + len(scores)
        _set(samples, ids[begin:end], scores, field)
        begin = end


def _check(samples: Any, field: str) -> None:
    try:
        from fiftyone.core.collections import SampleCollection
        from fiftyone.core.patches import EvaluationPatchesView, PatchesView
    except ImportError:
        raise UsageError("FiftyOne is not installed: pip install 'featdiff[fiftyone]'") from None

    if not isinstance(samples, SampleCollection):
        kind = type(samples).__name__
        raise UsageError(f"samples must be a dataset or a view of FiftyOne, not a {kind}", argument="samples")
    if not field.isidentifier():
        raise UsageError(f"{field!r} makes no name of a field", argument="field")
    if not samples:
        raise UsageError(f"{samples.name} has no samples", argument="samples")
    if samples.media_type != "image":
        raise UsageError(
            f"{samples.name} holds samples of media type {samples.media_type}, not image: of videos, take "
            "to_frames(sample_frames=True); of groups, select_group_slices(media_type='image')",
            argument="samples",
        )
    if isinstance(samples, PatchesView | EvaluationPatchesView):
        raise UsageError("patches are parts of images, and featdiff scores whole ones: write them to files, and make a "
                         "dataset of these", argument="samples")  # fmt: skip


def _set(samples: Any, ids: list[str], scores: Scores, field: str) -> None:
    readable = [status != UNREADABLE for status in scores.status]

    def known(column: np.ndarray) -> list[Any]:
        return [value if read else None for value, read in zip(column.tolist(), readable, strict=True)]

    columns = {
        f"{field}_score": known(scores.ood_score),
        f"{field}_p_value": known(scores.p_value),
        f"{field}_flag": known(scores.is_ood),
        f"{field}_reason": [reason or None for reason in scores.reason],
    }
    for name, values in columns.items():
        given = dict(zip(ids, values, strict=True))
        if not samples.has_field(name):  # its kind can be told from values alone
            given = {key: value for key, value in given.items() if value is not None}
        if given:
            samples.set_values(name, given, key_field="id")

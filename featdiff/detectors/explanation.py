"""An image and a fitted detector -> why the image was judged as it was (:class:`Explanation`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from ..data.batches import Batch, LoadedImage, iter_batches, load
from ..data.decoding import Transform
from ..data.loaders import batches_from_stream, is_loader
from ..data.references import ImageRef, list_images
from ..exceptions import UsageError
from ..features.extraction import FeatureBatch
from ..features.geometry import Box, onto_picture, probed_box, seen_box
from ..runtime.progress import Progress
from ..verdicts.calibration import Calibration
from ..verdicts.explanation import PICTURE_SIDE, Contribution, Explanation, Neighbor
from ..verdicts.results import OK, Scores
from .bank_images import BankImages, shrunk
from .checks import check_whole
from .config import EncoderSettings
from .reasons import sentences

__all__ = ["Contribution", "Explanation", "Neighbor", "explain_each", "explain_one"]

# Images of the bank whose small pictures are held at once.
_MOST_SHOWN = 1000


class Explainable(Protocol):
    """What an explanation needs of a fitted detector; :class:`featdiff.Detector` is such."""

    calibration_: Calibration

    @property
    def settings(self) -> EncoderSettings: ...

    @property
    def extractor_(self) -> Any: ...

    @property
    def bank_images_(self) -> BankImages: ...

    @property
    def fpr(self) -> float: ...

    @property
    def labels(self) -> Mapping[str, str]: ...

    def contributions(self, features: Tensor) -> dict[str, tuple[Tensor, Tensor]]: ...

    def nearest(self, features: Tensor, count: int) -> tuple[Tensor, Tensor] | None: ...

    def check_fitted(self) -> None: ...

    def heat_scale(self, fpr: float) -> tuple[float, float] | None: ...

    def _judge(self, batches: list[FeatureBatch], fpr: float, exclude_known: bool) -> Scores: ...


def explain_one(detector: Explainable, image: object, fpr: float | None = None, nearest: int = 5) -> Explanation:
    """Why an image is judged as it is: what contributed, where, and which normal images are like it.

    Parameters
    ----------
    detector : Explainable
    image : path, PIL image, array ...
        One image, named in any way that :meth:`featdiff.Detector.score` takes.
    fpr : float, optional
        False-alarm rate; default: the detector's.
    nearest : int, default 5
        How many normal images are shown.

    Returns
    -------
    Explanation
        Its status is ``unreadable``, and most of it is empty, for an image that cannot be read.

    Raises
    ------
    NotFittedError
    UsageError
        More than one image, or an ``fpr`` that the calibration images cannot support.
    """
    found = list(explain_each(detector, image, fpr, nearest, limit=1))
    return found[0]


def explain_each(
    detector: Explainable,
    images: object,
    fpr: float | None = None,
    nearest: int = 5,
    progress: Progress | None = None,
    limit: int | None = None,
) -> Iterator[Explanation]:
    """Explain images one after the other, in their order; the request is checked at once.

    Parameters
    ----------
    detector, fpr, nearest
        As for :func:`explain_one`.
    images : object
        As for :meth:`featdiff.Detector.score`.
    progress : callable (stage, done, total), optional
    limit : int, optional
        Refuse more images than that.

    Yields
    ------
    Explanation
        One for each image, in their order.
    """
    detector.check_fitted()
    rate = detector.fpr if fpr is None else fpr
    detector.calibration_.check(rate)
    check_whole("nearest", nearest)
    if is_loader(images) and limit is None:
        return _Explainer(detector, rate, nearest).stream(images, progress)
    if is_loader(images):
        raise UsageError("a loader gives many images: use iter_explanations", argument="image")

    refs = list_images(images)
    if limit is not None and len(refs) > limit:
        raise UsageError(f"explain takes one image, and there are {len(refs):,}: use iter_explanations", "image")
    return _Explainer(detector, rate, nearest).refs(refs, progress)


class Explaining:
    """A mix-in for detectors whose scores can be explained."""

    def explain(self: Explainable, image: object, fpr: float | None = None, nearest: int = 5) -> Explanation:
        """Why an image is judged as it is; see :func:`explain_one`."""
        return explain_one(self, image, fpr, nearest)

    def iter_explanations(
        self: Explainable,
        images: object,
        fpr: float | None = None,
        nearest: int = 5,
        progress: Progress | None = None,
    ) -> Iterator[Explanation]:
        """The same for many images, one after the other; see :func:`explain_each`."""
        return explain_each(self, images, fpr, nearest, progress)


@dataclass(frozen=True)
class _Original:
    """A picture before the network's preprocessing: small enough to be shown, and the size that it had."""

    picture: Image.Image
    size: tuple[int, int]


class _Keeping:
    """A transform that keeps a small copy of the picture."""

    def __init__(self, then: Transform) -> None:
        self.then = then
        self.small: Image.Image | None = None
        if hasattr(then, "draft"):  # so that the network sees what it sees when it scores
            self.draft = then.draft

    def __call__(self, picture: Image.Image, *place: object) -> Tensor:
        self.small = shrunk(picture, PICTURE_SIDE)
        return self.then(picture, *place)


@dataclass(frozen=True)
class _Heat:
    """A map over the network's input (h, w), and what its values mean."""

    values: np.ndarray
    threshold: float
    top: float


class _Explainer:
    """Runs images through a detector a batch at a time, and keeps small originals beside their pixels."""

    def __init__(self, detector: Explainable, fpr: float, nearest: int) -> None:
        self.detector = detector
        self.fpr = fpr
        self.count = nearest
        self.threshold = detector.calibration_.threshold(fpr)
        self.heat_scale = detector.heat_scale(fpr)
        self.labels = detector.labels
        # of the images that were read and are not explained yet, in their order
        self._originals: deque[_Original | None] = deque()
        self._shown: dict[int, Neighbor] = {}
        self._boxes: dict[tuple[int, int], Box | None] = {}

    def stream(self, images: Iterable[object], progress: Progress | None) -> Iterator[Explanation]:
        return self._explain(batches_from_stream(images, self._batches), 0, progress)

    def refs(self, refs: list[ImageRef], progress: Progress | None) -> Iterator[Explanation]:
        return self._explain(self._batches(refs), len(refs), progress)

    def _batches(self, refs: Iterable[ImageRef]) -> Iterator[Batch]:
        return iter_batches(map(self._load, refs), self.detector.settings.image_batch)

    def _load(self, ref: ImageRef) -> LoadedImage:
        """Decode once for both the network and people."""
        settings = self.detector.settings
        keep = _Keeping(self.detector.extractor_.transform)
        loaded = load(ref, keep, settings.max_pixels, max_bytes=settings.max_bytes)
        self._originals.append(_Original(keep.small, loaded.size) if keep.small else None)
        return loaded

    def _explain(self, batches: Iterator[Batch], total: int, progress: Progress | None) -> Iterator[Explanation]:
        done = 0
        for batch in batches:
            originals = [self._originals.popleft() if self._originals else None for _ in batch.loaded]
            yield from self._of_batch(batch, originals)
            done += len(batch.loaded)
            if progress:
                progress("explaining", done, max(total, done))

    def _of_batch(self, batch: Batch, originals: list[_Original | None]) -> Iterator[Explanation]:
        detector = self.detector
        passes = [detector.extractor_.with_heat(stack.pixels) for stack in batch.stacks]
        features = FeatureBatch.of(batch, [rows for rows, _ in passes])
        scores = detector._judge([features], self.fpr, False)

        parts: dict[int, list[Contribution]] = {}
        nearest: dict[int, list[Neighbor]] = {}
        if features.positions:
            parts = self._contributions(features)
            nearest = self._nearest(features)
        heat = self._heat(batch, [maps for _, maps in passes])
        for i, original in enumerate(originals):
            yield self._of_row(scores, i, original, parts.get(i, []), nearest.get(i, []), heat.get(i))

    def _of_row(
        self,
        scores: Scores,
        i: int,
        original: _Original | None,
        heads: list[Contribution],
        nearest: list[Neighbor],
        heat: _Heat | None,
    ) -> Explanation:
        row = scores[i]
        is_read = row.status == OK
        aligned = self._aligned(heat, original) if heat and is_read else None
        known = scores.known is not None and bool(scores.known[i])
        return Explanation(
            path=row.path,
            status=row.status,
            reason=row.reason,
            ood_score=row.ood_score,
            p_value=row.p_value,
            is_ood=row.is_ood,
            fpr=self.fpr,
            threshold=self.threshold,
            p_values=row.p_values if is_read else {},
            layers=row.layers if is_read else {},
            heads=tuple(heads) if is_read else (),
            reasons=sentences(row, heads, nearest, known, aligned, heat.threshold if heat else 0.0),
            size=original.size if original else (0, 0),
            picture=original.picture if original else None,
            heat=aligned,
            heat_threshold=heat.threshold if heat and aligned is not None else None,
            heat_top=heat.top if heat and aligned is not None else None,
            nearest=tuple(nearest),
        )

    # ---- where ----

    def _heat(self, batch: Batch, maps: Sequence[Tensor | None]) -> dict[int, _Heat]:
        """The heat map of each decoded image, by its position; none for a model without a local score."""
        found: dict[int, _Heat] = {}
        if self.heat_scale is None:
            return found
        for stack, heat in zip(batch.stacks, maps, strict=True):
            assert heat is not None
            for position, values in zip(stack.positions, heat.cpu().numpy(), strict=True):
                found[position] = _Heat(values, *self.heat_scale)
        return found

    def _aligned(self, heat: _Heat, original: _Original | None) -> np.ndarray | None:
        """A heat map over the picture that is shown; None if it is not known what the network sees of it."""
        if original is None or not np.isfinite(heat.values).all():
            return None
        box = self._box(original.size)
        return None if box is None else onto_picture(heat.values, box, *original.picture.size)

    def _box(self, size: tuple[int, int]) -> Box | None:
        """What the network sees of a picture of this size."""
        if size not in self._boxes:
            backbone = self.detector.extractor_.backbone
            if backbone.source == "module":
                self._boxes[size] = probed_box(backbone.transform, *size)
            else:
                self._boxes[size] = seen_box(backbone.data_config, *size)
        return self._boxes[size]

    # ---- what, and like which ----

    def _contributions(self, features: FeatureBatch) -> dict[int, list[Contribution]]:
        """What the score of each image is made of, by its position."""
        by_name = self.detector.contributions(features.features)
        values = {name: (z.double().cpu().numpy(), part.double().cpu().numpy()) for name, (z, part) in by_name.items()}
        found = {}
        for k, position in enumerate(features.positions):
            parts = [
                Contribution(name, self.labels.get(name, name), float(z[k]), float(amount[k]))
                for name, (z, amount) in values.items()
            ]
            found[position] = sorted(parts, key=lambda part: -part.amount)
        return found

    def _nearest(self, features: FeatureBatch) -> dict[int, list[Neighbor]]:
        """The nearest images of the bank, by position; none for a model that compares with none."""
        pairs_of_each = self.detector.nearest(features.features, self.count)
        if pairs_of_each is None:
            return {}
        distances, rows = pairs_of_each
        found = {}
        for k, position in enumerate(features.positions):
            pairs = zip(distances[k].tolist(), rows[k].tolist(), strict=True)
            found[position] = [self._neighbor(row, distance) for distance, row in pairs]
        return found

    def _neighbor(self, row: int, distance: float) -> Neighbor:
        """A row of the bank, whose picture is looked up once: the same images are often the nearest."""
        if row not in self._shown:
            if len(self._shown) >= _MOST_SHOWN:
                self._shown.clear()
            self._shown[row] = self.detector.bank_images_.neighbor(row, 0.0, self.detector.settings)
        return replace(self._shown[row], distance=distance)

"""The model that is served, whatever kind it is: saved, hardened, or exported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..data.batches import Batch, LoadedImage, iter_batches, load
from ..data.references import HeldRef, ImageRef
from ..exported import ExportedDetector
from ..runtime.sessions import few_at_a_time
from ..verdicts.calibration import Calibration
from ..verdicts.explanation import Explanation
from ..verdicts.results import Scores, columns_of
from .models import load_model
from .settings import Settings

if TYPE_CHECKING:
    from ..detectors import ImageDetector

# The picture with which a model runs once before it is asked.
_FIRST = (256, 256)


@dataclass(frozen=True)
class Served:
    """A model that is ready.

    Attributes
    ----------
    name : str
        For clients.
    fpr : float
        False-alarm rate behind ``is_ood``.
    calibration : Calibration
    layers, parts : sequence of str
        What has a column of its own.
    engine : str
        What runs it, in words.
    load : callable
        Decodes an image; any thread may call it.
    score : callable
        Decoded images -> their rows, in their order, whatever they are batched with.
    explain : callable, optional
        An image and how many similar ones -> its explanation; None for a model that cannot.
    begin : callable
        Called on the thread that will run the model.
    """

    name: str
    fpr: float
    calibration: Calibration
    layers: Sequence[str]
    parts: Sequence[str]
    engine: str
    load: Callable[[ImageRef], LoadedImage]
    score: Callable[[Sequence[LoadedImage]], Scores]
    explain: Callable[[ImageRef, int], Explanation] | None
    begin: Callable[[], None] = lambda: None

    @property
    def columns(self) -> list[str]:
        """Of a row, in their order."""
        return columns_of(self.layers, (), self.parts)


def open_served(settings: Settings) -> Served:
    """Load a model and run it once.

    Parameters
    ----------
    settings : Settings

    Returns
    -------
    Served

    Raises
    ------
    ModelError, UsageError, WeightsError
        As for :func:`featdiff.load_detector` and :class:`featdiff.ExportedDetector`; a rate that the calibration
        images cannot support.
    """
    with few_at_a_time():
        detector = load_model(settings.model, settings.options)
        if isinstance(detector, ExportedDetector):
            limits = (detector.max_pixels, detector.max_bytes)
            served = _served(detector, settings, detector.transform, limits, detector.engine)
        else:
            served = _saved(detector, settings)

    grey = served.load(HeldRef("first", Image.new("RGB", _FIRST, (128, 128, 128))))
    served.score([grey])
    return served


def _saved(detector: ImageDetector, settings: Settings) -> Served:
    from ..detectors import Detector

    engine = "torch"
    if isinstance(detector, Detector):
        detector.ready_for_many()
        engine = detector.engine_note_ or engine
    limits = (detector.settings.max_pixels, detector.settings.max_bytes)
    served = _served(detector, settings, detector.extractor_.transform, limits, engine)
    if engine.startswith("torch"):
        return served

    from ..runtime.threads import set_own_threads

    # PyTorch has only the small networks of a few images to run, which cost two threads thrice the time of one
    return replace(served, begin=partial(set_own_threads, 1))


def _served(
    detector: ImageDetector | ExportedDetector,
    settings: Settings,
    transform: Any,
    limits: tuple[int, int],
    engine: str,
) -> Served:
    rate = detector.fpr if settings.fpr is None else settings.fpr
    detector.calibration_.check(rate)
    explain = getattr(detector, "explain", None)

    def loaded(ref: ImageRef) -> LoadedImage:
        item = load(ref, transform, limits[0], max_bytes=limits[1])
        return replace(item, ref=ImageRef(ref.path))  # so that its bytes are free while it waits

    def score(images: Sequence[LoadedImage]) -> Scores:
        batches: list[Batch] = list(iter_batches(iter(images), settings.max_batch))
        return Scores.concatenate(detector.score_batches(batches, rate))

    return Served(
        name=settings.public_name,
        fpr=rate,
        calibration=detector.calibration_,
        layers=detector.layers,
        parts=detector.parts,
        engine=engine,
        load=loaded,
        score=score,
        explain=(lambda ref, nearest: explain(ref, rate, nearest)) if explain else None,
    )

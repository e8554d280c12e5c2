"""The features of training images ahead of :meth:`featdiff.Detector.fit`, part by part, by any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..data.image_refs import ImageRef
from ..features.extraction import extract
from ..runtime.progress import Progress
from .config import FeatureSettings
from .feature import Detector
from .feature_scoring import WORTH_AN_ENGINE

# Unreadable images that are told by name: of a part, and of all parts together.
_NAMED = 100
_MOST_NAMED = 1_000


@dataclass
class Filled:
    """What came of images, and where their features are.

    Attributes
    ----------
    images : int
    computed : int
        How many went through the backbone just now; the others were there already, or are unreadable.
    unreadable : int
    named : list of (path, reason)
        Some of these, the first 1,000 at most.
    stores : dict of str to str
        Folders with features, and what computed them: ``float32 by torch``.
    """

    images: int = 0
    computed: int = 0
    unreadable: int = 0
    named: list[tuple[str, str]] = field(default_factory=list)
    stores: dict[str, str] = field(default_factory=dict)

    def add(self, other: Filled) -> None:
        """Count what came of other images."""
        self.images += other.images
        self.computed += other.computed
        self.unreadable += other.unreadable
        self.named += other.named[: _MOST_NAMED - len(self.named)]
        self.stores |= other.stores


class Filling:
    """Puts features into the store in which a fit with the same settings looks for them.

    Several processes may do so at once, on one machine or on several that share the cache folder: each writes files of
    its own. An image whose content is in the store when a process begins is read, and not decoded or computed.

    Parameters
    ----------
    settings : FeatureSettings
        As for the fit.
    first : sequence of ImageRef
        The first images of the set, on which engines are compared.
    total : int
        How many images the fit will get: from 1,000 on, ``engine="auto"`` chooses one.

    Attributes
    ----------
    engine_note : str
        What runs the backbone, and why; empty where there was nothing to choose.

    Raises
    ------
    UsageError, WeightsError, FeatdiffError
        The backbone cannot be had or has no such layers, an engine is not installed, the cache cannot be written.
    """

    def __init__(self, settings: FeatureSettings, first: Sequence[ImageRef], total: int) -> None:
        detector = Detector.from_settings(settings)
        detector.extractor_ = detector._make_extractor(settings.input_size)
        detector._choose_engine(list(first), total >= WORTH_AN_ENGINE)

        self.engine_note = detector.engine_note_
        self._detector = detector
        self._store = detector.feature_store()

    def add(self, images: list[ImageRef], progress: Progress | None = None) -> Filled:
        """Compute what is not there; whatever ends it, what was computed so far is kept.

        Parameters
        ----------
        images : list of ImageRef
        progress : callable (stage, done, total), optional
        """
        extractor = self._detector.extractor_
        batches, total = self._detector.batches(images, self._store)
        extraction = extract(batches, extractor, self._store, total, progress)
        bad = extraction.unreadable
        stores = {str(self._store.folder): f"{extractor.precision} by {extractor.engine}"}
        return Filled(extraction.total, extraction.computed, len(bad), bad[:_NAMED], stores)

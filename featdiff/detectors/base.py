"""What detectors of both modes share: images to features, features to scores, scores to rows of results."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..data.batches import Batch
from ..data.decoding import Transform
from ..data.groups import Groups, label_images, numbered
from ..data.listing import Listing
from ..data.loaders import is_loader, read_batches
from ..data.splits import Plan, Split
from ..exceptions import KnownImages, NotFittedError, UsageError
from ..features.extraction import Extraction, Extractor, FeatureBatch, extract, featurise
from ..features.store import Features, FeatureStore, FeatureTable
from ..files.model_folder import save
from ..runtime.progress import Progress, shown
from ..verdicts.calibration import Calibration, check_supported
from ..verdicts.judge import judge
from ..verdicts.results import Scores
from .config import Settings
from .grouping import Grouping, make_checked_plan
from .pushing import Pushable

S = TypeVar("S", bound=Settings)


class BaseDetector(Pushable, Generic[S]):
    """A detector is fitted on ordinary images and scores others.

    A subclass says how rows of its extractor become scores: :meth:`fit`, ``_measured``, :meth:`all_heads`,
    :meth:`config` and :meth:`tensors`; the rest is here.

    Parameters
    ----------
    settings : Settings

    Attributes
    ----------
    settings : Settings
        All arguments of the constructor.
    device : torch.device
        Where it works.
    extractor_ : Extractor
        Decoded images -> rows of features.
    calibration_ : Calibration
        Scores of held-out in-domain images.
    calibration_digests_ : list of bytes
        Which of these took no part in training (with folds: none); known where the detector was fitted, and not saved.
    grouping_ : Grouping
        Which images were taken to belong together; known where the detector was fitted on a split of its own.
    recalibrations_ : tuple of mappings
        What each :func:`featdiff.detectors.recalibration.recalibrate` since the fit has changed.
    n_images_, n_duplicates_ : int
        Different images, and copies that were left out.
    unreadable_ : list of (path, reason)
        Images of the last :meth:`fit` or :meth:`features` that could not be read.
    validation_loss_, training_seconds_ : float
        What came of training, and how long it took over all runs.
    """

    #: Which mode a saved model names.
    mode: ClassVar[str] = ""
    #: Image batches that are scored together, and rows that are scored at once when they are at hand.
    batches_at_once: int = 1
    rows_at_once: int = 1024
    # Folder of the cache for what ``extractor_`` gives, and the type of its numbers.
    _stored_in: tuple[str, type[np.number]] = ("features", np.float32)

    extractor_: Extractor
    calibration_: Calibration
    calibration_digests_: list[bytes]
    unreadable_: list[tuple[str, str]]
    grouping_: Grouping
    recalibrations_: tuple[Mapping[str, Any], ...] = ()
    n_images_: int
    n_duplicates_: int
    validation_loss_: float
    training_seconds_: float

    def __init__(self, settings: S) -> None:
        self.settings = settings
        self.device = settings.place

    @classmethod
    def from_settings(cls, settings: S) -> Self:
        """A detector with these settings, not fitted."""
        return cls(**{name: getattr(settings, name) for name in settings.names()})

    @property
    def fpr(self) -> float:
        """False-alarm rate; can be set anew (``UsageError`` if the calibration images cannot support it)."""
        return self.settings.fpr

    @fpr.setter
    def fpr(self, rate: float) -> None:
        if self.is_fitted:
            self.calibration_.check(rate)
        self.settings = self.settings.with_(fpr=rate)

    @property
    def is_fitted(self) -> bool:
        """Whether there is something to compare scores with."""
        return hasattr(self, "calibration_")

    def __repr__(self) -> str:
        kind = type(self).__name__
        if not self.is_fitted:
            return f"{kind}(not fitted, fpr={self.fpr:g})"
        images = f"{self.n_images_:,} images, {len(self.calibration_):,} for calibration"
        return f"{kind}({self.name}, fitted on {images}, fpr={self.fpr:g}, device={self.device})"

    # ---- what a mode says ----

    @property
    def name(self) -> str:
        """What images are looked at with."""
        raise NotImplementedError

    @property
    def layers(self) -> list[str]:
        """Names of the layers that have a score of their own."""
        return []

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the scores that the verdict joins and that have a p-value of their own; most often none."""
        return ()

    def fit(self, images: object, progress: Progress | bool | None = None) -> Self:
        """Learn what is in-domain from ordinary images."""
        raise NotImplementedError

    def score_features(self, features: Tensor) -> np.ndarray:
        """Rows of ``extractor_`` (B, D) -> ood_score (B,), higher = more OOD."""
        return self.layer_scores(features)[0]

    def layer_scores(self, features: Tensor, own: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Rows of features -> scores.

        Parameters
        ----------
        features : Tensor of shape (B, D)
            Of ``extractor_``, on any device.
        own : ndarray of shape (B,) of int, optional
            The row of the bank that each is not compared with; -1: none.

        Returns
        -------
        ood_score : ndarray of shape (B,)
        layer_scores : ndarray of shape (B, L)
            Both higher = more OOD, about 0 +- 1 for in-domain images.
        """
        return self._measured(features, own)[:2]

    def rows_in_bank(self, digests: Sequence[bytes]) -> np.ndarray | None:
        """Which row of the bank of training images holds each content (B,), -1: none; None if there is no bank."""
        return None

    def all_heads(self, features: Tensor) -> dict[str, np.ndarray]:
        """Rows of ``extractor_`` (B, D) -> scores (B,) by name; ``featdiff`` is the ood_score."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """All that ``config.json`` says besides the format."""
        from importlib.metadata import version

        self.check_fitted()
        return {
            "featdiff_version": version("featdiff"),
            "mode": self.mode,
            "images": {
                "different": self.n_images_,
                "calibration": len(self.calibration_),
                "calibration_groups": self.calibration_.groups,
            },
            "validation_loss": self.validation_loss_,
            "training_seconds": self.training_seconds_,
            "settings": self.settings.saved(),
        } | ({"recalibrations": list(self.recalibrations_)} if self.recalibrations_ else {})

    def tensors(self) -> dict[str, Tensor]:
        """All that ``model.safetensors`` holds."""
        return {name: torch.from_numpy(array) for name, array in self.calibration_.arrays().items()}

    # ---- images -> features ----

    def feature_store(self, variant: str = "") -> FeatureStore:
        """Where rows of ``extractor_`` are kept; ``variant`` names another preparation of the images."""
        return self._store_of(self.extractor_.key(variant))

    def _store_of(self, key: str) -> FeatureStore:
        folder, dtype = self._stored_in
        return FeatureStore(self.settings.cache_folder / folder / key, self.extractor_.width, dtype)

    def batches(
        self, images: object, known: FeatureStore | tuple[()] = (), transform: Transform | None = None
    ) -> tuple[Iterator[Batch], int]:
        """Decoded batches of whatever the user named.

        Parameters
        ----------
        images : object
            As for :meth:`fit`.
        known : FeatureStore, optional
            Images in it are not decoded.
        transform : callable, optional
            Stands in for the extractor's.

        Returns
        -------
        batches : iterator of Batch
        total : int
            How many images there are, 0 if unknown.
        """
        settings = self.settings
        return read_batches(
            images,
            lambda: transform or self.extractor_.transform,
            settings.image_batch,
            known,
            settings.workers,
            settings.max_pixels,
            settings.max_bytes,
        )

    def _ready(self, images: object) -> object:
        """The images, after what a mode does before it reads them; here nothing."""
        return images

    def _extract(self, images: object, progress: Progress | None) -> tuple[Extraction, FeatureStore]:
        images = self._ready(images)
        store = self.feature_store()
        batches, total = self.batches(images, store)
        extraction = extract(batches, self.extractor_, store, total, progress)
        self.unreadable_ = extraction.unreadable
        if not extraction.paths:
            path, reason = extraction.unreadable[0] if extraction.unreadable else ("the images", "none were given")
            raise UsageError(f"none of the images could be read; the first: {path}: {reason}")
        return extraction, store

    def features(self, images: object, progress: Progress | bool | None = None) -> tuple[list[str], FeatureTable]:
        """Features of images, computed where the cache does not hold them.

        Parameters
        ----------
        images : object
            As for :meth:`fit`. Those that cannot be read are listed in ``unreadable_``.
        progress : bool or callable (stage, done, total), optional
            True shows bars.

        Returns
        -------
        paths : list of str
            Of the N images that can be read.
        features : FeatureTable
            Their rows (N, D), which stay on disk.

        Raises
        ------
        NotFittedError, UsageError
            There is no extractor yet; none of the images can be read.
        """
        self.check_fitted()
        with shown(progress) as report:
            extraction, store = self._extract(images, report)
        return extraction.paths, store.table(extraction.digests)

    # ---- parts of fit ----

    def _divide(
        self, extraction: Extraction, store: FeatureStore, split: Split | None, groups: Groups | None
    ) -> tuple[list[bytes], FeatureTable, Plan]:
        """Different contents, their features, and which of them train, validate and calibrate.

        Copies of one image count once: they must not be on both sides. ``split`` is one that the caller wants.
        """
        unique = list(dict.fromkeys(extraction.digests))
        features = store.table(unique)
        self.n_images_ = len(unique)
        self.n_duplicates_ = len(extraction.digests) - len(unique)

        if split is not None:
            if groups is not None:
                raise UsageError("a split says who trains and who calibrates, so drop groups", argument="groups")
            split.check(len(unique))
            check_supported(self.fpr, len(split.calibration))
            plan = Plan(split, (), len(split.calibration))
        else:
            self.grouping_ = self._group(extraction, features, groups)
            settings = self.settings
            plan = make_checked_plan(
                len(unique), settings.calibration, settings.validation, settings.seed, self.grouping_.numbers, self.fpr
            )
        self.calibration_digests_ = [unique[i] for i in plan.final.calibration]
        return unique, features, plan

    def _group(self, extraction: Extraction, features: Features, groups: Groups | None) -> Grouping:
        """The group of each different image, where groups are given."""
        if groups is None:
            return Grouping()
        labels = label_images(groups, extraction.paths, extraction.positions, extraction.total)
        return Grouping.of(numbered(labels, extraction.digests), groups)

    def _training_key(self, digests: list[bytes], split: Split, version: int, names: Sequence[str]) -> str:
        """A hash of all that decides a training run: its images, settings of these names, and the recipe."""
        facts = repr([version, self.settings.recipe, [getattr(self.settings, name) for name in names]])
        contents = b"".join(digests[i] for part in (split.training, split.validation) for i in part)
        return hashlib.sha256(f"{facts} {len(split.training)} ".encode() + contents).hexdigest()[:16]

    # ---- score ----

    def score(
        self,
        images: object,
        fpr: float | None = None,
        progress: Progress | bool | None = None,
        exclude_known: bool = False,
    ) -> Scores:
        """Score all images at once; :meth:`iter_scores` gives the same as a stream.

        Parameters
        ----------
        images : object
            As for :meth:`fit`. An image that cannot be read becomes a row with a status and a reason.
        fpr : float, optional
            False-alarm rate; default: the one given at fit.
        progress : bool or callable (stage, done, total), optional
            True shows bars.
        exclude_known : bool, default False
            Do not compare training images with themselves. (The denoisers have seen them all the same; to find odd
            images in a training set, use :func:`featdiff.audit`.)

        Returns
        -------
        Scores
            In the order of the images. ``known`` says which are training images, as far as the model keeps them.

        Raises
        ------
        NotFittedError
        UsageError
            Nothing to score, or an ``fpr`` that the calibration images cannot support.

        Warns
        -----
        KnownImages
            Some are training images, which look ordinary because they meet themselves.
        """
        scores = Scores.concatenate(self.iter_scores(images, fpr, progress, exclude_known))
        count = 0 if scores.known is None else int(scores.known.sum())
        if count and not exclude_known:
            warnings.warn(
                KnownImages(
                    f"{count:,} of {len(scores):,} images were in training, so they look ordinary: featdiff.audit "
                    "finds odd images in a training set; exclude_known=True does not compare them with themselves",
                    argument="exclude_known",
                ),
                stacklevel=2,
            )
        return scores

    def iter_scores(
        self,
        images: object,
        fpr: float | None = None,
        progress: Progress | bool | None = None,
        exclude_known: bool = False,
    ) -> Iterator[Scores]:
        """Score images part by part, in their order; memory does not grow with their number.

        The request is checked at once, images are read as the iterator is used. Parameters and errors are those of
        :meth:`score`.
        """
        self.check_fitted()
        rate = self.fpr if fpr is None else fpr
        self.calibration_.check(rate)
        # a loader may be a live stream
        live = is_loader(images) and not isinstance(images, Listing)
        at_once = 1 if live else self.batches_at_once * self.settings.image_batch
        return self._stream(*self.batches(self._ready(images)), at_once, rate, progress, exclude_known)

    def score_batches(self, batches: Iterable[Batch], fpr: float | None = None) -> Iterator[Scores]:
        """Score images that are decoded already.

        Parameters
        ----------
        batches : iterable of Batch
        fpr : float, optional
            As for :meth:`score`.

        Yields
        ------
        Scores
            One for each batch.
        """
        return self._stream(batches, 0, 1, self.fpr if fpr is None else fpr, None, False)

    def _stream(
        self,
        batches: Iterable[Batch],
        total: int,
        at_once: int,
        fpr: float,
        progress: Progress | bool | None,
        exclude_known: bool,
    ) -> Iterator[Scores]:
        with shown(progress) as report:
            yield from self._parts(batches, total, at_once, fpr, report, exclude_known)

    def _parts(
        self,
        batches: Iterable[Batch],
        total: int,
        at_once: int,
        fpr: float,
        progress: Progress | None,
        exclude_known: bool,
    ) -> Iterator[Scores]:
        waiting: list[FeatureBatch] = []
        done = 0
        try:
            for batch, featurised in featurise(batches, self.extractor_):
                waiting.append(featurised)
                done += len(batch.loaded)
                if progress:
                    progress("scoring", done, max(total, done))
                if sum(map(len, waiting)) >= at_once:
                    part, waiting = waiting, []  # what is interrupted here is not begun again below
                    yield self._judge(part, fpr, exclude_known)
        except GeneratorExit:  # nobody listens any more
            raise
        except BaseException:  # Ctrl-C, too: what went through the backbone is not lost
            if waiting:
                yield self._judge(waiting, fpr, exclude_known)
            raise
        if waiting:
            yield self._judge(waiting, fpr, exclude_known)

    def _judge(self, batches: list[FeatureBatch], fpr: float, exclude_known: bool) -> Scores:
        batch = FeatureBatch.concatenate(batches)
        score = np.empty(0)
        layers = np.empty((0, len(self.layers)))
        p_values = {name: np.empty(0) for name in self.parts}
        own = self.rows_in_bank(batch.digests)
        if batch.positions:
            score, layers, p_values = self._measured(batch.features, own if exclude_known else None)
        by_layer = dict(zip(self.layers, layers.T, strict=True))
        scores = judge(
            batch.paths, batch.positions, batch.failed, score, by_layer, self.calibration_, fpr, batch.notes, p_values
        )
        if own is not None:
            scores.known = np.zeros(len(scores), dtype=bool)
            scores.known[batch.positions] = own >= 0
        return scores

    def _measured(
        self, features: Tensor, own: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """:meth:`layer_scores`, and a p-value (B,) of each of :attr:`parts` by name."""
        raise NotImplementedError

    def check_fitted(self) -> None:
        """Raise ``NotFittedError`` unless there is something to score with."""
        if not self.is_fitted:
            kind = type(self).__name__
            raise NotFittedError(f"this detector is not fitted: call fit(images), or {kind}.from_pretrained(folder)")

    # ---- save ----

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors`` into a folder, whole or not at all.

        Parameters
        ----------
        folder : path

        Raises
        ------
        NotFittedError, UsageError
            Nothing to save; the folder holds something else.
        ModelError
            The disk is full. Features and training stay in the cache: fitting again ends at once.
        """
        self.check_fitted()
        save(folder, self.config(), self.tensors())

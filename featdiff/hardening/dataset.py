"""Builds the data set that a student is trained on.

In: images in class folders, a student and perhaps a teacher. Out: the readable images with labels and a split, and for
each view what the student takes as input and the teacher's pre-logits.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..data.references import ImageRef
from ..data.splits import MOST_CALIBRATION, MOST_VALIDATION, Split, evenly, split_by_content
from ..detectors.checks import check_share
from ..exceptions import UsageError
from ..features.extraction import Extraction
from ..features.store import Features, FeatureStore, FeatureTable
from ..runtime.progress import Progress
from ..verdicts.calibration import check_fpr, check_supported
from .frozen import FrozenLayers
from .reading import DecodedImages, MeanColour, Reader, derive
from .students import Classifier
from .teachers import MAX_HEAD_IMAGES, Teacher
from .views import View


@dataclass(frozen=True)
class StudentDataset:
    """Different readable images, and what was computed from them.

    Attributes
    ----------
    refs : list of ImageRef
    digests : list of bytes
        Of the images' contents.
    labels : ndarray of int, shape (N,)
    split : Split
        Which images train, validate and calibrate.
    views : list of Features
        For each view, the stored input of the student.
    teacher_features : list of FeatureTable
        For each view, the teacher's pre-logits; empty without a teacher.
    unreadable : list of (path, reason)
        Images that were left out.
    """

    refs: list[ImageRef]
    digests: list[bytes]
    labels: np.ndarray
    split: Split
    views: list[Features]
    teacher_features: list[FeatureTable]
    unreadable: list[tuple[str, str]]


@dataclass(frozen=True)
class DatasetBuilder:
    """Reads images and builds a :class:`StudentDataset`.

    Parameters
    ----------
    reader : Reader
    views : int
        Views of each image.
    fpr : float
    calibration : float or None
        Share of the images; None for one that suits ``fpr``.
    validation : float
        Share of the images.
    batch_size : int
        So many training images must be left.
    progress : callable or None

    Raises
    ------
    UsageError
        An argument outside its range.
    """

    reader: Reader
    views: int
    fpr: float
    calibration: float | None
    validation: float
    batch_size: int
    progress: Progress | None

    def __post_init__(self) -> None:
        check_fpr(self.fpr)
        if self.calibration is not None:
            check_share("calibration", self.calibration)
        check_share("validation", self.validation)
        if self.views < 1:
            raise UsageError(f"views must be a whole number above 0, not {self.views}", argument="views")

    def __call__(
        self,
        refs: Sequence[ImageRef],
        labels: np.ndarray,
        classifier: Classifier,
        frozen: FrozenLayers | None,
        teacher: Teacher | None,
    ) -> StudentDataset:
        """Run all images through the frozen layers and the teacher, once for each view.

        Parameters
        ----------
        refs : sequence of ImageRef
        labels : ndarray of int, shape (N,)
            Positions in ``classifier.classes``.
        classifier : Classifier
            The student.
        frozen : FrozenLayers or None
            Its frozen part, if any.
        teacher : Teacher or None
            One without a last layer is trained to tell the classes apart.

        Returns
        -------
        StudentDataset

        Raises
        ------
        UsageError
            Too few images, in all or of a class; no readable image; or too little disk space for the cache.
        FeatdiffError
            An image changed in the meantime.
        """
        self._check_count(len(refs))
        self._check_disk_space(len(refs), frozen, teacher)
        if frozen is None and any(ref.sequential for ref in refs):
            raise UsageError(
                "with all layers trained, images are read in any order, and this archive cannot: unpack it",
                argument="images",
            )

        extraction, store = self.reader.extract(refs, frozen or MeanColour(), 0, np.float16, self.progress)
        if not extraction.paths:
            path, reason = extraction.unreadable[0]
            raise UsageError(f"none of the images could be read; the first: {path}: {reason}", argument="images")
        index_of = {ref.path: i for i, ref in enumerate(refs)}
        first_of, doubtful = _different(extraction, index_of, labels, classifier.classes)

        digests = list(first_of)
        indices = list(first_of.values())
        readable = [refs[i] for i in indices]
        labels = labels[indices]
        split = self._split(digests, labels, classifier.classes)
        views = self._student_views(readable, digests, store, classifier, frozen)
        teacher_features = self._teacher_views(readable, digests, labels, split, teacher) if teacher else []
        unreadable = [*extraction.unreadable, *doubtful]
        return StudentDataset(readable, digests, labels, split, views, teacher_features, unreadable)

    def held_back(self, images: int) -> float:
        """Share of ``images`` images that calibrates or validates.

        Parameters
        ----------
        images : int

        Returns
        -------
        float
            In [0, 1].
        """
        calibration = min(self._calibration_share(images), MOST_CALIBRATION / images)
        return calibration + min(self.validation, MOST_VALIDATION / images)

    def _calibration_share(self, images: int) -> float:
        """By default a tenth; of few images up to a fifth, to have at least twice as many as the rate needs."""
        return self.calibration or min(0.2, max(0.1, 2 / (self.fpr * images)))

    def _check_count(self, images: int) -> None:
        check_supported(self.fpr, round(min(MOST_CALIBRATION, images * self._calibration_share(images))))
        training = images - round(images * self.held_back(images))
        if training < self.batch_size:
            raise UsageError(
                f"{training} training images do not fill a batch of {self.batch_size}: lower batch_size",
                argument="batch_size",
            )

    def _check_disk_space(self, images: int, frozen: FrozenLayers | None, teacher: Teacher | None) -> None:
        """Refuse images whose features would not fit on the disk; features in the cache may be of other images."""
        needed = 0
        for view in range(self.views):
            stores = []
            if frozen:
                stores.append(self.reader.store(frozen, view, np.float16))
            if teacher:
                stores.append(self.reader.store(teacher, view, np.float32))
            for store in stores:
                needed += max(0, images - len(store)) * store.width * store.dtype.itemsize

        folder = self.reader.runtime.cache_folder
        free = shutil.disk_usage(folder).free if needed else 0
        if needed > free:
            raise UsageError(
                f"{images:,} images in {self.views} views need {needed / 1e9:.1f} GB in {folder}, and "
                f"{free / 1e9:.1f} GB are free: choose another cache, fewer views, or a later layer for train_from",
                argument="cache",
            )

    def _split(self, digests: list[bytes], labels: np.ndarray, classes: Sequence[str]) -> Split:
        # by content, so that a later student that starts from this one, or learns from it, has the same split
        split = split_by_content(digests, self._calibration_share(len(digests)), self.validation)
        check_supported(self.fpr, len(split.calibration))
        for label, name in enumerate(classes):
            if not (labels[split.training] == label).any():
                raise UsageError(f"class {name!r} has no image left to train on: add images of it, or leave it out")
        return split

    def _student_views(
        self,
        refs: list[ImageRef],
        digests: list[bytes],
        first_view: FeatureStore,
        classifier: Classifier,
        frozen: FrozenLayers | None,
    ) -> list[Features]:
        """The student's input for each view. With frozen layers, that of the first view is already stored."""
        if frozen is None:
            return [DecodedImages(refs, View(view, classifier.transform), self.reader) for view in range(self.views)]

        tables: list[Features] = [first_view.table(digests)]
        for view in range(1, self.views):
            tables.append(self.reader.table(refs, digests, frozen, view, np.float16, self.progress))
        return tables

    def _teacher_views(
        self, refs: list[ImageRef], digests: list[bytes], labels: np.ndarray, split: Split, teacher: Teacher
    ) -> list[FeatureTable]:
        """The teacher's pre-logits for each view. A backbone without a last layer gets one."""
        tables = []
        for view in range(self.views):
            if teacher.frozen:  # the cache may have their output, which training the teacher did not change
                source = self.reader.store(teacher.frozen, view, np.float16)
                target = self.reader.store(teacher, view, np.float32)
                derive(source, target, digests, teacher.from_frozen, self.progress)
            tables.append(self.reader.table(refs, digests, teacher, view, np.float32, self.progress))

        if teacher.head is None:
            # a part of the training images, with every class in it
            first_of_class = split.training[np.unique(labels[split.training], return_index=True)[1]]
            training = np.union1d(evenly(split.training, MAX_HEAD_IMAGES), first_of_class)
            teacher.fit_head(
                tables[0][training],
                labels[training],
                tables[0][split.validation],
                labels[split.validation],
            )
        return tables


def _different(
    extraction: Extraction, index_of: Mapping[str, int], labels: np.ndarray, classes: Sequence[str]
) -> tuple[dict[bytes, int], list[tuple[str, str]]]:
    """The first image of each content, by digest; and images to leave out, whose content lies in several classes."""
    copies: dict[bytes, list[str]] = {}
    for path, digest in zip(extraction.paths, extraction.digests, strict=True):
        copies.setdefault(digest, []).append(path)

    first_of = {}
    doubtful = []
    for digest, paths in copies.items():
        class_indices = {int(labels[index_of[path]]) for path in paths}
        if len(class_indices) == 1:
            first_of[digest] = index_of[paths[0]]
        else:
            names = ", ".join(classes[label] for label in sorted(class_indices))
            doubtful += [(path, f"the same image lies in the classes {names}") for path in paths]
    return first_of, doubtful

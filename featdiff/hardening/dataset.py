"""Class folders -> what a student learns from: rows of its frozen layers, labels, a split, and a teacher's answers."""

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
from .frozen import Trunk
from .reading import Glance, Pictures, Reader, derive
from .students import Classifier
from .teachers import HEAD_ROWS, Teacher
from .views import View


@dataclass(frozen=True)
class Material:
    """Different images that can be read, and what is made of them.

    refs, digests, labels : for each image
    rows : which of them train, validate and calibrate
    views : for each view, rows as the student takes them
    taught : for each view, the teacher's pre-logits
    unreadable : images that were left out, with a reason
    """

    refs: list[ImageRef]
    digests: list[bytes]
    labels: np.ndarray
    rows: Split
    views: list[Features]
    taught: list[FeatureTable]
    unreadable: list[tuple[str, str]]


@dataclass(frozen=True)
class Preparation:
    """How material is prepared; arguments as for :func:`featdiff.hardening.harden.harden`.

    ``calibration`` is None for a share that suits ``fpr``. ``batch_size`` images must be there to train on. What makes
    no sense is refused at once (``UsageError``).
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
        for name in ("calibration", "validation"):
            if (share := getattr(self, name)) is not None:
                check_share(name, share)
        if self.views < 1:
            raise UsageError(f"views must be a whole number above 0, not {self.views}")

    def __call__(
        self,
        refs: Sequence[ImageRef],
        labels: np.ndarray,
        classifier: Classifier,
        trunk: Trunk | None,
        teacher: Teacher | None,
    ) -> Material:
        """All images through the frozen layers, if there are any, and the teacher, once for each view.

        A teacher without a last layer learns the classes.

        Raises
        ------
        UsageError
            Too few images, in all or of a class, or none that can be read, or no room for what is kept.
        FeatdiffError
            An image changed meanwhile.
        """
        self._check_count(len(refs))
        self._check_room(len(refs), trunk, teacher)
        if trunk is None and any(ref.sequential for ref in refs):
            raise UsageError(
                "with all layers trained, images are read in any order, and this archive cannot: unpack it"
            )
        found, kept = self.reader.extract(refs, trunk or Glance(), 0, np.float16, self.progress)
        if not found.paths:
            path, reason = found.unreadable[0]
            raise UsageError(f"none of the images could be read; the first: {path}: {reason}")
        left_out = [*found.unreadable]
        number = {ref.path: i for i, ref in enumerate(refs)}
        chosen = _different(found, number, labels, classifier.classes, left_out)
        digests, known, labels = [*chosen], [refs[i] for i in chosen.values()], labels[[*chosen.values()]]
        rows = self._split(digests, labels, classifier.classes)
        views = self._views(known, digests, kept, classifier, trunk)
        taught = self._taught(known, digests, labels, rows, teacher) if teacher else []
        return Material(known, digests, labels, rows, views, taught, left_out)

    def held_back(self, images: int) -> float:
        """The share of so many images that calibrates or validates."""
        calibration = min(self._calibration(images), MOST_CALIBRATION / images)
        return calibration + min(self.validation, MOST_VALIDATION / images)

    def _calibration(self, images: int) -> float:
        """A tenth, or up to a fifth of few images, so that there are twice as many as the rate needs at least."""
        return self.calibration or min(0.2, max(0.1, 2 / (self.fpr * images)))

    def _check_count(self, images: int) -> None:
        check_supported(self.fpr, round(min(MOST_CALIBRATION, images * self._calibration(images))))
        training = images - round(images * self.held_back(images))
        if training < self.batch_size:
            raise UsageError(
                f"{training} training images do not fill a batch of {self.batch_size}: lower --train-batch (batch_size)"
            )

    def _check_room(self, images: int, trunk: Trunk | None, teacher: Teacher | None) -> None:
        """Whether the disk has room for what images leave in the cache; rows that are there may be of others."""
        needed = 0
        for view in range(self.views):
            stores = [self.reader.store(trunk, view, np.float16)] if trunk else []
            stores += [self.reader.store(teacher, view, np.float32)] if teacher else []
            needed += sum(max(0, images - len(store)) * store.width * store.dtype.itemsize for store in stores)
        free = shutil.disk_usage(self.reader.cache).free if needed else 0
        if needed > free:
            raise UsageError(
                f"{images:,} images in {self.views} views need {needed / 1e9:.1f} GB in {self.reader.cache}, and "
                f"{free / 1e9:.1f} GB are free: name another --cache, fewer --views, or a later layer by --train-from"
            )

    def _split(self, digests: list[bytes], labels: np.ndarray, classes: Sequence[str]) -> Split:
        # by content: who begins with this student, or is taught by it, is calibrated on what it did not learn from
        rows = split_by_content(digests, self._calibration(len(digests)), self.validation)
        check_supported(self.fpr, len(rows.calibration))
        for label, name in enumerate(classes):
            if not (labels[rows.training] == label).any():
                raise UsageError(f"class {name!r} has no image left to train on: add images of it, or leave it out")
        return rows

    def _views(
        self,
        refs: list[ImageRef],
        digests: list[bytes],
        kept: FeatureStore,
        classifier: Classifier,
        trunk: Trunk | None,
    ) -> list[Features]:
        """What the student takes of each view; the first has been seen, and is ``kept``, where layers are frozen."""
        if trunk is None:
            return [Pictures(refs, View(view, classifier.transform), self.reader) for view in range(self.views)]
        others = [
            self.reader.table(refs, digests, trunk, view, np.float16, self.progress) for view in range(1, self.views)
        ]
        return [kept.table(digests), *others]

    def _taught(
        self, refs: list[ImageRef], digests: list[bytes], labels: np.ndarray, rows: Split, teacher: Teacher
    ) -> list[FeatureTable]:
        """The teacher's pre-logits of each view; a backbone learns the classes first."""
        tables = []
        for view in range(self.views):
            if teacher.trunk:  # only what lies behind it has changed
                kept = self.reader.store(teacher.trunk, view, np.float16)
                derive(kept, self.reader.store(teacher, view, np.float32), digests, teacher.behind, self.progress)
            tables.append(self.reader.table(refs, digests, teacher, view, np.float32, self.progress))
        if teacher.head is None:
            of_each = rows.training[np.unique(labels[rows.training], return_index=True)[1]]  # rare classes, too
            some = np.union1d(evenly(rows.training, HEAD_ROWS), of_each)
            parts = [(tables[0][part], labels[part]) for part in (some, rows.validation)]
            teacher.fit_head(*parts[0], *parts[1])
        return tables


def _different(
    found: Extraction,
    number: Mapping[str, int],
    labels: np.ndarray,
    classes: Sequence[str],
    left_out: list[tuple[str, str]],
) -> dict[bytes, int]:
    """Of each content, the first image; a content in several classes has no label, and is left out."""
    copies: dict[bytes, list[str]] = {}
    for path, digest in zip(found.paths, found.digests, strict=True):
        copies.setdefault(digest, []).append(path)
    chosen = {}
    for digest, paths in copies.items():
        names = [classes[label] for label in sorted({int(labels[number[path]]) for path in paths})]
        if len(names) > 1:
            left_out += [(path, f"the same image lies in the classes {', '.join(names)}") for path in paths]
        else:
            chosen[digest] = number[paths[0]]
    return chosen

"""Images -> rows: kept on disk where they stay as they are, decoded at each step where a student sees pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.batches import iter_batches, iter_loaded
from ..data.decoding import MAX_PIXELS, Transform
from ..data.references import ImageRef
from ..exceptions import FeatdiffError
from ..features.extraction import Extraction, Extractor, extract
from ..features.store import FeatureStore, FeatureTable
from ..runtime.progress import Progress
from .views import View

_AT_ONCE = 128
#: Of the cache: rows for students, and trained ones.
FOLDER = "hardening"


@dataclass(frozen=True)
class Reader:
    """How images are read; arguments as for :class:`featdiff.Detector`."""

    cache: Path
    image_batch: int = 32
    workers: int | None = None
    max_pixels: int = MAX_PIXELS

    def store(self, extractor: Extractor, view: int, dtype: type[np.number]) -> FeatureStore:
        """Where rows of one view are kept."""
        name = View(view, extractor.transform).name
        return FeatureStore(self.cache / FOLDER / extractor.key(name), extractor.width, dtype)

    def extract(
        self,
        refs: Sequence[ImageRef],
        extractor: Extractor,
        view: int,
        dtype: type[np.number],
        progress: Progress | None,
    ) -> tuple[Extraction, FeatureStore]:
        """Rows of one view of all images, kept in the cache; what is there is not computed again."""
        seen, kept = View(view, extractor.transform), self.store(extractor, view, dtype)
        loaded = iter_loaded(refs, seen, self.workers, self.max_pixels, kept, ahead=2 * self.image_batch)
        return extract(iter_batches(loaded, self.image_batch), extractor, kept, len(refs), progress), kept

    def table(self, refs: Sequence[ImageRef], digests: Sequence[bytes], *how: Any) -> FeatureTable:
        """The same for images that are known to be readable, one for each digest; ``how`` as for :meth:`extract`.

        Raises
        ------
        FeatdiffError
            An image has changed meanwhile.
        """
        found, kept = self.extract(refs, *how)
        if found.unreadable:
            path, reason = found.unreadable[0]
            raise FeatdiffError(f"{path} was readable a moment ago: {reason}")
        if any(digest not in kept for digest in digests):
            raise FeatdiffError("some images have changed since the start: start again")
        return kept.table(digests)


def derive(
    source: FeatureStore,
    target: FeatureStore,
    digests: Sequence[bytes],
    make: Callable[[Tensor], Tensor],
    progress: Progress | None,
) -> None:
    """Fill ``target`` from rows of ``source``, if it has them all; ``make`` turns (B, D) into (B, width)."""
    missing = [digest for digest in digests if digest not in target]
    if any(digest not in source for digest in missing):
        return
    for start in range(0, len(missing), _AT_ONCE):
        some = missing[start : start + _AT_ONCE]
        for digest, row in zip(some, make(source.table(some)[np.arange(len(some))]).cpu().numpy(), strict=True):
            target.add(digest, row)
        if progress:
            progress("features", start + len(some), len(missing))
    target.flush()


class Glance:
    """An extractor that tells which images can be read, where no layers are frozen: the mean colour of each."""

    width = 3

    @property
    def transform(self) -> Transform:
        """RGB picture -> (3, 1, 1)."""
        return _colour

    def key(self, variant: str = "") -> str:
        return f"colour {variant}".strip()

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, 3, 1, 1) -> (B, 3)."""
        return pixels.flatten(1)


def _colour(image: Image.Image) -> Tensor:
    mean = np.asarray(image.resize((1, 1), Image.Resampling.BOX), dtype=np.float32)
    return torch.from_numpy(mean / 255).permute(2, 0, 1)


@dataclass(frozen=True)
class Pictures:
    """One view (n, 3, H, W) of readable images by their numbers, decoded whenever it is asked for."""

    refs: Sequence[ImageRef]
    view: View
    reader: Reader

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        """Raises ``FeatdiffError`` if an image cannot be read any more."""
        refs = [self.refs[row] for row in rows]
        pixels = []
        for item in iter_loaded(refs, self.view, self.reader.workers, self.reader.max_pixels):
            if item.pixels is None:
                raise FeatdiffError(f"{item.ref.path} was readable a moment ago: {item.reason}")
            pixels.append(item.pixels)
        return torch.stack(pixels)

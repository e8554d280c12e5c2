"""Reads images for training a student.

In: image references. Out: features of frozen networks, cached on disk; or pixels, decoded at every step, where all
layers of the student are trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.batches import iter_batches, iter_loaded
from ..data.decoding import Transform
from ..data.references import ImageRef
from ..detectors.run_config import Runtime
from ..exceptions import FeatdiffError
from ..features.extraction import Extraction, Extractor, extract
from ..features.store import Features, FeatureStore, FeatureTable
from ..runtime.progress import Progress
from .views import View

_DERIVE_BATCH = 128
#: Subfolder of the cache for inputs of students and for trained students.
FOLDER = "hardening"


@dataclass(frozen=True)
class Reader:
    """Reads images and caches features of their views.

    Parameters
    ----------
    runtime : Runtime
        Batch size, decoding threads, the largest picture, and the cache.
    """

    runtime: Runtime

    def store(self, extractor: Extractor, view: int, dtype: type[np.number]) -> FeatureStore:
        """The store of one view's features in the cache."""
        name = View(view, extractor.transform).name
        return FeatureStore(self.runtime.cache_folder / FOLDER / extractor.key(name), extractor.width, dtype)

    def extract(
        self,
        refs: Sequence[ImageRef],
        extractor: Extractor,
        view: int,
        dtype: type[np.number],
        progress: Progress | None,
    ) -> tuple[Extraction, FeatureStore]:
        """Compute the features of one view of all images, unless the cache has them.

        Parameters
        ----------
        refs : sequence of ImageRef
        extractor : Extractor
        view : int
            See :class:`featdiff.hardening.views.View`.
        dtype : NumPy type
            Of the stored numbers.
        progress : callable, optional

        Returns
        -------
        Extraction
            Digests of readable images, and reasons for the others.
        FeatureStore
            Has the features.
        """
        augment = View(view, extractor.transform)
        store = self.store(extractor, view, dtype)

        runtime = self.runtime
        ahead = 2 * runtime.image_batch
        loaded = iter_loaded(
            refs, augment, runtime.workers, runtime.max_pixels, store, ahead, max_bytes=runtime.max_bytes
        )
        batches = iter_batches(loaded, runtime.image_batch)
        return extract(batches, extractor, store, len(refs), progress), store

    def table(
        self,
        refs: Sequence[ImageRef],
        digests: Sequence[bytes],
        extractor: Extractor,
        view: int,
        dtype: type[np.number],
        progress: Progress | None,
    ) -> FeatureTable:
        """Features of images that are known to be readable, in the order of ``digests``; see :meth:`extract`.

        Raises
        ------
        FeatdiffError
            An image has changed in the meantime.
        """
        extraction, store = self.extract(refs, extractor, view, dtype, progress)
        if extraction.unreadable:
            path, reason = extraction.unreadable[0]
            raise FeatdiffError(f"{path} was readable a moment ago: {reason}")

        if any(digest not in store for digest in digests):
            raise FeatdiffError("some images have changed since the start: start again")
        return store.table(digests)


def derive(
    source: FeatureStore,
    target: FeatureStore,
    digests: Sequence[bytes],
    compute: Callable[[Tensor], Tensor],
    progress: Progress | None,
) -> None:
    """Fill a store from the features in another one, unless some are missing there.

    Parameters
    ----------
    source, target : FeatureStore
    digests : sequence of bytes
        Of the images.
    compute : callable
        Features (B, D) of ``source`` -> features (B, width) of ``target``.
    progress : callable, optional
    """
    missing = [digest for digest in digests if digest not in target]
    if any(digest not in source for digest in missing):
        return

    for start in range(0, len(missing), _DERIVE_BATCH):
        batch = missing[start : start + _DERIVE_BATCH]
        features = source.table(batch)[np.arange(len(batch))]
        for digest, vector in zip(batch, compute(features).cpu().numpy(), strict=True):
            target.add(digest, vector)
        if progress:
            progress("features", start + len(batch), len(missing))
    target.flush()


class MeanColour:
    """An extractor of the mean colour. Without frozen layers, it serves to find out which images can be read."""

    width = 3
    device = torch.device("cpu")

    @property
    def transform(self) -> Transform:
        """RGB image -> (3, 1, 1)."""
        return _mean_colour

    def key(self, variant: str = "") -> str:
        return f"colour {variant}".strip()

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, 3, 1, 1) -> (B, 3)."""
        return pixels.flatten(1)


def _mean_colour(image: Image.Image) -> Tensor:
    mean = np.asarray(image.resize((1, 1), Image.Resampling.BOX), dtype=np.float32)
    return torch.from_numpy(mean / 255).permute(2, 0, 1)


@dataclass(frozen=True)
class DecodedImages(Features):
    """One view of readable images, (n, 3, H, W), decoded each time it is indexed.

    Parameters
    ----------
    refs : sequence of ImageRef
    view : View
    reader : Reader
    """

    refs: Sequence[ImageRef]
    view: View
    reader: Reader

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, indices: np.ndarray | slice) -> Tensor:
        """Images (B,) -> (B, 3, H, W); ``FeatdiffError`` if one cannot be read any more."""
        refs = [self.refs[index] for index in np.arange(len(self))[indices]]
        pixels = []
        runtime = self.reader.runtime
        loaded = iter_loaded(refs, self.view, runtime.workers, runtime.max_pixels, max_bytes=runtime.max_bytes)
        for item in loaded:
            if item.pixels is None:
                raise FeatdiffError(f"{item.ref.path} was readable a moment ago: {item.reason}")
            pixels.append(item.pixels)

        return torch.stack(pixels)

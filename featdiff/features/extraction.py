"""Batches of images -> features, each content computed once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..data.batches import Batch
from ..data.decoding import Transform
from ..runtime.progress import Progress
from .store import FeatureStore


class Extractor(Protocol):
    """Decoded images -> one vector each.

    :class:`featdiff.features.extractor.FeatureExtractor` and :class:`featdiff.features.pixels.Pixels` are such.

    ``width`` is a vector's length, ``transform`` makes what is called with, ``key`` names what decides the numbers.
    """

    width: int

    @property
    def transform(self) -> Transform: ...

    def key(self, variant: str = "") -> str: ...

    def __call__(self, pixels: Tensor) -> Tensor: ...


@dataclass
class Extraction:
    """What came of a set of images: paths and digests of the good ones, path and reason of the others."""

    paths: list[str] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    computed: int = 0  # how many went through the backbone just now


def featurise(batch: Batch, extractor: Extractor) -> tuple[dict[int, np.ndarray], dict[int, str]]:
    """Run the backbone over a batch: vectors and failures, both by position in ``batch.loaded``."""
    failed = {i: item.reason for i, item in enumerate(batch.loaded) if item.reason}
    if batch.pixels is None:
        return {}, failed
    rows = extractor(batch.pixels).cpu()
    judged, reason = rows, "the backbone gives NaN or infinite features for it"
    if not rows.is_floating_point():  # whole numbers hide what was wrong
        judged, reason = batch.pixels.flatten(1), "it holds NaN or infinite values"
    finite, vectors = torch.isfinite(judged).all(1), rows.numpy()
    failed |= {i: reason for k, i in enumerate(batch.decoded) if not finite[k]}
    return {i: vectors[k] for k, i in enumerate(batch.decoded) if finite[k]}, failed


def extract(
    batches: Iterable[Batch],
    extractor: Extractor,
    store: FeatureStore,
    total: int = 0,
    progress: Progress | None = None,
) -> Extraction:
    """Features of all images, each content computed once, kept in ``store`` as they come.

    Whatever ends the run (Ctrl-C, a full disk), the vectors written so far stay in the store.

    Parameters
    ----------
    batches : batches in which images already in ``store`` need not be decoded
    total : number of images if known, for ``progress``
    """
    found = Extraction()
    done = 0
    try:
        for batch in batches:
            vectors, failed = featurise(batch, extractor)
            for i, item in enumerate(batch.loaded):
                if i in failed:
                    found.unreadable.append((item.ref.path, failed[i]))
                    continue
                if i in vectors:
                    store.add(item.digest, vectors[i])
                found.paths.append(item.ref.path)
                found.digests.append(item.digest)
            found.computed += len(vectors)
            done += len(batch.loaded)
            if progress:
                progress("features", done, max(total, done))
    finally:
        store.flush()
    return found
